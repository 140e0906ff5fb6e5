"""`besa_exp.load_run` and `load_runs`: run folders as values and tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_folders import finished_run, unfinished_run

import besa_exp
from besa_exp.errors import ConfigurationError


def test_each_run_is_a_row(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", {"pruner": "owl+wanda+obs", "seed": 3})
    finished_run(tmp_path / "b")
    unfinished_run(tmp_path / "c", status="failed", error="out of memory")
    table = besa_exp.load_runs(tmp_path).to_pandas()
    assert table.status.tolist() == ["done", "done", "failed"]
    assert table.loc[0, ["method", "pruner", "update", "budget", "seed"]].tolist() == [
        "owl+wanda+obs", "wanda", "obs", "owl", 3
    ]  # fmt: skip
    assert table.loc[1, ["perplexity wikitext2", "piqa acc", "piqa acc_stderr", "prune_seconds"]].tolist() == [
        20.0, 0.6, 0.1, 2.0
    ]  # fmt: skip
    assert table.loc[2].isna()["perplexity wikitext2"]


def test_sets_of_one_file_name_have_columns_of_their_own(tmp_path: Path) -> None:
    finished_run(tmp_path / "both", {"perplexity": {"wiki/test.txt": 3.0, "c4/test.txt": 7.0}})
    finished_run(
        tmp_path / "one", {"perplexity": {"ptb/test.txt": 5.0}, "dense": {"perplexity": {"ptb/test.txt": 4.0}}}
    )
    table = besa_exp.load_runs(tmp_path).to_pandas().set_index("folder")
    assert table.filter(like="perplexity").loc[str(tmp_path / "both")].dropna().to_dict() == {
        "perplexity wiki/test.txt": 3.0, "perplexity c4/test.txt": 7.0
    }  # fmt: skip
    assert table.loc[str(tmp_path / "one"), ["perplexity ptb/test.txt", "dense perplexity ptb/test.txt"]].tolist() == [
        5.0, 4.0
    ]  # fmt: skip
    row = besa_exp.load_run(tmp_path / "one").row()
    assert (row["perplexity test.txt"], row["dense perplexity test.txt"]) == (5.0, 4.0)


def test_a_row_tells_settings_that_are_not_the_presets_own(tmp_path: Path) -> None:
    for epochs in (1, 3):
        finished_run(tmp_path / str(epochs), {"pruner": "besa"}, {"pruner": {"epochs": epochs}})
    assert besa_exp.load_runs(tmp_path).to_pandas().variant.tolist() == ["", "epochs=3"]


def test_a_row_has_the_stages_beside_the_block_loop(tmp_path: Path) -> None:
    stages = {"parameters": {"dense": 100, "left": 75}, "recovery": {"loss": {"before": 3.0, "after": 2.5}}}
    finished_run(tmp_path / "a", {"pruner": "shortgpt+mine+full", "ignore": ["0.*"], **stages})
    row = besa_exp.load_run(tmp_path / "a").row()
    assert (row["structure"], row["pruner"], row["recovery"], row["ignore"]) == (
        "shortgpt", "shortgpt+mine+full", "full", "0.*"
    )  # fmt: skip
    assert (row["parameters_left"], row["recovery_loss_before"], row["recovery_loss_after"]) == (0.75, 3.0, 2.5)


def test_a_row_has_what_the_model_costs(tmp_path: Path) -> None:
    cost = {"parameters": 80, "bytes": 160, "dtype": "float16", "decode_tokens_per_second": {"1": 9.0, "8": 50.0}}
    row = besa_exp.load_run(finished_run(tmp_path / "a", {"cost": cost})).row()
    assert (row["bytes"], row["decode_tokens_per_second_8"]) == (160, 50.0)
    assert "dtype" not in row


def test_patterns_and_single_runs_are_found(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        finished_run(tmp_path / name)
    assert [run.folder.name for run in besa_exp.load_runs(f"{tmp_path}/a*")] == ["a1", "a2"]
    assert len(besa_exp.load_runs([tmp_path / "a1", tmp_path / "b1"])) == 2
    assert besa_exp.load_runs(tmp_path)[1:].runs[0].folder.name == "a2"
    assert besa_exp.load_run(tmp_path / "b1").sparsity == 0.5


def test_the_linears_and_steps_of_a_run_are_tables(tmp_path: Path) -> None:
    run = besa_exp.load_run(finished_run(tmp_path / "a", steps=4))
    assert run.to_pandas().groupby("block").size().tolist() == [3, 3]
    assert run.steps()["step"].tolist() == [0, 1, 2, 3]
    assert run.masks() == {}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run folder"):
        besa_exp.load_run(tmp_path)
    with pytest.raises(ConfigurationError, match="no run in it"):
        besa_exp.load_runs(tmp_path)
    broken = finished_run(tmp_path / "broken")
    (broken / "results.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"results\.json cannot be read"):
        besa_exp.load_run(broken)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "{"),
        ("results.json", "[]"),
        ("config.yaml", "model: {"),
        ("config.yaml", b"\xff".decode("latin1")),
    ],
)
def test_a_run_that_cannot_be_read_hides_no_other(name: str, text: str, tmp_path: Path) -> None:
    (finished_run(tmp_path / "a") / name).write_text(text, encoding="latin1")
    finished_run(tmp_path / "b")
    table = besa_exp.load_runs(tmp_path).to_pandas()
    assert table.status.tolist() == ["unreadable", "done"]
    assert table["perplexity wikitext2"].tolist()[1] == 20.0


def test_without_pandas_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = besa_exp.load_run(finished_run(tmp_path / "a"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match="pip install pandas"):
        run.to_pandas()
