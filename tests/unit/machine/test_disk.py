"""Whether the disk holds what a run writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from besa_exp.machine.disk import SPARE_BYTES, check_disk, required_bytes
from besa_exp.settings import SaveSettings


@pytest.mark.parametrize(
    ("save", "whole", "needed"),
    [  # 1,000 bytes, of 250 weights 200 in linears: finished blocks of 800 bytes and 25 of masks
        (SaveSettings(model=True, masks=True), True, 800 + 25 + 1000 + 25),
        (SaveSettings(model=True, masks=True), False, 800 + 25 + 200 + 25),
        (SaveSettings(model=True, masks=False), False, 800 + 25 + 200),
        (SaveSettings(model=False, masks=True), True, 800 + 25 + 25),
    ],
)
def test_finished_blocks_and_what_is_saved_decide_what_disk_is_needed(save, whole, needed) -> None:
    assert required_bytes(1000, 200, 250, save, whole) == SPARE_BYTES + needed


def test_too_little_disk_is_one_problem_with_its_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    assert check_disk(folder, 1) == []
    (problem,) = check_disk(folder, 10**18)
    assert str(folder) in problem
    assert "1,000,000,000.0 GB" in problem
    assert "save.model=false" in problem
    assert not folder.exists()


def test_a_file_where_the_run_folder_should_be_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (problem,) = check_disk(tmp_path / "taken" / "run", 1)
    assert "taken cannot be written to" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_place_without_permission_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (problem,) = check_disk(tmp_path / "run", 1)
    assert "cannot be written to" in problem
