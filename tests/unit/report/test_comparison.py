"""`besa compare`: which rows there are, in which order, what is best, and the forms they are told in."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import RESULTS, finished_run, unfinished_run

from besa_exp.cli.main import main
from besa_exp.report.comparison import Comparison, compare, main_measures
from besa_exp.report.comparison_formats import csv_of, latex, terminal_table, told_share
from besa_exp.report.folders import find_runs
from besa_exp.report.runs import Measure, read_run

DENSE = {"perplexity": {"wikitext2": 10.0}, "zero_shot": {"piqa": {"acc,none": 0.65, "acc_norm,none": 0.8}}}


def compared(place: Path, by: str = "score") -> Comparison:
    (found,) = compare([read_run(folder) for folder in find_runs([str(place)])], by)
    return found


def text(comparison: Comparison, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(terminal_table(comparison, width))
    return file.getvalue()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods at two targets, three seeds of one; the other method misses its higher target."""
    for target in (0.5, 0.7):
        for pruner, base in (("besa", 12.0), ("wanda", 14.0)):
            for seed in range(3 if pruner == "besa" else 1):
                changes = {"pruner": pruner, "target_sparsity": target, "measured_sparsity": target, "seed": seed}
                changes |= {"perplexity": {"wikitext2": base * 2 * target + seed}, "dense": DENSE}
                changes |= {"seconds.prune": 10.0 + seed, "calibration.tokens_sha256": f"c{seed}"}
                changes |= {"measured_sparsity": 0.68} if (pruner, target) == ("wanda", 0.7) else {}
                finished_run(tmp_path / f"{pruner}-{target}-{seed}", changes)
    return tmp_path


def test_rows_are_sorted_by_score_within_each_target(runs: Path) -> None:
    rows = compared(runs).rows
    assert [(row.method.label, row.target) for row in rows] == [
        ("besa", 0.5), ("wanda", 0.5), ("besa", 0.7), ("wanda", 0.7),
    ]  # fmt: skip
    assert (rows[0].runs, rows[0].seconds) == (3, 11.0)  # the mean over seeds


@pytest.mark.parametrize(
    ("by", "first"),
    [
        ("method", [("wanda", 0.5), ("wanda", 0.7)]),
        ("target", [("wanda", 0.5), ("besa", 0.5)]),
        ("measured", [("besa", 0.5), ("wanda", 0.5)]),
        ("time", [("wanda", 0.5), ("wanda", 0.7)]),
    ],
)
def test_rows_are_sorted_as_asked(runs: Path, by: str, first: list[tuple[str, float]]) -> None:
    rows = compared(runs, by).rows
    assert [(row.method.label, row.target) for row in rows[:2]] == first


def test_the_best_of_each_target_is_told_apart_from_the_second(runs: Path) -> None:
    found = compared(runs)
    measure = Measure("perplexity", "wikitext2")
    assert [found.place(row, measure) for row in found.rows] == [0, 1, -1, -1]


def test_fewer_zeros_than_were_asked_for_are_never_the_best(runs: Path) -> None:
    changes = {"pruner": "magnitude", "target_sparsity": 0.7, "measured_sparsity": 0.7, "dense": DENSE}
    finished_run(runs / "third", changes | {"perplexity": {"wikitext2": 30.0}, "calibration.tokens_sha256": "c0"})
    finished_run(
        runs / "fourth",
        changes | {"pruner": "besa_paper", "measured_sparsity": 0.62, "perplexity": {"wikitext2": 11.0}},
    )
    found = compared(runs)
    places = {row.method.label: found.place(row, Measure("perplexity", "wikitext2")) for row in found.rows[2:]}
    assert places == {"besa_paper": -1, "besa": 0, "wanda": -1, "magnitude": 1}


def test_of_a_tasks_metric_that_falls_the_lowest_is_best(tmp_path: Path) -> None:
    for pruner, value in (("besa", 0.2), ("wanda", 0.4)):
        task = {"version": 1.0, "higher_is_better": {"brier_score": False}}
        changes = {"pruner": pruner, "perplexity": {}, "zero_shot": {"arc": {"brier_score,none": value}}}
        changes |= {
            "provenance.zero_shot.tasks": {"arc": task},
            "dense": {"zero_shot": {"arc": {"brier_score,none": 0.1}}},
        }
        finished_run(tmp_path / pruner, changes)
    found = compared(tmp_path)
    assert [(row.method.label, found.place(row, found.measures[0])) for row in found.rows] == [
        ("besa", 0),
        ("wanda", 1),
    ]
    assert "arc brier_score ↓" in text(found, 160)


def test_the_table_tells_spread_loss_and_a_missed_target(runs: Path) -> None:
    shown = text(compared(runs), 160)
    assert "dense: wikitext2 10.000" in shown
    besa = next(line for line in shown.splitlines() if line.startswith("besa"))
    assert "13.000 ± 1.000 (3)" in besa
    assert "+30 %" in besa
    assert "68.00 % !" in shown
    assert "missed its target" in shown


def test_on_a_narrow_screen_what_is_left_of_the_parameters_gives_way_to_the_methods_names(tmp_path: Path) -> None:
    changes = {"pruner": "shortgpt+wanda+full", "parameters": {"dense": 100, "left": 80}}
    finished_run(tmp_path / "narrowed", changes, {"compute_dtype": "bfloat16"})
    wide, narrow = (text(compared(tmp_path), width) for width in (160, 60))
    assert "80.0%" in wide
    assert "shortgpt+wanda+full," in narrow
    assert "80.0%" not in narrow


