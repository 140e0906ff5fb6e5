"""Collects run folders of the study into results.json and tables.md beside this file, and writes README's table and
figure of results. What results.json holds already stays, unless the same run was made again.

    python experiments/real_model/collect.py [outputs/real_model/runs]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results_figure import figure

from besa_exp.display.markdown import markdown_table
from besa_exp.display.missed_target import missed_by
from besa_exp.report.runs import RunRecord, ScoreRecord, read_run
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
FIGURE = HERE.parents[1] / "docs" / "results.svg"
ZERO_SHOT = Path("outputs/real_model/zero_shot")
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
METHODS = (
    "dense",
    "magnitude",
    "wanda",
    "ria",
    "wanda+admm",
    "sparsegpt",
    "sparsegpt+reconstruct",
    "besa_paper",
    "besa_linear",
    "besa",
    "besa, scope=model",
    "best",
)
"""In the order of the tables; others follow by name."""
UNSTRUCTURED = "unstructured"
TARGETS = (0.5, 0.6, 0.7, 0.8)
CALIBRATION = (32, 512)  # windows and their tokens, where a method's name says nothing else
COLUMNS = (*((f"{100 * target:.0f} %", target, UNSTRUCTURED) for target in TARGETS), ("2:4", 0.5, "2:4"))
"""Title, target and pattern of the tables' columns."""


def record(run: RunRecord) -> dict[str, Any]:
    """What the study keeps of a run."""
    method = re.sub(r"path=\S*/", "path=", run.method.label.replace(f", {run.pattern}", ""))  # wherever a text lies
    windows = run.calibration.get("num_samples"), run.calibration.get("seq_len")
    if None not in windows and windows != CALIBRATION:
        method += f", {windows[0]} x {windows[1]:,} tokens"
    by_row = run.pattern == "N:4"  # each row keeps an N of its own: beside 2:4, under a name that says so
    return {
        "folder": run.path.name,
        "method": f"{method}, N:4" if by_row else method,
        "target": run.target,
        "pattern": "2:4" if by_row else run.pattern,
        "seed": run.seed,
        "measured": run.measured,
        "scores": scores(run),
        "prune_processor_seconds": run.seconds.get("prune_processor"),
        "peak_host_bytes": run.memory.get("host"),
        "calibration_sha256": run.calibration.get("tokens_sha256"),
        "commit": run.environment.get("git_commit"),
    }


def scores(run: RunRecord) -> dict[str, float]:
    """{measure: value}; a task's measure says of how many questions."""

    def label(score: ScoreRecord) -> str:
        questions = score.facets.get("questions")
        return score.measure.label + (f", {questions} questions" if questions else "")

    return {label(score): score.value for score in run.scores}


