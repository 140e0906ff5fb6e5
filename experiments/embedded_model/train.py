"""Trains the embedded model, a small Llama on the docstrings of installed packages, and exports it in bf16.

Question: does a model small enough to ship learn enough of this text that pruning visibly hurts it?

Block matrices are trained with Muon, embeddings and norms with AdamW. The schedule follows elapsed time, not steps, so
that a run on a busy machine still finishes decayed, with fewer steps: the learning rate rises, stays, and falls
linearly to zero over the last 40 % of the budget. For the first half of it the windows are a quarter of the context,
which costs half as much per token; then they are whole. Each process holds one thread and one copy of the weights.

    python experiments/embedded_model/train.py --minutes 40 --export besa_exp/texts/embedded/model
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy
import tokenizers
import torch
from llama import export, model_config
from loss_curve import LossCurve
from tokenizer import WINDOW, encode, load_or_train_tokenizer
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

from besa_exp.texts.embedded.text import MODEL_DIR, TRAINING_PACKAGES, EmbeddedText, embedded_text, perplexity_documents

HERE = Path(__file__).parent
WARM_UP, SHORT, DECAY = 0.02, 0.5, 0.4  # of the budget: its first part, that of short windows, and its last part
SHORT_WINDOW = WINDOW // 4
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # whether the CPU has the units
MUON_LR, ADAMW_LR = 0.02, 0.004  # https://github.com/KellerJordan/modded-nanogpt for the first


def main() -> None:
    arguments = parse_arguments()
    corpus, held_out = embedded_text("train", TRAINING_PACKAGES), perplexity_documents()
    tokenizer = load_or_train_tokenizer(corpus.documents, arguments.work / "tokenizer")
    streams = [encode(tokenizer, text, arguments.work) for text in (corpus, held_out)]
    rendezvous = arguments.work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    description = describe(arguments, corpus, held_out)
    spawn(train_and_export, (arguments, streams, rendezvous.absolute().as_uri(), description), arguments.workers)


def train_and_export(
    rank: int, arguments: argparse.Namespace, streams: list[Path], rendezvous: str, description: dict
) -> None:
    """One of the training processes; all hold the same weights, and the first one writes the files."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=arguments.workers)
    torch.manual_seed(arguments.seed)
    tokens, held_out = (torch.from_numpy(numpy.load(stream).astype(numpy.int64)) for stream in streams)
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "tokenizer")
    model = LlamaForCausalLM(model_config(tokenizer, arguments))
    record = description | {
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": len(tokens),
        "held_out_tokens": len(held_out),
    }
    record |= train(model, tokens, held_out, arguments)
    if rank == 0:
        print(json.dumps(record), flush=True)
        arguments.record.write_text(json.dumps(record, indent=2) + "\n")
        export(model, tokenizer, arguments.export)
    torch.distributed.destroy_process_group()


