"""W&B holds what metrics.jsonl holds, and cannot hold up a run."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from wandb_file import history, one, step_metrics, summary

from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.display.tracker import start_tracker
from besa_exp.evaluation.score import Scores
from besa_exp.run_folder.folder import RunFolder
from besa_exp.run_folder.status import write_status
from besa_exp.settings import TrackerSettings

ROOT = Path(__file__).parents[3]
SETTINGS = TrackerSettings("wandb", project="a-project", group="sweep-7", tags=("first", "second"))
CONFIG = {"sparsity": 0.5, "model": {"path": "/home/somebody/tiny", "hf_token": "s3cr3t-value"}}
SPEED = {"model": "simulated, not measured", "linears": {"mlp.up_proj": {"dense_cycles": 9.0, "speed_up": None}}}
REASON = {"ptb": "no network"}
PRUNED = Scores.from_dict(
    {"perplexity": {"embedded": 12.5, "ptb": None}, "zero_shot": {"piqa": {"acc,none": 0.625, "acc_stderr,none": 0.25}}}
    | {"unavailable": REASON, "simulated_speed": SPEED, "texts": {"Once": "ape"}}
)
DENSE = Scores.from_dict(
    {
        "perplexity": {"embedded": 11.25, "ptb": None},
        "zero_shot": {"piqa": {"acc,none": 0.75}},
        "unavailable": REASON,
        "texts": {"Once": "upon"},
    }
)
UNTUNED = Scores.from_dict({"perplexity": {"embedded": 14.5}})
STEPS_PER_BLOCK = 3


def steps(block: int) -> list[Step]:
    losses = [(0.5 / (block + number + 1), 0.1 / (number + 1)) for number in range(STEPS_PER_BLOCK)]
    return [Step(block, i, rec + pen, rec, pen, 0.5 + pen / 7) for i, (rec, pen) in enumerate(losses)]


def report(block: int) -> BlockReport:
    linears = (
        LinearReport("self_attn.q_proj", 64, 30 + block, 0.47 + block / 64),
        LinearReport("mlp.down_proj", 192, 100 - block, 0.52 - block / 192),
    )
    losses = {"loss_before": 0.3 / (block + 1), "loss_after": 0.2 / (block + 1)}
    return BlockReport(block, linears, **losses, seconds=1.5, steps=tuple(steps(block)))


REPORTS = [report(block) for block in range(2)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of two blocks, tracked offline."""
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, RunFolder.open(path) as folder:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / name))
        patch.setattr("sys.argv", ["besa", "prune", "model.path=/home/somebody/tiny"])
        write_status(path, "running", "now")
        packages = {"torch": "2"}
        folder.write_environment({"packages": packages, "python": "3", "git_commit": "abc", "device_name": "a chip"})
        tracker = start_tracker(SETTINGS, path, CONFIG, "tiny-besa-0.5", "besa")
        for block in REPORTS:
            for step in steps(block.index):
                folder.log_step(step)
            folder.log_block(block)
            tracker.log_block(block)
        folder.log_scores("dense", DENSE)
        folder.log_scores("pruned", PRUNED)
        tracker.log_scores(PRUNED, DENSE, UNTUNED)
        tracker.finish()
        yield path


