"""Which change of a file makes a run folder the answer to something else."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import finished_run, unfinished_run

from besa_exp.run_folder import inputs as input_files
from besa_exp.run_folder.inputs import check_run_inputs, fingerprint, write_inputs
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings


@pytest.fixture
def asked(tmp_path: Path) -> RunSettings:
    """A run whose model, calibration text, perplexity set and mirror are files here."""
    (tmp_path / "model").mkdir()
    (tmp_path / "mirror" / "piqa").mkdir(parents=True)
    for name in ("model/model.safetensors", "model/config.json", "text.txt", "set.txt", "mirror/piqa/validation.jsonl"):
        (tmp_path / name).write_text(f"first {name}")
    evaluator = EvaluatorSettings("quick", (str(tmp_path / "set.txt"),), tasks=("piqa",), data_dir=f"{tmp_path}/mirror")
    calibration = CalibrationSettings("local", str(tmp_path / "text.txt"))
    tracker = TrackerSettings("none")
    return RunSettings(ModelSettings("m", f"{tmp_path}/model"), calibration, None, "wanda", evaluator, tracker)


@pytest.fixture
def done(asked: RunSettings, tmp_path: Path) -> Path:
    """The folder of its finished run."""
    folder = finished_run(tmp_path / "run", {"perplexity": {str(tmp_path / "set.txt"): 3.0}})
    write_inputs(folder, fingerprint(asked))
    return folder


CHANGED = {
    "model/model.safetensors": "model.path=",
    "model/config.json": "model.path=",
    "text.txt": "calibration.path=",
    "set.txt": "evaluator.perplexity_sets=",
    "mirror/piqa/validation.jsonl": "evaluator.data_dir=",
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("text", ["Other", "longer than before"])
def test_a_finished_run_is_no_answer_to_a_changed_input_which_is_named(
    name: str, text: str, asked: RunSettings, done: Path, tmp_path: Path
) -> None:
    assert check_run_inputs(done, asked) == []
    before = (tmp_path / name).stat()
    (tmp_path / name).write_text(text + (tmp_path / name).read_text()[len("first") :])
    if text == "Other":  # of the same size, and as old
        os.utime(tmp_path / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    (problem,) = check_run_inputs(done, asked)
    assert problem.startswith(f"{done} holds a finished run of other inputs: {CHANGED[name]}{tmp_path}")
    assert f"{Path(name).name}: {before.st_size} bytes of" in problem
    assert "overwrite=true" in problem


def test_a_finished_run_is_no_answer_to_changed_code_of_a_method_of_ones_own(
    asked: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_method_elsewhere.py").write_text("then")
    asked = replace(asked, pruner={"_target_": "besa_exp.methods.pruners.uniform.Uniform"}, update=None)
    asked = replace(asked, budget={"by": {"_target_": "a_method_elsewhere.Mine"}})
    folder = finished_run(tmp_path / "run", {})
    write_inputs(folder, fingerprint(asked))
    assert check_run_inputs(folder, asked) == []
    (tmp_path / "a_method_elsewhere.py").write_text("now")
    (problem,) = check_run_inputs(folder, asked)
    assert "of other inputs: the code of budget has changed (a_method_elsewhere.py: 4 bytes of" in problem


def test_a_copy_of_the_same_content_a_further_readme_and_a_missing_text_change_nothing(
    asked: RunSettings, done: Path, tmp_path: Path
) -> None:
    for name in CHANGED:
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "model" / "README.md").write_text("new")
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    (tmp_path / "text.txt").unlink()
    assert check_run_inputs(done, asked) == []
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is new" in check_run_inputs(done, asked)[0]


def test_a_large_file_is_not_read_where_size_and_time_are_the_same_and_by_pieces_where_not(
    asked: RunSettings, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"SMALL": 100, "HASHED_WHOLE": 200, "PIECES": 8, "PIECE": 10}.items():
        monkeypatch.setattr(input_files, name, size)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(bytes(1000))
    write_inputs(done, fingerprint(asked))
    os.utime(file, (1, 1))
    assert check_run_inputs(done, asked) == []
    file.write_bytes(bytes(990) + b"x" * 10)
    assert "model.safetensors: 1,000 bytes" in check_run_inputs(done, asked)[0]
    write_inputs(done, fingerprint(asked))
    monkeypatch.setattr(input_files, "_sha256", lambda file: "read")
    assert "model.safetensors" not in check_run_inputs(done, asked)[0]  # the small ones are read all the same


def test_an_unfinished_run_is_held_to_what_its_blocks_and_scores_were_made_from(
    asked: RunSettings, tmp_path: Path
) -> None:
    folder = unfinished_run(tmp_path / "run", status="failed")
    write_inputs(folder, fingerprint(asked))
    for name in ("text.txt", "set.txt"):
        (tmp_path / name).write_text("mended")
    assert check_run_inputs(folder, asked) == []  # nothing was kept yet
    (folder / "blocks").mkdir()
    (folder / "blocks" / "identity.json").write_text("{}")
    assert check_run_inputs(folder, asked) == []
    (folder / "blocks" / "000000.json").write_text("{}")
    (problem,) = check_run_inputs(folder, asked)
    assert "an unfinished run" in problem
    assert "calibration.path" in problem
    assert "perplexity_sets" not in problem
    (folder / "scores.json").write_text(json.dumps({"dense": {"perplexity": {str(tmp_path / "set.txt"): [1, {}]}}}))
    assert "perplexity_sets" in check_run_inputs(folder, asked)[0]


def test_a_set_that_was_not_to_be_had_may_be_mended_and_folders_without_inputs_json_stay_usable(
    asked: RunSettings, done: Path, tmp_path: Path
) -> None:
    results = json.loads((done / "results.json").read_text())
    (done / "results.json").write_text(json.dumps(results | {"perplexity": {str(tmp_path / "set.txt"): None}}))
    (tmp_path / "set.txt").write_text("mended")
    assert check_run_inputs(done, asked) == []
    (tmp_path / "text.txt").write_text("another")
    assert len(check_run_inputs(done, asked)) == 1
    for text in ("{", '{"calibration.path": {"text.txt": 1}}'):
        (done / "inputs.json").write_text(text)
        assert check_run_inputs(done, asked) == []
    (done / "inputs.json").unlink()
    assert check_run_inputs(done, asked) == []
