"""Runs `besa` on the real model at 50 % under losses that were tried and are not part of the package, beside the two
that are. The probe, by which the search keeps what is best, takes the same loss. Writes losses.json beside this file,
and leaves out what stands there:

    python experiments/real_model/losses.py [loss ...] [--seeds 0 1 2]

E = Y - Yhat is the error, Y the dense block's output (token t, channel c), rms(Y_t) the size of a token:

    plain:          sum_tc E_tc^2 / sum_tc Y_tc^2
    both:           mean_c of  sum_t E_tc^2 / ||Y_t||^2  /  sum_t Y_tc^2 / ||Y_t||^2: each token, then each channel
    later:          token, the default, without the first token of each window
    later_channel:  channel, the authors', without the first token of each window
    huber:          mean_tc of h(E_tc / rms(Y_t)) / delta^2,  h quadratic up to delta = 0.1, then linear
    huber_wide:     the same with delta = 1
    weighted:       sum_t ||E_t||^2 / ||Y_t||  /  sum_t ||Y_t||, what weights are tuned under
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import huber_loss

import besa_exp
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.methods.pruners.besa import Besa
from besa_exp.tensors.losses import LOSSES, SMALLEST, Hidden, Loss, channel_loss, token_loss, weighted_loss

RESULTS = Path(__file__).with_name("losses.json")
MODEL, TOKENS = "outputs/models/smollm2-135m-instruct", Path("outputs/real_model/tokens")


def plain(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
    """Of the whole batch, as most codes take it: large tokens and channels outweigh the others."""
    targets = targets.float()
    return (targets - outputs.float()).square().sum() / targets.square().sum()


def both(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
    """Each token by its size, then each channel by what it has of the tokens."""
    targets = targets.float()
    size = targets.square().sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
    of_errors = ((targets - outputs.float()).square() / size).sum(dim=(0, 1))
    return (of_errors / (targets.square() / size).sum(dim=(0, 1)).clamp(min=SMALLEST)).mean()


def huber(delta: float) -> Loss:
    """Quadratic for errors up to `delta` of the token's root mean square, linear beyond."""

    def loss(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
        targets = targets.float()
        rms = targets.square().mean(dim=-1, keepdim=True).clamp(min=SMALLEST).sqrt()
        return huber_loss(outputs.float() / rms, targets / rms, delta=delta) / delta**2

    return loss


def later(loss: Loss) -> Loss:
    """Without the first token of each window."""
    return lambda outputs, targets: loss(outputs[:, 1:], targets[:, 1:])


TRIED: dict[str, Loss] = {
    "plain": plain,
    "both": both,
    "later": later(token_loss),
    "later_channel": later(channel_loss),
    "huber": huber(0.1),
    "huber_wide": huber(1.0),
    "weighted": weighted_loss,
}


def run(loss: str, seed: int) -> float:
    """The perplexity of one run on WikiText-2's test windows."""
    model, tokenizer = besa_exp.load_model(MODEL, dtype="float32")
    samples = load_file(TOKENS / f"calibration-{seed}.safetensors")["input_ids"]
    besa_exp.prune(model, tokenizer, samples, pruner=Besa(loss=loss, seed=seed), seed=seed)
    return perplexity(model, load_file(TOKENS / "wikitext2.safetensors")["input_ids"], 1024, "auto").value


def main() -> None:
    """Runs what is not done."""
    LOSSES.update(TRIED)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", default=[*LOSSES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    for seed in asked.seeds:
        for loss in asked.losses:
            done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if str(seed) in done.get(loss, {}):
                continue
            value = run(loss, seed)
            print(f"{loss}, seed {seed}: {value:.2f}", flush=True)
            done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another process may have written
            done.setdefault(loss, {})[str(seed)] = value
            RESULTS.write_text(json.dumps(dict(sorted(done.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