def metrics(path: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_every_step_of_metrics_jsonl_is_in_the_history_over_one_counter(tracked: Path) -> None:
    expected = [
        {
            "optimisation_step": number,
            "step/block": line["block"],
            **{f"step/{name}": line[name] for name in ("loss", "reconstruction", "penalty", "expected_sparsity")},
        }
        for number, line in enumerate(metrics(tracked, "step"))
    ]
    assert len(expected) == 2 * STEPS_PER_BLOCK
    assert [line for line in history(tracked) if "step/loss" in line] == expected


def test_every_block_of_metrics_jsonl_is_in_the_history(tracked: Path) -> None:
    expected = [
        {
            "block": line["block"],
            "block/reconstruction_loss": line["reconstruction_loss"],
            "block/reconstruction_loss_start": line["reconstruction_loss_before"],
        }
        for line in metrics(tracked, "block")
    ]
    assert len(expected) == 2
    found = history(tracked)
    assert [line for line in found if "block/reconstruction_loss" in line] == expected
    assert [line for line in found if "allocated/mlp.down_proj" in line] == [
        {"block": line["block"], **{f"allocated/{name}": own["allocated"] for name, own in line["linears"].items()}}
        for line in metrics(tracked, "block")
    ]


def test_a_series_that_says_nothing_is_not_drawn(tmp_path: Path) -> None:
    """Of a method that prunes every linear alike, and of a loss with one term."""
    tracker = start_tracker(SETTINGS, tmp_path, CONFIG, "a-run", "wanda")
    for block in range(2):
        course = (Step(block, 0, 0.5, 0.5, 0.0, 0.5), Step(block, 1, 0.4, 0.4, 0.0, 0.5))
        alike = tuple(LinearReport(name, 8, 4, 0.5) for name in ("mlp.up_proj", "mlp.down_proj"))
        tracker.log_block(BlockReport(block, alike, 0.25, 0.25, 1.0, course))
    tracker.finish()
    drawn = {key for line in history(tmp_path) for key in line if "sparsity/" not in key}
    counters = {"block", "optimisation_step", "step/block"}
    assert drawn == {*counters, "step/loss", "block/reconstruction_loss"}


def test_experts_of_a_mixture_are_one_curve_their_mean_weighted_by_weights(tmp_path: Path) -> None:
    experts = [LinearReport(f"mlp.experts.{n}.down_proj", weights, 1, 0.5 * n) for n, weights in ((0, 10), (1, 30))]
    blocks = [BlockReport(0, (LinearReport("self_attn.q_proj", 8, 1, 0.25), *experts), 0.1, 0.1, 1.0, ())]
    tracker = start_tracker(SETTINGS, tmp_path, CONFIG, "a-run", "besa")
    tracker.log_block(blocks[0])
    tracker.finish()
    allocated = {key: value for row in history(tmp_path) for key, value in row.items() if key.startswith("allocated/")}
    assert allocated == {"allocated/self_attn.q_proj": 0.25, "allocated/mlp.experts.down_proj": 0.375}


def test_curves_are_drawn_over_block_and_step_counter(tracked: Path) -> None:
    over_blocks = dict.fromkeys(("block/*", "allocated/*", "rows/*"), "block")
    over_steps = {"step/*": "optimisation_step", "recovery/*": "recovery_step"}
    assert step_metrics(tracked) == over_steps | over_blocks


def test_scores_are_logged_once_and_summary_values_with_reasons_for_what_is_missing(tracked: Path) -> None:
    found = summary(tracked)
    (logged,) = [line for line in history(tracked) if "perplexity/embedded" in line]
    assert logged == {
        "perplexity/embedded": 12.5, "zero_shot/piqa/acc": 0.625,
        "dense/perplexity/embedded": 11.25, "dense/zero_shot/piqa/acc": 0.75,
        "before/perplexity/embedded": 14.5,
    }  # fmt: skip
    assert found["zero_shot/piqa/acc_stderr"] == 0.25
    for line in metrics(tracked, "scores"):
        prefix = "dense/" if line["which"] == "dense" else ""
        assert found[f"{prefix}perplexity/embedded"] == line["perplexity"]["embedded"]
        assert found[f"{prefix}zero_shot/piqa/acc"] == line["zero_shot"]["piqa"]["acc,none"]
        assert found[f"{prefix}unavailable/ptb"] == "no network"
        assert f"{prefix}perplexity/ptb" not in found
    assert found["simulated_speed/mlp.up_proj/dense_cycles"] == 9
    assert "simulated_speed/mlp.up_proj/speed_up" not in found
    assert found["measured_sparsity"] == (30 + 31 + 100 + 99) / 512


def test_the_run_has_its_config_masked_and_its_name_tags_and_group(tracked: Path) -> None:
    run = one(tracked, "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["method"], config["sparsity"]) == ("besa", 0.5)
    assert config["model"] == {"name": "tiny", "path": "tiny", "hf_token": "***"}
    assert config["command"] == "besa prune model.path=tiny"
    assert (config["commit"], config["device_name"], config["versions"]["torch"]) == ("abc", "a chip", "2")
    assert (run.project, run.display_name, run.run_group) == ("a-project", "tiny-besa-0.5", "sweep-7")
    assert list(run.tags) == ["first", "second", "besa"]
    assert run.run_id == (tracked / "wandb" / "run_id").read_text()
    assert one(tracked, "exit").exit_code == 0


def test_wandbs_own_name_and_kind_of_job_win_over_the_runs_and_the_machine_is_watched_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_JOB_TYPE", "ablation")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    tracker = start_tracker(replace(SETTINGS, system_metrics=True), tmp_path, CONFIG, "tiny-besa-0.5", "besa")
    settings = tracker._run.settings
    tracker.finish()
    run = one(tmp_path, "run")
    assert (run.display_name, run.job_type) == ("mine", "ablation")
    assert (settings.x_disable_stats, settings.x_disable_machine_info) == (False, False)
    assert not run.HasField("git")  # the machine's load is asked for, not where the code came from
    assert not [*tmp_path.rglob("wandb-metadata.json")]


def test_the_table_and_the_heat_map_of_sparsity_lie_in_the_run_folder(tracked: Path) -> None:
    assert one(tracked, "exit")  # all is written
    (texts,) = tracked.glob("wandb/offline-run-*/files/media/table/texts_*.json")
    assert json.loads(texts.read_text())["data"] == [["Once", "upon", "ape"]]
    (table,) = tracked.glob("wandb/offline-run-*/files/media/table/sparsity/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["block", "linear", "weights", "pruned", "sparsity", "allocated"]
    expected = [
        [line["block"], name, *(linear[key] for key in ("weights", "pruned", "sparsity", "allocated"))]
        for line in metrics(tracked, "block")
        for name, linear in line["linears"].items()
    ]
    assert content["data"] == expected
    (picture,) = tracked.glob("wandb/offline-run-*/files/media/images/**/*.png")
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**20) or []) > 20


def test_no_secret_and_nothing_of_the_machine_is_kept(tracked: Path) -> None:
    assert one(tracked, "exit")  # all is written
    files = [path for path in (tracked / "wandb").rglob("*") if path.is_file()]
    assert not any(word in path.read_bytes() for path in files for word in (b"s3cr3t-value", b"somebody"))
    assert not {"requirements.txt", "wandb-metadata.json", "diff.patch", "output.log"} & {path.name for path in files}
    run = one(tracked, "run")
    assert socket.gethostname() != run.host
    assert not run.HasField("git")


def test_the_global_random_state_is_left_as_it_was(tracked: Path) -> None:
    state = random.getstate()
    start_tracker(SETTINGS, tracked / "again", {}, "name", "besa").finish()
    assert random.getstate() == state


def test_a_second_start_in_one_folder_goes_on_with_the_same_run_and_another_folder_is_another(tmp_path: Path) -> None:
    for folder in ("one", "one", "two"):
        start_tracker(SETTINGS, tmp_path / folder, {}, "name", "besa").finish(failed=folder == "two")
    ids = {path: (tmp_path / path / "wandb" / "run_id").read_text() for path in ("one", "two")}
    assert [path.name for path in tmp_path.glob("one/wandb/*/*.wandb")] == [f"run-{ids['one']}.wandb"]
    assert ids["one"] != ids["two"]
    assert one(tmp_path / "two", "exit").exit_code == 1


@pytest.mark.parametrize("settings", [TrackerSettings("none"), TrackerSettings("wandb", mode="disabled")])
def test_no_tracker_leaves_no_trace(tmp_path: Path, settings: TrackerSettings) -> None:
    tracker = start_tracker(settings, tmp_path, CONFIG, "name", "besa")
    tracker.log_block(REPORTS[0])
    tracker.log_scores(PRUNED)
    tracker.finish()
    assert tracker._run is None
    assert list(tmp_path.iterdir()) == []


def test_row_sparsities_are_a_histogram_for_each_type_of_linear_over_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    tracker = start_tracker(SETTINGS, tmp_path, CONFIG, "tiny-besa-0.5", "besa")
    tracker.log_rows(
        1, {"mlp.experts.0.w1": [0.1, 0.5], "mlp.experts.1.w1": [0.5], "mlp.gate": [0.25, 0.5], "mlp.w2": [0.5, 0.5]}
    )
    tracker.finish()
    (line,) = [line for line in history(tmp_path) if any(key.startswith("rows/") for key in line)]
    assert line["block"] == 1
    drawn = {key: values for key, values in line.items() if key.endswith("|values")}
    assert sorted(sum(values) for values in drawn.values()) == [
        2,
        3,
    ]  # experts of a type are one; of w2 all rows are alike
    assert step_metrics(tmp_path)["rows/*"] == "block"
