"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from besa_exp.errors import RunError
from besa_exp.machine import atomic


def fail_to_write(folder: Path) -> None:
    with atomic.replaced_folder(folder) as partial:
        (partial / "weights").write_text("new")
        raise OSError("disk full")


def test_a_folder_that_fails_to_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    with atomic.replaced_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        fail_to_write(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with atomic.replaced_folder(tmp_path / "model") as partial:
        (partial / "other").write_text("newest")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "other"]


def test_a_killed_run_s_leftovers_do_not_end_in_the_next_folder(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("x")
    with atomic.replaced_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]


def test_the_older_folder_is_kept_whenever_the_new_one_does_not_get_its_place(tmp_path: Path) -> None:
    (tmp_path / ".model.replaced").mkdir()  # what a process leaves that is killed between the two renames
    (tmp_path / ".model.replaced" / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        fail_to_write(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with pytest.raises(FileNotFoundError), atomic.replaced_folder(tmp_path / "model") as partial:
        partial.rename(tmp_path / "lost")  # so that it cannot be renamed into its place
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost", "model"]


def test_a_file_that_fails_to_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"


def test_a_link_to_a_model_elsewhere_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("precious")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    atomic.remove(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "elsewhere" / "weights").read_text() == "precious"


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_mode_that_the_umask_gives_whoever_wrote_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic.replaced_file(tmp_path / "masks.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        with atomic.replaced_folder(tmp_path / "model") as partial:
            (partial / "inner").mkdir()
            save_file({"a": torch.zeros(1)}, partial / "inner" / "model.safetensors")
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"masks.safetensors", "model.safetensors", "config.json"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_a_file_that_is_there_and_cannot_be_read_is_no_missing_one(tmp_path: Path) -> None:
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "folder.json").mkdir()
    assert atomic.read_json(tmp_path / "missing.json") is None
    assert atomic.read_json(tmp_path / "damaged.json") is None
    with pytest.raises(RunError, match=r"folder\.json cannot be read \(Is a directory\)"):
        atomic.read_json(tmp_path / "folder.json")
