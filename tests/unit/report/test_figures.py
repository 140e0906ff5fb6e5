"""Figures: what is drawn where, and that no legend hides a point."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from run_folders import block, finished_run

from besa_exp.presets import presets
from besa_exp.report.figures import LOOK, figure_of, panels_of
from besa_exp.report.panels import pareto
from besa_exp.report.read import read_report

mpl = pytest.importorskip("matplotlib")
pyplot = pytest.importorskip("matplotlib.pyplot")
mpl.use("Agg")


LONG_NAME = "a-model-of-thirteen-billion-weights-instruct-v0.3"


def figures(place: Path) -> dict[str, Any]:
    report = read_report([str(place)])
    with mpl.rc_context(LOOK):  # as they are saved
        return {name: figure_of(panels, report.looks) for name, panels in panels_of(report).items() if panels}


@pytest.fixture(scope="module", params=[1, 3])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of every preset, laid out, at one target and at three; one method is far off, one has a long name."""
    folder = tmp_path_factory.mktemp("runs")
    for number, pruner in enumerate([*presets("pruner"), "owl+wanda+a_method_with_a_rather_long_name"]):
        for target in (0.5, 0.6, 0.7)[: request.param]:
            value = 5000.0 if pruner == "magnitude" else 12.0 + number * target
            changes = {"pruner": pruner, "target_sparsity": target, "measured_sparsity": target, "model": LONG_NAME}
            changes |= {"perplexity": {"wikitext2": value}, "seconds.prune": 1.0 + number}
            changes |= {"dense": {"perplexity": {"wikitext2": 10.0}, "zero_shot": {"piqa": {"acc_norm,none": 0.8}}}}
            if pruner == "dense":
                changes |= {"target_sparsity": 0.0, "measured_sparsity": 0.0}
            finished_run(
                folder / f"{pruner}-{target}", changes | {"blocks": [block(0, target - 0.1), block(1, target)]}
            )
    found = figures(folder)
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def test_no_legend_lies_over_a_panel_and_every_point_within_its_own(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        boxes = [axes.get_window_extent() for axes in figure.axes]
        for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]:
            own = legend.get_window_extent()
            assert not any(own.overlaps(box) for box in boxes), name
            assert own.x0 >= 0
            assert own.x1 <= figure.bbox.x1, name
        for axes, box in zip(figure.axes, boxes, strict=True):
            for line in axes.lines:
                points = axes.transData.transform(line.get_xydata()) if line.get_transform() == axes.transData else []
                assert all(box.padded(2).contains(x, y) for x, y in points), (name, line)
    pyplot.close("all")


def test_every_method_that_has_a_score_is_named_in_the_figure(drawn: dict[str, Any]) -> None:
    figure = drawn["perplexity"]
    named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    named |= {label.get_text() for axes in figure.axes for label in axes.get_yticklabels()}
    assert named >= {"besa", "best", "magnitude", "owl+wanda+a_method_with_a_rather_long_name", "dense"}


def test_nothing_is_cut_off_at_the_edge(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        tight = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert tight.x0 >= -0.02, name
        assert tight.y0 >= -0.02, name
        assert tight.x1 <= width + 0.02, name
        assert tight.y1 <= height + 0.02, name


def test_no_title_runs_into_another(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        titles = [axes.title if axes.title.get_text() else axes._left_title for axes in figure.axes]
        boxes = [title.get_window_extent() for title in titles if title.get_text()]
        assert boxes, name
        assert not any(box.overlaps(other) for box, other in combinations(boxes, 2)), name


def test_the_front_is_what_nothing_beats_in_time_and_score() -> None:
    assert pareto([(1, 9), (2, 5), (3, 7), (2, 6), (4, 4), (5, 4)]) == [(1, 9), (2, 5), (4, 4)]


def test_methods_of_one_target_are_sorted_with_the_best_on_top(tmp_path: Path) -> None:
    for pruner, value in (("besa", 12.0), ("wanda", 30.0), ("sparsegpt", 14.0)):
        finished_run(tmp_path / pruner, {"pruner": pruner, "perplexity": {"wikitext2": value}})
    (axes,) = figures(tmp_path)["perplexity"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["besa", "sparsegpt", "wanda"]
    assert axes.yaxis_inverted()
    pyplot.close("all")


def test_a_dense_model_alone_is_not_drawn(tmp_path: Path) -> None:
    finished_run(
        tmp_path / "dense", {"pruner": "dense", "target_sparsity": 0.0, "measured_sparsity": 0.0, "blocks": []}
    )
    assert not {"perplexity", "zero_shot"} & figures(tmp_path).keys()