@pytest.mark.parametrize("width", [64, 80, 100, 160])
def test_a_narrow_screen_gets_fewer_scores_and_no_broken_line(runs: Path, width: int) -> None:
    shown = text(compared(runs), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "13.000 ± 1.000 (3)" in shown
    assert ("more score" in shown) == (width < 160)


def test_what_may_not_be_compared_comes_last_unranked_with_its_reason(runs: Path) -> None:
    other = RESULTS["calibration"] | {"num_samples": 8}
    finished_run(runs / "apart", {"pruner": "magnitude", "calibration": other, "perplexity": {"wikitext2": 1.0}})
    found = compared(runs)
    last = found.rows[-1]
    assert last.method.label == "magnitude"
    assert found.place(last, found.measures[0]) == -1
    assert [found.place(row, found.measures[0]) for row in found.rows[:2]] == [0, 1]
    shown = text(found, 160)
    assert "[1] not comparable with the rows above: calibration size: 8 x 2048" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("magnitude [1]")]
    assert "-90 %" not in line  # against a dense score that may have been measured otherwise
    assert "magnitude" not in latex([found])


def test_latex_has_the_best_bold_the_second_underlined_and_escapes_names(runs: Path) -> None:
    finished_run(runs / "odd", {"pruner": "mine_50%", "perplexity": {"wikitext2": 99.0}})
    shown = latex([compared(runs)])
    assert r"\textbf{13.000 $\pm$ 1.000 (3)}" in shown
    assert r"\underline{14.000}" in shown
    assert r"mine\_50\%" in shown
    for line in ("\\toprule", "\\midrule", "\\bottomrule"):
        assert line in shown
    columns = shown.partition("\\begin{tabular}{")[2].partition("}")[0]
    assert {line.count(" & ") for line in shown.splitlines() if line.endswith(r"\\")} == {len(columns) - 1}


def test_csv_holds_every_score_with_its_spread_and_what_was_lost(runs: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of([compared(runs)]))))
    assert [row["method"] for row in rows] == ["dense", "besa", "wanda", "besa", "wanda"]
    assert float(rows[1]["perplexity wikitext2 lost against dense"]) == pytest.approx(0.3)
    assert float(rows[1]["perplexity wikitext2 deviation"]) == pytest.approx(1.0)
    assert rows[4]["target_missed"] == "True"


def test_what_is_gone_whole_and_was_timed_has_columns(runs: Path) -> None:
    plain = text(compared(runs), 200)
    assert "parameters" not in plain
    assert "tokens/s" not in plain
    cost = {"flops_per_token": 4e6, "cache_bytes_per_token": 8, "decode_tokens_per_second": {"1": 321.0, "8": 900.0}}
    changes = {"pruner": "sleb+dense", "target_sparsity": 0.0, "measured_sparsity": 0.0, "cost": cost, "dense": DENSE}
    finished_run(runs / "narrower", changes | {"parameters": {"dense": 1000, "left": 833}})
    (line,) = [line for line in text(compared(runs), 200).splitlines() if "sleb" in line]
    assert line.split()[1:6] == ["0", "%", "0.00", "%", "83.3%"]
    assert "321" in line
    (row,) = [row for row in csv.DictReader(io.StringIO(csv_of([compared(runs)]))) if "sleb" in row["method"]]
    assert (float(row["parameters_left"]), float(row["flops_per_token"])) == (0.833, 4e6)


def test_one_metric_stands_for_a_task() -> None:
    measures = [Measure("zero_shot", "piqa", metric) for metric in ("acc", "acc_norm")]
    assert [m.metric for m in main_measures([*measures, Measure("zero_shot", "boolq", "acc")])] == ["acc", "acc_norm"]


@pytest.mark.parametrize(("loss", "told"), [(0.004, "+0.4 %"), (0.24, "+24 %"), (-0.02, "-2.0 %"), (30.0, "x 31")])
def test_a_loss_is_told_as_people_say_it(loss: float, told: str) -> None:
    assert told_share(loss) == told


@pytest.mark.parametrize(
    ("flags", "told"), [([], "besa"), (["--csv"], "model,method,target_sparsity"), (["--latex"], "\\toprule")]
)
def test_the_command_prints_the_table(
    runs: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished_run(runs / "failed", status="failed", error="RunError: block 3")
    assert main(["compare", str(runs), *flags]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert ("1 failed (besa status" in shown) == (not flags)
    assert "\x1b" not in shown


def test_an_unknown_order_is_refused_with_those_there_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs), "--sort", "speed"]) == 2
    assert "score, method, target, measured, time, wikitext2" in capsys.readouterr().err


def test_nothing_finished_is_said_and_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished_run(tmp_path / "failed", status="failed", error="RunError: block 3")
    assert main(["compare", str(tmp_path)]) == 2
    assert "no finished run with scores (failed); see besa status" in capsys.readouterr().err


def test_the_score_that_most_rows_have_is_the_first_and_a_long_name_hides_none(tmp_path: Path) -> None:
    for number, pruner in enumerate(("wanda", "besa", "ria")):
        scores = {"wikitext2": 10.0 + number} | ({"c4": 30.0} if pruner == "besa" else {})
        long = {"recovery": {"path": "a/folder/of/many/words/" * 4}} if pruner == "ria" else {}
        finished_run(tmp_path / pruner, {"pruner": pruner, "perplexity": scores, "zero_shot": {}}, long)
    found = compared(tmp_path)
    assert [measure.name for measure in found.measures] == ["wikitext2", "c4"]
    assert [row.method.pruner for row in found.rows] == ["wanda", "besa", "ria"]
    head = text(found, 140).splitlines()[1]
    assert "wikitext2" in head
    assert "c4" in head
