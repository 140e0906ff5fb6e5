"""A run that is cut off at any moment goes on with the same command and ends as if it never had been. End to end
because it is cut off by signals, full disks and changed files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ready_process import BESA, run_ready
from resumed_runs import BLOCKS, assert_equal_runs, killed, metrics_of, results_of
from safetensors.torch import load_file, save_file

from besa_exp.cli.main import main

KILLS = 10


def assert_equal_tensors(streamed: Path, whole: Path) -> None:
    expected = load_file(whole / "model" / "model.safetensors")
    index = json.loads((streamed / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: load_file(streamed / "model" / file)[name] for name, file in index.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def interrupted(arguments: list[str], folder: Path, number: int, finished: int = 2) -> subprocess.CompletedProcess[str]:
    """A run that is sent a signal once `finished` blocks are on the disk."""
    last = f"/blocks/{finished - 1:06}.json"
    return run_ready("signalled_run.py", str(int(number)), last, BESA, *arguments, f"hydra.run.dir={folder}")


def test_a_run_killed_ten_times_ends_with_the_bytes_of_an_unbroken_one(request_arguments, unbroken, tmp_path):
    folder, chance = tmp_path / "run", random.Random(0)
    seconds = json.loads((unbroken / "results.json").read_text())["seconds"]["total"]
    moments = [{"after": chance.uniform(0, seconds / 2), "in_a_write": number % 3 == 2} for number in range(KILLS)]
    for number in range(1, BLOCKS):  # so that a slow machine gets somewhere too
        moments[number * KILLS // BLOCKS]["blocks"] = number
    moments[0] = {"blocks": 1}  # and one that has become faster meanwhile is killed early once
    seen = killed(request_arguments, folder, moments)
    assert len(seen) == KILLS
    assert any(kill["writing"] for kill in seen)
    assert len({len(kill["blocks"]) for kill in seen}) > 1
    assert main([*request_arguments, f"hydra.run.dir={folder}"]) == 0
    assert_equal_runs(folder, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_as_interrupted_and_the_same_command_goes_on(
    number, request_arguments, unbroken, tmp_path, capsys
):
    folder = tmp_path / "run"
    ended = interrupted(request_arguments, folder, number)
    assert ended.returncode == 143
    assert "run the same command again to resume" in ended.stdout
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    finished = len(list(folder.glob("blocks/00000?.json")))
    assert main([*request_arguments, f"hydra.run.dir={folder}"]) == 0
    output = capsys.readouterr().out
    assert f"resuming: {finished} of {BLOCKS} blocks are already pruned" in output
    assert f"block {finished + 1} of {BLOCKS}" in output
    assert_equal_runs(folder, unbroken)


@pytest.mark.parametrize("harm", ["flipped bit", "cut off", "gone"])
def test_a_damaged_block_is_found_and_pruned_again(harm, unfinished, request_arguments, unbroken, capsys):
    file = unfinished / "blocks" / "000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flipped bit" else content[:-100])
    assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 0
    output = capsys.readouterr().out
    assert "block 1 is pruned again" in output
    assert "resuming: 1 of" in output
    assert_equal_runs(unfinished, unbroken)


def test_another_request_in_the_folder_is_refused_with_the_difference_and_overwrite_starts_anew(
    unfinished, request_arguments, capsys
):
    here = [*request_arguments, f"hydra.run.dir={unfinished}", "evaluator=none"]
    assert main([*here, "sparsity=0.7"]) == 2
    said = capsys.readouterr().err
    assert "sparsity: 0.5 before, 0.7 now" in said
    assert "overwrite=true" in said
    assert len(list(unfinished.glob("blocks/00000?.json"))) >= 3
    assert main([*here, "sparsity=0.7", "overwrite=true"]) == 0
    assert json.loads((unfinished / "results.json").read_text())["target_sparsity"] == 0.7


def test_other_calibration_tokens_under_the_same_name_are_refused(unfinished, request_arguments, capsys):
    path = Path(next(line for line in request_arguments if line.startswith("calibration.path=")).split("=")[1])
    (unfinished / "inputs.json").unlink()  # as where it was written by an earlier version
    kept = path.read_bytes()
    try:
        save_file({"input_ids": torch.zeros(16, 24, dtype=torch.long)}, path)
        assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 2
    finally:
        path.write_bytes(kept)
    assert "calibration_tokens_sha256" in capsys.readouterr().err
    assert len(list(unfinished.glob("blocks/00000?.json"))) >= 3


def test_another_model_under_the_same_path_is_refused(unfinished, request_arguments, tmp_path, capsys):
    path = Path(next(line for line in request_arguments if line.startswith("model.path=")).split("=")[1])
    (unfinished / "inputs.json").unlink()  # as where it was written by an earlier version
    shutil.copytree(path, tmp_path / "kept")
    try:
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 2
    finally:
        shutil.copytree(tmp_path / "kept", path, dirs_exist_ok=True)
    assert "block index 0 was pruned from other dense weights" in capsys.readouterr().err


def test_seconds_are_those_of_all_attempts(unfinished, request_arguments):
    spent = json.loads((unfinished / "spent.json").read_text())["seconds"]
    assert spent["load"] + spent["calibrate"] + spent["prune"] <= spent["total"]
    assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 0
    results = json.loads((unfinished / "results.json").read_text())
    found, blocks = results["seconds"], [block["seconds"] for block in results["blocks"]]
    assert found["prune"] >= sum(blocks)
    assert all(found[part] > seconds for part, seconds in spent.items())
    assert not (unfinished / "spent.json").exists()


def test_a_changed_input_of_an_unfinished_run_is_named_before_anything_is_loaded(unfinished, request_arguments, capsys):
    path = Path(next(line for line in request_arguments if line.startswith("calibration.path=")).split("=")[1])
    kept = path.read_bytes()
    try:
        save_file({"input_ids": torch.zeros(16, 24, dtype=torch.long)}, path)
        assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 2
    finally:
        path.write_bytes(kept)
    seen = capsys.readouterr()
    assert f"holds an unfinished run of other inputs: calibration.path={path} has changed" in seen.err
    assert "loading" not in seen.out
    assert len(list(unfinished.glob("blocks/00000?.json"))) >= 3


def test_without_resume_an_unfinished_run_starts_anew(unfinished, request_arguments, unbroken, capsys):
    assert main([*request_arguments, f"hydra.run.dir={unfinished}", "resume=false"]) == 0
    assert "already pruned" not in capsys.readouterr().out
    assert_equal_runs(unfinished, unbroken)


def test_a_streamed_run_that_was_killed_ends_like_an_unbroken_whole_one(request_arguments, unbroken, tmp_path):
    folder = tmp_path / "run"
    streamed = [*request_arguments, "model.load=streamed", "activations=disk"]
    killed(streamed, folder, [{"blocks": 2}])
    assert main([*streamed, f"hydra.run.dir={folder}"]) == 0
    assert_equal_tensors(folder, unbroken)
    assert results_of(folder)["perplexity"] == pytest.approx(results_of(unbroken)["perplexity"], rel=1e-6)


def test_blocks_that_are_pruned_together_are_finished_together_and_their_reports_stay_apart(
    request_arguments, tmp_path, capsys
):
    whole, folder = tmp_path / "whole", tmp_path / "streamed"
    pairs = [*request_arguments, "pruner.scope=pair"]
    assert main([*pairs, f"hydra.run.dir={whole}"]) == 0
    streamed = [*pairs, "model.load=streamed"]
    killed(streamed, folder, [{"blocks": 3}])
    (folder / "blocks" / "000003.json").unlink(missing_ok=True)  # the second of a pair was not yet written
    assert main([*streamed, f"hydra.run.dir={folder}"]) == 0
    assert "resuming: 2 of" in capsys.readouterr().out
    assert_equal_tensors(folder, whole)
    assert results_of(folder)["blocks"] == results_of(whole)["blocks"]
    assert [line for line in metrics_of(folder) if line["kind"] != "scores"] == [
        line for line in metrics_of(whole) if line["kind"] != "scores"
    ]
    blocks = results_of(whole)["blocks"]
    assert [block["index"] for block in blocks] == list(range(BLOCKS))
    pruned = [sum(linear["pruned"] for linear in block["linears"].values()) for block in blocks]
    assert pruned[0] != pruned[1]
    assert pruned[0] + pruned[1] == pruned[2] + pruned[3] == 2 * pruned[4]


IN_A_SMALL_FILE_SYSTEM = """
place=$0
mount -t tmpfs -o size=80m tmpfs "$place" || exit 98
"$@"
code=$?
[ $code = 1 ] && cp -r "$place/run" "$OUT"
exit $code
"""
TWICE = """
import sys
from pathlib import Path
from besa_exp.cli.main import main
from besa_exp.machine.process import run_as_process

