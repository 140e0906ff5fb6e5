"""What `dry_run=true` predicts against what the run then takes, on generated checkpoints of three sizes.

    python experiments/benchmarks/dry_run.py [--rounds 1] [--wall] [--only medium]

A case is predicted, run and predicted again, each in a process of its own (forked, so that libraries are imported
once); the prediction is the mean of the two. Seconds are processor time of one thread, so that other work on the
machine does not decide the comparison; --wall takes the wall clock, on a machine that is left alone. Disk is the most
that the run folder held, looked at every 20 ms, links counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--wall" not in sys.argv:
    time.perf_counter = time.process_time  # before the project's modules and torch's look at the clock

import torch
import transformers
from hydra import compose, initialize_config_dir
from machine import describe_machine
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from besa_exp.cli.configuration import method_name, read_settings
from besa_exp.cli.main import main as besa
from besa_exp.dry_run.estimate import Estimate, estimate, peak
from besa_exp.presets import CONF_DIR

HERE = Path(__file__).parent
# A fresh process that loads the saved model has processor time of its own, which is not asked for.
APART = [] if "--wall" in sys.argv else ["save.verify=false"]
SIZES = {  # hidden, ffn, blocks, samples, tokens of a sample
    "small": (256, 704, 4, 32, 256),
    "medium": (512, 1408, 6, 32, 128),
    "large": (1024, 2816, 6, 24, 128),
}
VOCABULARY = 4000
PRUNERS = ("wanda", "sparsegpt", "besa")
PARTS = ("load", "prune", "save", "evaluate", "total")


def write_case(folder: Path, size: str) -> None:
    """A random Llama, and the tokens it is calibrated and scored on."""
    hidden, ffn, blocks, samples, length = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, max_position_embeddings=length,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_file({"input_ids": torch.randint(0, VOCABULARY, (samples, length))}, folder / "tokens.safetensors")


def keys_of(folder: Path, out: Path, pruner: str, more: list[str]) -> list[str]:
    tokens = folder / "tokens.safetensors"
    return [
        f"model.path={folder}", f"calibration.path={tokens}", f"pruner={pruner}", "evaluator=perplexity",
        f"evaluator.perplexity_sets=[{tokens}]", "tracker=none", "device=cpu", "save.model=true",
        f"hydra.run.dir={out}", *more, *APART,
    ]  # fmt: skip


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`work(*arguments)` in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            sender.send(work(*arguments))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def predict(keys: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", keys, return_hydra_config=True)
    found: Estimate = estimate(
        read_settings(config, method_name(config.hydra.runtime.choices)), Path(config.hydra.run.dir)
    )
    found.seconds["prune"] += found.seconds.pop("refine", 0.0)
    return {
        "seconds": found.seconds,
        "host": peak(found.parts, "host")[0],
        "disk": peak(found.parts, "disk")[0],
        "kept": found.kept,
        "parts": {f"{part.place}: {part.name}": part.size for part in found.parts},
        "took": time.perf_counter() - started,
    }


def measure(keys: list[str], out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], held(out))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = besa(["prune", *keys])
    ended.set()
    watcher.join()
    assert code == 0, f"besa prune {' '.join(keys)} ended with {code}"
    results = json.loads((out / "results.json").read_text())
    memory = results["peak_memory_bytes"]
    return {"seconds": results["seconds"], "host": memory["host"], "disk": most[0], "kept": held(out)}


def held(folder: Path) -> int:
    """Bytes of the files in a folder, those with several names once."""
    sizes: dict[int, int] = {}
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed or removed meanwhile
            stat = file.lstat()
            sizes[stat.st_ino] = 0 if file.is_dir() else stat.st_size
    return sum(sizes.values())


def compare(folder: Path, out: Path, pruner: str, rounds: int, more: list[str]) -> dict[str, Any]:
    """Predicted, measured and their ratio of each figure."""
    keys = keys_of(folder, out, pruner, more)
    predicted, measured = [apart(predict, keys)], []
    for _ in range(rounds):
        measured.append(apart(measure, keys, out))
        predicted.append(apart(predict, keys))
    figures = {f"seconds.{part}": lambda found, part=part: found["seconds"][part] for part in PARTS}
    figures |= {name: lambda found, name=name: found[name] for name in ("host", "disk", "kept")}
    cells = {}
    for name, pick in figures.items():
        told, seen = (statistics.fmean(pick(found) for found in several) for several in (predicted, measured))
        cells[name] = {"predicted": told, "measured": seen, "ratio": told / seen if seen else None}
    seconds = [found["seconds"]["prune"] for found in predicted]
    return {
        **cells,
        "predictions of seconds.prune": seconds,
        "seconds of a prediction": predicted[0]["took"],
        "parts": predicted[0]["parts"],
    }


def show(size: str, pruner: str, cells: dict[str, Any]) -> str:
    def cell(name: str, unit: float, digits: int) -> str:
        found = cells[name]
        return f"{found['predicted'] / unit:.{digits}f} / {found['measured'] / unit:.{digits}f} ({found['ratio']:.2f})"

    shown = [cell(f"seconds.{part}", 1, 1) for part in ("prune", "evaluate", "total")]
    return f"| {size} | {pruner} | " + " | ".join([*shown, cell("host", 1e6, 0), cell("disk", 1e6, 1)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each case")
    parser.add_argument("--wall", action="store_true", help="seconds by the wall clock, not processor time")
    parser.add_argument("--only", default="", help="one size")
    parser.add_argument("--pruners", nargs="+", default=PRUNERS)
    parser.add_argument("--more", nargs="*", default=[], help="further keys of the run, such as model.load=streamed")
    parser.add_argument("--out", type=Path, default=HERE / "dry_run.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    record: dict[str, Any] = {"machine": describe_machine(torch.device("cpu")), "sizes": SIZES}
    record |= {"clock": "wall" if arguments.wall else "processor time", "more": arguments.more, "cases": {}}
    print("| size | pruner | prune, s | evaluate, s | total, s | host, MB | disk, MB |\n|---|---|---|---|---|---|---|")
    for size in [arguments.only] if arguments.only else SIZES:
        with tempfile.TemporaryDirectory() as place:
            write_case(Path(place, "model"), size)
            for pruner in arguments.pruners:
                cells = compare(Path(place, "model"), Path(place, "run"), pruner, arguments.rounds, arguments.more)
                record["cases"][f"{size}, {pruner}"] = cells
                print(show(size, pruner, cells), flush=True)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
