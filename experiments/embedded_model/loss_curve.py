"""Writes the loss curve while training runs; run alone, draws loss_curve.png from loss_curve.jsonl beside this file."""

import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent


class LossCurve:
    """JSON lines on disk and in the log, from the first process only."""

    def __init__(self, path: Path, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.file = path.open("w") if torch.distributed.get_rank() == 0 else None

    def write(self, step: int, seconds: float, **values: float) -> None:
        if self.file:
            line = {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(seconds, 1)} | values
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            print(json.dumps(line), flush=True)


def main() -> None:
    lines = [json.loads(line) for line in (HERE / "loss_curve.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("train_loss", "training", "-"), ("held_out_loss", "held-out, first 40 windows", "o-")):
        points = [(line["tokens"] / 1e6, line[key]) for line in lines if key in line and "final" not in line]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    axes.plot(lines[-1]["tokens"] / 1e6, lines[-1]["held_out_loss"], "*", color="black", label="held-out, whole set")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "loss_curve.png", dpi=110)


if __name__ == "__main__":
    main()