filler, *words = sys.argv[1:]

def fill(event, arguments):
    if event != "os.rename" or not str(arguments[1]).endswith("/blocks/000000.json"):
        return
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue

def twice():
    code = main(words)
    if code == 1:
        Path(filler).unlink()
        code = 1 if main(words) == 0 else 97
    return code

sys.addaudithook(fill)
run_as_process(twice)
"""  # the disk is full when the first block is finished; the code of the first run


def needs_mounts(place: Path) -> None:
    """Skips where nobody may mount a file system of their own."""
    place.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")


def test_a_full_disk_ends_the_run_with_a_message_and_it_goes_on_when_there_is_room(
    request_arguments, unbroken, tmp_path
):
    place, out = tmp_path / "small", tmp_path / "out"
    needs_mounts(place)
    command = [sys.executable, "-c", TWICE, f"{place}/filler", *request_arguments, f"hydra.run.dir={place}/run"]
    arguments = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_FILE_SYSTEM, str(place), *command]
    environment = os.environ | {"OUT": str(out)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "free disk space, then run the same command again" in done.stdout + done.stderr
    assert_equal_runs(out, unbroken)


def test_a_file_system_that_is_read_only_is_refused(request_arguments, tmp_path):
    place = tmp_path / "fixed"
    needs_mounts(place)
    command = [sys.executable, "-m", "besa_exp", *request_arguments, f"hydra.run.dir={place}/run"]
    script = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, str(place), *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{place} cannot be written to; name another folder with hydra.run.dir=" in done.stderr


def test_tuned_norms_are_saved_and_gone_on_with_and_masks_alone_do_not_give_them(request_arguments, tmp_path, capsys):
    kept = [line for line in request_arguments if line != "pruner=besa"]
    asked = [*kept, "pruner=wanda", "update=reconstruct", "update.tuning.norms=true", "update.tuning.epochs=1"]
    folder, unbroken, dense = tmp_path / "run", tmp_path / "unbroken", Path(kept[1].partition("=")[2])
    killed(asked, folder, [{"blocks": 2}])
    assert main([*asked, f"hydra.run.dir={folder}"]) == 0
    assert main([*asked, f"hydra.run.dir={unbroken}"]) == 0
    assert_equal_runs(folder, unbroken)
    saved, before = (load_file(path / "model.safetensors") for path in (unbroken / "model", dense))
    changed = {name for name in saved if "norm" in name and not torch.equal(saved[name], before[name])}
    assert len(changed) == 2 * BLOCKS
    masks = ["masks", "apply", str(unbroken / "masks.safetensors"), "--model", str(dense)]
    assert main([*masks, "--out", str(tmp_path / "out")]) == 2
    assert "updated the weights that it kept" in capsys.readouterr().err