def describe(arguments: argparse.Namespace, corpus: EmbeddedText, held_out: EmbeddedText) -> dict:
    """What identifies this training run, for its record."""
    return {
        "arguments": {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
        "train_characters": sum(map(len, corpus.documents)),
        "held_out_characters": sum(map(len, held_out.documents)),
        "train_sha256": corpus.sha256,
        "held_out_sha256": held_out.sha256,
        "versions": corpus.versions | {"tokenizers": tokenizers.__version__},
        "processor": platform.processor() or platform.machine(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock budget that the schedule follows")
    parser.add_argument("--max-steps", type=int, default=1_000_000, help="stop earlier (to measure speed)")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="whole windows per process and step")
    parser.add_argument("--muon-weight-decay", type=float, default=0.1)
    parser.add_argument("--adamw-weight-decay", type=float, default=0.01)
    parser.add_argument("--eval-seconds", type=float, default=60.0, help="between two held-out losses")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="cache of the tokens and the tokenizer")
    parser.add_argument("--curve", type=Path, default=HERE / "loss_curve.jsonl")
    parser.add_argument("--record", type=Path, default=HERE / "training.json")
    parser.add_argument("--export", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, arguments: argparse.Namespace) -> dict:
    """Trains until the budget is spent and writes the loss curve. Returns the totals, losses in nats per token."""
    optimizers = build_optimizers(model, arguments)
    seed = arguments.seed + 1000 * torch.distributed.get_rank()  # its own order of windows
    curve = LossCurve(arguments.curve, arguments.workers * arguments.batch * WINDOW)
    start, next_evaluation, running, step, window = time.monotonic(), 0.0, [], 0, 0
    while True:
        elapsed = mean_over_processes([time.monotonic() - start])[0]
        progress = elapsed / (60 * arguments.minutes)
        if progress >= 1 or step >= arguments.max_steps:
            break
        if window != window_at(progress):
            window = window_at(progress)
            batches = window_batches(tokens, window, arguments.batch * WINDOW // window, seed + window)
            model.set_attn_implementation("eager" if window < WINDOW else "sdpa")  # the faster one at each length
        if elapsed >= next_evaluation:
            loss = stream_loss(model, held_out[: 40 * WINDOW], window)
            curve.write(step, elapsed, window=window, held_out_loss=loss)
            next_evaluation = elapsed + arguments.eval_seconds
        running.append(train_step(model, optimizers, next(batches), learning_rate_scale(progress)))
        step += 1
        if step % 20 == 0:
            curve.write(step, elapsed, train_loss=sum(running) / len(running), progress=round(progress, 4))
            running = []
    losses = {
        "held_out_loss": stream_loss(model, held_out, WINDOW),
        "training_loss": stream_loss(model, tokens[: len(held_out)], WINDOW),
    }
    curve.write(step, elapsed, **losses, final=True)
    seen = step * curve.tokens_per_step
    return {"steps": step, "tokens_seen": seen, "epochs": seen / len(tokens), "seconds": elapsed, **losses}


def mean_over_processes(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    return (tensor / torch.distributed.get_world_size()).tolist()


def window_at(progress: float) -> int:
    """Tokens in a window: a quarter of the context in the first half of the budget, where it costs half as much."""
    return SHORT_WINDOW if progress < SHORT else WINDOW


def learning_rate_scale(progress: float) -> float:
    """Rises over the first WARM_UP of the budget, stays at 1, falls linearly to zero over its last DECAY."""
    return max(1e-3, min(progress / WARM_UP, 1.0, (1 - progress) / DECAY))


def build_optimizers(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=arguments.muon_weight_decay),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=arguments.adamw_weight_decay),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train_step(model: LlamaForCausalLM, optimizers: list, batch: torch.Tensor, scale: float) -> float:
    """One optimiser step on the gradient averaged over the processes; returns the mean loss in nats per token."""
    loss = token_loss(model, batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().view(1)])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    if not math.isfinite(flat[-1]):
        raise FloatingPointError("the training loss is not finite; lower MUON_LR or ADAMW_LR")
    for gradient, mean in zip(gradients, flat[:-1].split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad()
    return flat[-1].item()


def token_loss(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token. window: int64 [sample, seq + 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled() and BF16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def window_batches(tokens: torch.Tensor, window: int, size: int, seed: int):
    """Endless [size, window + 1] batches: every epoch cuts the stream at a new offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(window, (1,), generator=generator))
        windows = tokens[offset:].unfold(0, window + 1, window)
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield windows[order[start : start + size]]


@torch.no_grad()
def stream_loss(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Mean loss in nats per token over consecutive windows of the stream; the processes share the work."""
    windows = tokens.unfold(0, window + 1, window)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    total = sum(token_loss(model, batch).item() * len(batch) for batch in windows.split(8))
    total, count = mean_over_processes([total, float(len(windows))])
    return total / count


if __name__ == "__main__":
    main()