def with_zero_shot(rows: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records with the scores that `besa evaluate` gave their saved models, in a folder of the run's name each."""
    found = {path.parent.name: scores(read_run(path.parent)) for path in sorted(folder.glob("*/results.json"))}
    return [row | {"scores": row["scores"] | found.get(row["folder"], {})} for row in rows]


NOTE = """\
SmolLM2-135M-Instruct, its weights dequantised from 4 bits: perplexity on 16 windows of 1,024 tokens of WikiText-2's
test text (the last column: of C4), calibrated on 32 windows of 512 tokens of WikiText-2's validation text. Lower is
better. Mean ± sample standard deviation over three seeds, or over as many as stand in brackets. N:4: each row keeps an
N of its own of every 4 weights. `wanda+admm` is `pruner=wanda update=admm`; `besa, scope=model` is `pruner=besa
pruner.scope=model`, the search under the model's own loss."""
"""Above README's table."""
IN_README = {
    "dense": "-",
    "wanda": "stay",
    "wanda+admm": "change",
    "sparsegpt": "change",
    "sparsegpt+reconstruct": "change",
    "besa_paper": "stay",
    "besa": "stay",
    "besa, scope=model": "stay",
    "best": "change",
}
"""The methods of README's table, and what becomes of the kept weights."""


def request(row: dict[str, Any]) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    return row["method"], row["target"], row["pattern"], row["seed"]


def methods_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those that were run, in the order of the tables."""
    found = {row["method"] for row in rows}
    return [*(method for method in METHODS if method in found), *sorted(found - {*METHODS})]


def cells(rows: Sequence[dict[str, Any]], method: str, value: str, digits: int = 2) -> list[str]:
    """One method's values over the columns, with the zeros that came out where the target was missed. A dense model has
    one value for all; no cell is empty without a reason."""
    own = [row for row in rows if row["method"] == method]

    def cell(target: float, pattern: str) -> str:
        if method == "dense":
            found = [row["scores"][value] for row in own if value in row["scores"]]
            return over_seeds(found[:1], digits, seeds=1)
        fitting = [row for row in own if (row["target"], row["pattern"]) == (target, pattern)]
        scored = [row for row in fitting if value in row["scores"]]
        missed = [row["measured"] for row in scored if missed_by(target, row["measured"])]
        at = f" at {100 * statistics.mean(missed):.1f} %" if missed else ""
        return over_seeds([row["scores"][value] for row in scored], digits) + at

    return [cell(target, pattern) for _, target, pattern in COLUMNS]


def table(rows: Sequence[dict[str, Any]], label: str, digits: int) -> list[str]:
    """One measure: methods down, targets across; without what was not measured."""
    lines = [[method, *cells(rows, method, label, digits)] for method in methods_of(rows)]
    measured = [line for line in lines if any(cell != "n/a" for cell in line[1:])]
    return [f"## {label}", "", *markdown_table(["method", *(title for title, *_ in COLUMNS)], measured), ""]


def cost_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Processor time of pruning, and zeros that came out, of the first seed."""
    lines = []
    for method in methods_of(rows):
        own = [row for row in rows if row["method"] == method and row["measured"]]
        for row in sorted(own, key=lambda row: (row["pattern"] != UNSTRUCTURED, row["target"], row["seed"])):
            if row["seed"] == 0 and row["prune_processor_seconds"] is not None:
                target = f"{row['target']:.0%}" if row["pattern"] == UNSTRUCTURED else row["pattern"]
                seconds, gigabytes = f"{row['prune_processor_seconds']:.0f}", f"{row['peak_host_bytes'] / 1e9:.1f}"
                lines.append([method, target, f"{row['measured']:.2%}", seconds, gigabytes])
    titles = ["method", "target", "zeros", "processor seconds of pruning", "memory, GB"]
    return ["## Cost", "", *markdown_table(titles, lines), ""]


def readme_cells(rows: Sequence[dict[str, Any]], method: str) -> list[str]:
    """One method's row of README. BESA's answer to 2:4 is an N for each row; the authors' code has none."""
    wikitext2, c4 = (f"tokens/{name}.safetensors" for name in ("wikitext2", "c4"))
    *unstructured, two_of_four = cells(rows, method, wikitext2)
    if method == "besa":
        two_of_four = f"{cells(rows, 'besa, N:4', wikitext2)[-1]}, N:4"
    if method == "besa_paper":
        two_of_four = "refused"
    found = (*unstructured, two_of_four, cells(rows, method, c4)[0])
    return [cell.replace("n/a", "not run") for cell in found]


def with_results(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """README with its one table of results, made from these records."""
    lines = [
        [f"`{method}`" if method != "dense" else method, *readme_cells(rows, method), kept]
        for method, kept in IN_README.items()
    ]
    titles = ["method", *(title for title, *_ in COLUMNS), "C4, 50 %", "kept weights"]
    head, _, rest = text.partition(BEGIN)
    return "\n".join([f"{head}{BEGIN}{NOTE}", "", *markdown_table(titles, lines), ""]) + END + rest.partition(END)[2]


def main() -> None:
    """Reads the runs, writes the files."""
    folders = [Path(argument) for argument in sys.argv[1:]] or [Path("outputs/real_model/runs")]
    paths = [path.parent for folder in folders for path in sorted(folder.rglob("results.json"))]
    found = with_zero_shot([record(read_run(path)) for path in paths], ZERO_SHOT)
    records = HERE / "results.json"
    recorded = json.loads(records.read_text(encoding="utf-8")) if records.is_file() else []
    before = {request(row): row for row in recorded}
    rows = kept_records(records, found, request)
    for row in rows:  # a run made again may have been asked for less
        if lost := before.get(request(row), row)["scores"].keys() - row["scores"].keys():
            print(f"{row['folder']} replaces a run that had {', '.join(sorted(lost))}, too", file=sys.stderr)
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as stand in brackets.", ""]
    for label in sorted({label for row in rows for label in row["scores"]}):
        lines += table(rows, label, digits=2 if label.endswith(".safetensors") else 3)
    lines += cost_table(rows)
    (HERE / "tables.md").write_text("\n".join(lines), encoding="utf-8")
    README.write_text(with_results(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    FIGURE.write_text(figure(rows), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
