"""Peak memory of runs on a generated checkpoint that is never whole in memory.

    python experiments/benchmarks/streaming.py [--blocks 40] [--folder FOLDER] [--whole]

Writes a random Llama in bf16 (hidden 2048, ffn 5632: 103 MB a block; 40 blocks are 4.1 GB), shard by shard, and prunes
it streamed in a process of its own with few samples, with `--whole` whole too. The bound is 3 x the largest block as
computed with (fp32 here: this CPU has no bf16 instructions) + the activations + 1 GB, which holds Python and its
libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe_machine
from safetensors.torch import save_file
from transformers import LlamaConfig

HERE = Path(__file__).parent
HIDDEN, FFN, HEADS, VOCABULARY, SAMPLES, SEQ_LEN = 2048, 5632, 16, 1000, 4, 64
GB = 1e9


def block_shapes() -> dict[str, tuple[int, ...]]:
    square, wide = (HIDDEN, HIDDEN), (FFN, HIDDEN)
    names = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    names |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": (HIDDEN, FFN)}
    return names | {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}


def write_model(folder: Path, blocks: int, device: torch.device | None = None) -> int:
    """A checkpoint of one shard a block, drawn on `device`; its size in bytes. One shard is in memory at a time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=blocks,
        num_attention_heads=HEADS, max_position_embeddings=SEQ_LEN, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    outside = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards = [{"model.norm.weight": (HIDDEN,), **outside}]
    shards += [{f"model.layers.{i}.{name}": shape for name, shape in block_shapes().items()} for i in range(blocks)]
    weight_map, size = {}, 0
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, device=device) * shape[1] ** -0.5).bfloat16().cpu()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += (folder / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def run(folder: Path, out: Path, pruner: str, load: str) -> dict[str, float]:
    """Peak resident bytes and seconds of one `besa prune`, with perplexity of the pruned model."""
    tokens = folder / "tokens.safetensors"
    keys = [
        f"model.path={folder}", "model.dtype=float32", f"model.load={load}", f"calibration.path={tokens}",
        "calibration.batch_size=4", f"pruner={pruner}", "evaluator=perplexity",
        f"evaluator.perplexity_sets=[{tokens}]", "evaluator.batch_size=4", "tracker=none", "save.model=false",
        "device=cpu", "overwrite=true", f"hydra.run.dir={out}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "besa_exp", "prune", *keys], check=True, stdout=subprocess.DEVNULL)
    results = json.loads((out / "results.json").read_text())
    (perplexity,) = results["perplexity"].values()
    return {
        "peak_bytes": results["peak_memory_bytes"]["host"],
        "seconds": results["seconds"]["total"],
        "perplexity": perplexity,
        "measured_sparsity": results["measured_sparsity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint and the runs; default: a temporary")
    parser.add_argument("--whole", action="store_true", help="prune it whole as well, where the memory allows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        size = write_model(folder, arguments.blocks)
        save_file({"input_ids": torch.randint(0, VOCABULARY, (SAMPLES, SEQ_LEN))}, folder / "tokens.safetensors")
        block = 4 * sum(torch.Size(shape).numel() for shape in block_shapes().values())
        bound = 3 * block + 2 * SAMPLES * SEQ_LEN * HIDDEN * 4 + 1e9
        record = {"machine": describe_machine(torch.device("cpu")), "checkpoint_bytes": size, "block_bytes": block}
        record |= {"bound_bytes": bound, "runs": {}}
        for pruner in ("wanda", "besa"):
            for load in ("streamed", "whole") if arguments.whole else ("streamed",):
                found = run(folder, Path(place) / "run", pruner, load)
                record["runs"][f"{pruner}, {load}"] = found
                peak = f"{found['peak_bytes'] / GB:.2f} GB (bound {bound / GB:.2f})"
                print(f"{pruner}, {load}: peak {peak}, {found}", flush=True)
    (HERE / "streaming.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
