"""`besa report`: which runs are found, which scores may stand side by side, and what is made of them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import LINEARS, RESULTS, block, finished_run, unfinished_run

from besa_exp.blocks.reports import Size
from besa_exp.cli.main import main
from besa_exp.display.markdown import escaped
from besa_exp.errors import ConfigurationError
from besa_exp.presets import presets
from besa_exp.report.comparability import entries
from besa_exp.report.curves import read_curve
from besa_exp.report.depth import allocation, errors_along_depth
from besa_exp.report.folders import find_runs
from besa_exp.report.methods import Method, looks, method_of
from besa_exp.report.page import page
from besa_exp.report.paper import paper_markdown, paper_tables, published
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.studies import kept_records, over_seeds
from besa_exp.report.summaries import Cell, cells, markdown
from besa_exp.run_folder.lock import locked

HOSTILE = '</script><img src="x" onerror="alert(1)">&\u2028'


def runs_of(folder: Path) -> list[RunRecord]:
    return [read_run(path) for path in find_runs([str(folder)])]


def cells_of(folder: Path) -> list[Cell]:
    runs = runs_of(folder)
    return cells(runs, entries(runs))


def cell(found: list[Cell], measure: str, pruner: str = "wanda", apart: bool = False) -> Cell:
    (one,) = (c for c in found if (c.measure.label, c.method.pruner, bool(c.apart)) == (measure, pruner, apart))
    return one


def test_runs_are_found_in_sweeps_nested_folders_and_patterns_each_once(tmp_path: Path) -> None:
    inner = [finished_run(tmp_path / "sweep" / "deep" / name) for name in ("b", "a")]
    other = finished_run(tmp_path / "single")
    (inner[0] / "model").mkdir()
    (inner[0] / "model" / "results.json").write_text("{}")  # what lies inside a run is its own
    finished_run(tmp_path / "sweep" / ".hidden")
    places = [str(tmp_path / "sweep"), str(tmp_path / "s*"), str(other / "results.json")]
    assert find_runs(places) == [inner[1], inner[0], other]


def test_places_without_runs_are_all_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError) as refusal:
        find_runs([str(tmp_path / "empty"), str(tmp_path / "nowhere")])
    assert len(refusal.value.problems) == 2


def test_scores_of_a_folder_that_no_run_made_are_read_too(tmp_path: Path) -> None:
    linears = {"mlp.up_proj": {"weights": 8, "pruned": 2, "sparsity": 0.25}}
    scored = {"model": "models/tiny", "measured_sparsity": 0.25, "blocks": [{"index": 0, "linears": linears}]}
    (tmp_path / "results.json").write_text(json.dumps({**scored, "perplexity": {"wikitext2": 9.0}, "zero_shot": {}}))
    run = read_run(tmp_path)
    assert (run.status, run.error, run.method.label, run.weights) == ("done", None, "checkpoint", 8)
    assert [score.value for score in run.scores] == [9.0]


def test_a_cut_off_file_makes_one_run_unreadable_and_hides_no_other(tmp_path: Path) -> None:
    broken = finished_run(tmp_path / "broken")
    (broken / "results.json").write_text('{"pruner": "wanda", "blo')
    strange = finished_run(tmp_path / "strange", {"blocks": [{"index": 0}]})
    finished_run(tmp_path / "whole")
    runs = {run.path.name: run for run in runs_of(tmp_path)}
    assert [runs[path.name].status for path in (broken, strange)] == ["unreadable"] * 2
    assert "results.json" in (runs["broken"].error or "")
    assert runs["whole"].status == "done"


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"perplexity.wikitext2": float("inf")}, {}),
        ({"zero_shot.piqa.acc,none": float("nan")}, {}),
        ({"seconds": "5 s"}, {}),
        ({"target_sparsity": {"blocks": 0.5}}, {}),
        ({"calibration.tokens_sha256": ["c0"]}, {}),
        ({"blocks": [block(0, loss=float("nan"))]}, {}),
        ({}, {"ignore": True}),
    ],
    ids=str,
)
def test_a_number_that_is_none_makes_one_run_unreadable_and_hides_no_other(changes, config, tmp_path: Path) -> None:
    """By hand or by another version: NaN had the best score's place, and a deviation of it ended every command."""
    finished_run(tmp_path / "strange", {**changes, "seed": 1}, config)
    finished_run(tmp_path / "whole")
    strange, whole = runs_of(tmp_path)
    assert (strange.status, whole.status) == ("unreadable", "done")
    assert cell(cells_of(tmp_path), "wikitext2").values == (20.0,)


def test_unfinished_runs_keep_their_status_and_error(tmp_path: Path) -> None:
    unfinished_run(tmp_path / "failed", status="failed", error="RunError: block 3, mlp.down_proj")
    unfinished_run(tmp_path / "gone", status="running")
    alive = unfinished_run(tmp_path / "alive", status="running")
    with locked(alive):
        runs = {run.path.name: run for run in runs_of(tmp_path)}
    states = {name: run.status for name, run in runs.items()}
    assert states == {"alive": "running", "failed": "failed", "gone": "interrupted (killed)"}
    assert "killed" in (runs["gone"].error or "")
    assert runs["failed"].error == "RunError: block 3, mlp.down_proj"


def test_a_cell_is_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, value in enumerate((10.0, 12.0, 17.0)):
        changes = {"seed": seed, "perplexity": {"wikitext2": value}, "calibration.tokens_sha256": f"c{seed}"}
        finished_run(tmp_path / str(seed), changes)
    found = cell(cells_of(tmp_path), "wikitext2")
    assert found.mean == pytest.approx(13.0)
    assert found.spread == pytest.approx(13**0.5)  # ((-3)^2 + (-1)^2 + 4^2) / 2
    assert found.text == "13.000 ± 3.606 (3)"


def test_the_mean_over_tasks_is_of_one_metric(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    found = cells_of(tmp_path)
    assert cell(found, "mean of 2 tasks acc").mean == pytest.approx(0.5)
    assert not [c for c in found if c.measure.label == "mean of 2 tasks acc_norm"]  # boolq has none


APART = {
    "evaluation tokens": ("wikitext2", {"provenance.perplexity.wikitext2.tokens_sha256": "ff" * 32}),
    "evaluation window": ("wikitext2", {"provenance.perplexity.wikitext2.seq_len": 1024}),
    "task version": ("piqa acc", {"provenance.zero_shot.tasks.piqa.version": 2.0}),
    "num_fewshot": ("piqa acc", {"provenance.zero_shot.tasks.piqa.num_fewshot": 5}),
    "questions": ("piqa acc", {"provenance.zero_shot.tasks.piqa.documents": 8}),
    "context": ("piqa acc", {"provenance.zero_shot.max_length": 512}),
    "task data": ("piqa acc", {"provenance.zero_shot.tasks.piqa.data": "mirror/piqa/test.jsonl sha256:12"}),
    "calibration size": ("wikitext2", {"calibration.num_samples": 64}),
    "calibration set": ("wikitext2", {"calibration.provenance.text_sha256": "cd" * 32}),
    "calibration tokens": ("wikitext2", {"calibration.tokens_sha256": "other"}),
    "weights in the blocks": ("wikitext2", {"blocks": [block(0)]}),
}


@pytest.mark.parametrize("facet", APART)
def test_a_score_measured_otherwise_stands_apart_with_the_reason(tmp_path: Path, facet: str) -> None:
    measure, changes = APART[facet]
    for number in range(2):
        finished_run(tmp_path / f"usual{number}", {"target_sparsity": 0.3 + number / 10})
    finished_run(tmp_path / "other", {"pruner": "magnitude", "target_sparsity": 0.3})
    finished_run(tmp_path / "odd", {"pruner": "sparsegpt", "target_sparsity": 0.3} | changes)
    apart = {c.measure.label: c.apart for c in cells_of(tmp_path) if c.method.pruner == "sparsegpt" and c.apart}
    assert apart[measure].startswith(facet + ":")
    assert not [c for c in cells_of(tmp_path) if c.apart and c.method.pruner != "sparsegpt"]


def test_a_dtype_of_its_own_stands_apart(tmp_path: Path) -> None:
    for number in range(2):
        finished_run(tmp_path / f"usual{number}", {"seed": number})
    finished_run(tmp_path / "odd", {"pruner": "magnitude"}, {"model": {"path": "tiny", "dtype": "bfloat16"}})
    assert (
        cell(cells_of(tmp_path), "wikitext2", "magnitude", apart=True).apart == "dtype: bfloat16 (the others: float32)"
    )


@pytest.mark.parametrize(
    ("config", "facet"),
    [
        ({"pruner": {"dense_targets": True}}, "loss against"),
        ({"pruner": {"scope": "pair"}}, "loss over"),
        ({"pruner": {"scope": "model"}}, "loss over"),
        ({"pruner": {"model": {"steps": 14}}}, "loss over"),
        ({"pruner": {"pruner": {"scope": "pair"}}}, "loss over"),
        ({"method": "magnitude+reconstruct"}, "loss against"),
    ],
)
def test_a_loss_against_other_targets_stands_apart_and_its_perplexity_does_not(
    tmp_path: Path, config: dict, facet: str
) -> None:
    for number in range(2):
        finished_run(tmp_path / f"usual{number}", {"seed": number})
    odd = config.get("method", "magnitude")
    finished_run(tmp_path / "odd", {"pruner": odd}, config)
    apart = {c.measure.label: c.apart for c in cells_of(tmp_path) if c.method.pruner == odd}
    assert apart["reconstruction loss"].startswith(f"{facet}: ")
    assert apart["wikitext2"] == ""


def test_runs_of_one_seed_with_other_calibration_tokens_are_not_averaged(tmp_path: Path) -> None:
    for name, tokens in (("a", "c0"), ("b", "c0"), ("odd", "c9")):
        finished_run(tmp_path / name, {"pruner": f"pruner_{name}", "calibration.tokens_sha256": tokens})
    assert [c.method.pruner for c in cells_of(tmp_path) if c.apart and c.measure.label == "wikitext2"] == ["pruner_odd"]


def test_two_models_of_one_name_are_not_averaged(tmp_path: Path) -> None:
    """As checkpoint-1000 of two trainings: each the name of a model in a folder of its own."""
    for number, weights in enumerate(["a", "a", "b", None]):
        folder = finished_run(tmp_path / str(number), {"seed": number, "calibration.tokens_sha256": f"c{number}"})
        tuned = {"model.safetensors": {"size": 1, "modified": number, "sha256": f"pruned {number}"}}
        dense = {"model.safetensors": tuned["model.safetensors"] | {"sha256": weights}}
        recorded = {"checkpoint": tuned} | (
            {"model.path": dense} if weights else {}
        )  # of the hub's nothing is recorded
        (folder / "inputs.json").write_text(json.dumps(recorded))
    runs = [read_run(folder) for folder in find_runs([str(tmp_path)])]
    apart = {entry.run: entry.apart for entry in entries(runs) if entry.measure.name == "wikitext2"}
    assert [bool(apart[number]) for number in range(4)] == [False, False, True, False]
    assert apart[2].startswith("weights' files: ")


def test_token_files_of_several_seeds_are_one_calibration_set(tmp_path: Path) -> None:
    for seed in (0, 1):
        file = f"tokens/model-7b/calibration-{seed}.safetensors"
        calibration = {"name": file, "num_samples": 4, "seq_len": 8, "tokens_sha256": f"c{seed}"}
        finished_run(tmp_path / str(seed), {"seed": seed, "calibration": calibration | {"provenance": {"file": file}}})
    assert len(cell(cells_of(tmp_path), "wikitext2").values) == 2


def test_dense_scores_need_no_calibration_set_in_common(tmp_path: Path) -> None:
    finished_run(tmp_path / "wanda")
    finished_run(tmp_path / "dense", {"pruner": "dense", "calibration.num_samples": 1, "target_sparsity": 0.0})
    assert cell(cells_of(tmp_path), "wikitext2", "dense").target == 0.0


def test_a_dense_model_scored_beside_pruned_ones_is_one_cell(tmp_path: Path) -> None:
    for seed in range(2):
        finished_run(tmp_path / str(seed), {"seed": seed, "dense": {"perplexity": {"wikitext2": 5.0}, "zero_shot": {}}})
    found = cell(cells_of(tmp_path), "wikitext2", "dense")
    assert (found.mean, found.spread, found.measured) == (5.0, None, 0.0)


def test_a_run_that_was_repeated_counts_once_as_it_finished_last(tmp_path: Path) -> None:
    for name, value, minute in (("old", 30.0, 1), ("new", 20.0, 2)):
        status = {"finished": f"2026-01-01T00:0{minute}:00+00:00"}
        finished_run(tmp_path / name, {"perplexity": {"wikitext2": value}}, status=status)
    found = cells_of(tmp_path)
    assert cell(found, "wikitext2").values == (20.0,)
    assert "new" in cell(found, "wikitext2", apart=True).apart


def test_other_settings_of_a_pruner_are_another_method() -> None:
    settings = {
        "_target_": "besa_exp.methods.pruners.besa.Besa",
        "granularity": "row",
        "epochs": 10,
        "seed": 3,
        "unknown": 1,
    }
    assert method_of("besa", {"pruner": settings}, "unstructured").label == "besa, epochs=10"
    assert method_of("wanda", {}, "2:4").label == "wanda, 2:4"
    tuned = {"pruner": {"tuning": {"epochs": 2, "seed": 3}}, "update": None}
    assert method_of("besa_reconstruct", tuned, "unstructured").variant == "tuning.epochs=2"
    assert method_of("wanda", {"compute_dtype": "bfloat16"}, "2:4").label == "wanda, 2:4, compute_dtype=bfloat16"
    assert method_of("wanda", {"compute_dtype": "auto"}, "2:4").label == "wanda, 2:4"
    without = {"pruner": {"start": 0, "tuning": {"checks": 1}}}
    assert method_of("best", without, "unstructured").label == "best, start=0, tuning.checks=1"
    combined = {"budget": {"width": 0.3}, "pruner": {}, "update": {"damping": 0.01}}
    assert method_of("owl+wanda+obs", combined, "unstructured").label == "owl+wanda+obs, width=0.3"
    command = "besa prune pruner=mine pruner.size=2 +pruner.more=a sparsity=0.3"
    assert method_of("mine", {"pruner": {"size": 2}}, "unstructured", command).label == "mine, size=2, more=a"
    assert method_of("wanda", {"pruner": {}, "ignore": ["0.*"]}, "2:4").label == "wanda, 2:4, ignore=0.*"
    assert method_of("../prune", {"pruner": {"epochs": 1}}, "unstructured").variant == ""


def test_a_preset_keeps_its_look_whatever_else_is_shown() -> None:
    besa, wanda, new = Method("besa"), Method("wanda"), Method("new")
    assert looks([besa, new, wanda])[wanda] == looks([wanda])[wanda]
    assert looks([besa, new, wanda])[new] == looks([new])[new]


def test_no_two_methods_look_alike() -> None:
    """All presets, and wanda with each budget and update, as `make budgets` draws them."""
    budgets = [Method(f"{budget}+wanda") for budget in presets("budget")]
    updates = [Method(f"wanda+{update}") for update in presets("update")]
    variants = [Method("besa", f"scope={scope}") for scope in ("pair", "sub_block", "model")]
    all_of_them = [*map(Method, presets("pruner")), *budgets, *updates, *variants]
    found = looks(all_of_them)
    assert len({(style.light, style.symbol) for style in found.values()}) == len(all_of_them)
    assert len({(style.light, style.marker) for style in found.values()}) == len(all_of_them)
    assert found[Method("owl+wanda")].light == found[Method("wanda")].light


def test_allocation_sums_linears_of_one_type_and_errors_go_along_depth(tmp_path: Path) -> None:
    experts = {f"mlp.experts.{i}.w1": {"weights": 10, "pruned": i, "sparsity": i / 10} for i in (2, 4)}
    finished_run(tmp_path / "a", {"blocks": [block(0) | {"linears": experts}]})
    finished_run(tmp_path / "b", {"model": "other", "seed": 0, "blocks": [block(0, loss=0.1), block(1, loss=0.3)]})
    finished_run(tmp_path / "c", {"model": "other", "seed": 1, "blocks": [block(0, loss=0.2), block(1, loss=0.3)]})
    runs = runs_of(tmp_path)
    assert allocation(runs[0]).counts == (((20, 6),),)
    (_, error) = sorted(errors_along_depth(runs, entries(runs)), key=lambda line: len(line.blocks))
    assert error.means == pytest.approx((0.15, 0.3))
    assert error.spreads == pytest.approx((0.005**0.5, 0.0))


def test_a_long_curve_is_thinned_and_says_so(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", steps=1300)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "block", "block": 0}\n{"kind": "step", "block": 0, "st')
    curve = read_curve(folder)
    assert curve.stride == 3
    assert [point[1] for point in curve.points] == list(range(0, 1300, 3))
    assert curve.points[1][3] == pytest.approx(1 / 4)


def paper_cell(folder: Path, title: str, row: str, model: str, pruner: str) -> Any:
    runs = runs_of(folder)
    (table,) = (t for t in paper_tables(runs, cells(runs, entries(runs))) if t.title == title)
    (one,) = (c for c in table.cells if (c.row, c.model, c.pruner) == (row, model, pruner))
    return one


def test_the_papers_table_shows_paper_ours_and_difference(tmp_path: Path) -> None:
    pruner = {"granularity": "row", "sparsity_step": 0.01}
    changes = {"model": "huggyllama/llama-7b", "pruner": "besa_paper", "perplexity": {"wikitext2": 7.0}}
    finished_run(tmp_path / "llama", changes, {"pruner": pruner})
    finished_run(tmp_path / "tiny")
    found = paper_cell(tmp_path, "WikiText-2 perplexity", "BESA row-wise", "LLaMA-7B", "besa_paper")
    assert (found.paper, found.ours, found.remark) == (6.86, 7.0, "")
    assert found.difference == pytest.approx(0.14)
    layer_wise = paper_cell(tmp_path, "WikiText-2 perplexity", "BESA layer-wise", "LLaMA-7B", "besa_paper")
    assert (layer_wise.paper, layer_wise.ours) == (7.04, None)
    assert paper_cell(tmp_path, "PTB perplexity", "Wanda", "LLaMA-7B", "wanda").paper == "not known to us"
    small = paper_cell(tmp_path, "WikiText-2 perplexity", "Wanda", "tiny", "wanda")
    assert (small.paper, small.ours, small.difference) == ("not in the paper", 20.0, None)


def test_the_papers_layer_wise_row_is_of_runs_with_targets_from_dense_inputs(tmp_path: Path) -> None:
    changes = {"model": "huggyllama/llama-7b", "pruner": "besa_paper", "perplexity": {"wikitext2": 7.5}}
    for dense_targets, expected in ((False, None), (True, 7.5)):
        pruner = {"granularity": "linear", "dense_targets": dense_targets}
        finished_run(tmp_path / str(dense_targets) / "run", changes, {"pruner": pruner})
        found = paper_cell(
            tmp_path / str(dense_targets), "WikiText-2 perplexity", "BESA layer-wise", "LLaMA-7B", "besa_paper"
        )
        assert found.ours == expected


def test_a_run_under_other_conditions_than_the_papers_says_which(tmp_path: Path) -> None:
    calibration = RESULTS["calibration"] | {"num_samples": 8}
    changes = {"model": "Llama-2-7b-hf", "calibration": calibration, "provenance.perplexity.wikitext2.seq_len": 512}
    finished_run(tmp_path / "run", changes)
    remark = paper_cell(tmp_path, "WikiText-2 perplexity", "Wanda", "Llama-2-7B", "wanda").remark
    assert remark == "calibrated on 8 x 2048 tokens of c4; windows of 512 tokens"


def test_the_published_figures_are_the_references(shared_dir: Path) -> None:
    text = (shared_dir / "reference" / "besa.md").read_text(encoding="utf-8")
    known = published()["cells"]["wikitext2"]["values"]
    assert all(f"{known[name][0]:.2f}" in text for name in known if "4" in name)  # in a sentence of their own
    for name, values in ((name, values) for name, values in known.items() if "4" not in name):
        row = re.search(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)
        assert row is not None, name
        assert [float(value) for value in row[1].split("|")] == values


class Outside(HTMLParser):
    """Every address that a page names, and the tags it has."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_no_text_of_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    plain, hostile = Outside(), Outside()
    plain.feed(page({"error": "none"}))
    text = page({"error": HOSTILE, HOSTILE: [HOSTILE]}, title=HOSTILE)
    hostile.feed(text)
    assert hostile.tags == plain.tags
    assert all(address.startswith(("#", "data:")) for address in plain.addresses)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == {"error": HOSTILE, HOSTILE: [HOSTILE]}


def test_markdown_shows_hostile_names_as_they_are(tmp_path: Path) -> None:
    unfinished_run(tmp_path / "run", status="failed", error="<b>|a_b\nc")
    runs = runs_of(tmp_path)
    assert "&lt;b&gt;\\|a_b c" in markdown(runs, [], "")


def test_markdown_shows_hostile_names_in_every_table_as_they_are(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", {"model": "models/<b>x"})
    runs = runs_of(tmp_path)
    found = cells(runs, entries(runs))
    paper = paper_markdown(paper_tables(runs, found))
    assert "&lt;b&gt;x" in paper
    assert "<b>" not in markdown(runs, found, paper)


def test_names_in_markdown_make_no_markup() -> None:
    assert escaped("a_b <i> & *x* [l](u) _y_ `q` c|d\n") == (
        "a_b &lt;i&gt; &amp; \\*x\\* \\[l](u) \\_y\\_ \\`q\\` c\\|d"
    )


def test_a_score_on_part_of_the_questions_enters_no_mean_over_tasks(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", {"provenance.zero_shot.tasks.piqa.questions": 1838})
    assert cell(cells_of(tmp_path), "piqa acc").mean == 0.6
    assert not [c for c in cells_of(tmp_path) if c.measure.label.startswith("mean of")]


def test_the_command_writes_page_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    uneven = [block(0, 0.3), block(1, 0.7)]
    finished_run(tmp_path / "sweep" / "besa", {"pruner": "besa", "blocks": uneven}, steps=5)
    unfinished_run(tmp_path / "sweep" / "failed", status="failed", error="RunError: no")
    assert main(["report", "sweep", "--out", "out"]) == 0
    assert "1 finished run, 1 not finished -> out/report.html" in capsys.readouterr().out
    figures = ("perplexity", "zero_shot", "reconstruction", "allocation", "loss_curves")
    drawn = {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "summary.csv",
        "summary.md",
        "summary.tex",
    } | drawn
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))
    assert [(row["status"], row["perplexity wikitext2"]) for row in rows] == [("done", "20.0"), ("failed", "")]


def test_of_a_path_a_methods_name_has_the_last_two_parts() -> None:
    assert (
        Method("wanda+full", "path=/home/me/text/wiki/a.txt, steps=2").label
        == "wanda+full, path=.../wiki/a.txt, steps=2"
    )
    assert Method("wanda+full", "path=wiki/a.txt").label == "wanda+full, path=wiki/a.txt"


def test_a_dtype_that_was_left_to_the_checkpoint_is_the_one_it_had(tmp_path: Path) -> None:
    for seed, (asked, had) in enumerate([("float32", "float32"), ("auto", "float32"), ("auto", "bfloat16")]):
        changes = {"seed": seed, "cost": {"dtype": had}, "perplexity": {"wikitext2": 20.0 + seed}}
        finished_run(tmp_path / str(seed), changes, {"model": {"dtype": asked}})
    assert cell(cells_of(tmp_path), "wikitext2").values == (20.0, 21.0)


def test_a_tuned_folder_has_no_loss_of_its_blocks_and_losses_of_nothing_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned folder's loss of 0 stood before all pruners'."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    finished_run(
        tmp_path / "runs" / "tuned", {"pruner": "wanda+lora", "blocks": [block(0, loss=0.0)]}, {"checkpoint": "W"}
    )
    assert {entry.measure.kind for entry in entries(runs_of(tmp_path))} == {"perplexity", "zero_shot"}
    finished_run(tmp_path / "runs" / "none", {"target_sparsity": 0.0, "blocks": [block(0, 0.0, loss=0.0)]})
    assert main(["report", "runs", "--out", "out"]) == 0


def test_the_losses_of_blocks_are_not_those_of_a_model_that_was_tuned_afterwards(tmp_path: Path) -> None:
    """They stood beside its name as if the tuning had left them."""
    finished_run(tmp_path / "tuned", {"pruner": "wanda+full"}, {"recovery": {"name": "full", "steps": 8}})
    assert {entry.measure.kind for entry in entries(runs_of(tmp_path))} == {"perplexity", "zero_shot"}


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_records_of_a_study_stay_until_the_same_run_is_made_again(tmp_path: Path) -> None:
    def request(record: dict[str, Any]) -> tuple:
        return record["method"], record["seed"]

    kept = tmp_path / "results.json"
    old = [{"method": "wanda", "seed": seed, "perplexity": 7.0} for seed in (1, 0)]
    assert kept_records(kept, old, request) == old[::-1]
    new = [{"method": "wanda", "seed": 1, "perplexity": 8.0}, {"method": "besa", "seed": 0, "perplexity": None}]
    assert kept_records(kept, new, request) == [new[1], old[1], new[0]] == json.loads(kept.read_text())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0, 3.0], "2.00 ± 1.00"),
        ([1.0, None, 3.0], "2.00 ± 1.41 (2)"),
        ([4.0], "4.00 (1)"),
        ([1234.4, 1234.4, 1234.4], "1234 ± 0"),
        ([None], "n/a"),
        ([], "n/a"),
    ],
)
def test_a_cell_of_a_study_tells_its_spread_and_missing_seeds(values: list[float | None], text: str) -> None:
    assert over_seeds(values, 2) == text


def test_reading_runs_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    code = "import sys, besa_exp.report.command; sys.exit(bool({'torch', 'hydra', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


STRUCTURE = {
    "method": "by_hand",
    "num_blocks": 3,
    "weights": {"dense": 2 * sum(LINEARS.values()), "left": sum(LINEARS.values())},
    "blocks": [{"kind": "removed", "index": 1, "parameters": 9}],
}


def test_a_run_that_removed_a_block_is_compared_by_the_weights_of_its_dense_model(tmp_path: Path) -> None:
    for number in range(2):
        finished_run(tmp_path / f"usual{number}", {"seed": number})
    changes = {"pruner": "magnitude", "structure": STRUCTURE, "parameters": {"dense": 100, "left": 91}}
    finished_run(tmp_path / "odd", changes | {"blocks": [block(2, loss=0.04)]})
    run = read_run(tmp_path / "odd")
    assert run.stages["Removed whole"].startswith("1 of 3 blocks (index 1)")
    assert run.parameters == Size(100, 91)
    assert cell(cells_of(tmp_path), "wikitext2", "magnitude").apart == ""
    assert read_run(tmp_path / "usual0").parameters is None


def test_losses_along_depth_are_those_of_the_same_block_of_the_dense_model(tmp_path: Path) -> None:
    parameters = {"structure": STRUCTURE, "parameters": {"dense": 100, "left": 91}}
    finished_run(tmp_path / "first", {"seed": 0, "blocks": [block(0, loss=0.1), block(1, loss=0.2)]})
    finished_run(tmp_path / "second", {"seed": 1, "blocks": [block(0, loss=0.3), block(2, loss=0.4)]} | parameters)
    runs = [read_run(tmp_path / name) for name in ("first", "second")]
    (errors,) = errors_along_depth(runs, entries(runs))
    assert errors.blocks == (0, 1, 2)
    assert errors.means == pytest.approx((0.2, 0.2, 0.4))
