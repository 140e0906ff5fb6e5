"""The memory that is left under the limits of control groups, from made-up ones."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from besa_exp.machine.memory import free_memory, limit_left


def group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, f"anon 5\n{stat}"), strict=True):
        (folder / name).write_text(f"{content}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_the_tightest_limit_counts_also_that_of_a_group_above(tmp_path: Path) -> None:
    group(tmp_path / "slice" / "job", V2, "max", 300, "inactive_file 100")
    group(tmp_path / "slice", V2, 1000, 400, "inactive_file 150")
    (tmp_path / "own").write_text("0::/slice/job\n")
    assert limit_left(tmp_path, tmp_path / "own") == 1000 - 400 + 150
    group(tmp_path / "slice" / "job", V2, 500, 300, "inactive_file 100")
    assert limit_left(tmp_path, tmp_path / "own") == 500 - 300 + 100


def test_version_1_tells_its_limit_in_files_of_other_names(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "box", V1, 1000, 400, "total_inactive_file 50")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/box\n4:memory:/box\n")
    assert limit_left(tmp_path, tmp_path / "own") == 1000 - 400 + 50


@pytest.mark.parametrize("own", ["0::/nowhere\n", "5:cpu:/box\n", ""])
def test_where_no_group_sets_a_limit_there_is_none(tmp_path: Path, own: str) -> None:
    (tmp_path / "own").write_text(own)
    assert limit_left(tmp_path, tmp_path / "own") is None
    assert limit_left(tmp_path, tmp_path / "not Linux") is None


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path, V2, 100, 400, "inactive_file 50")
    (tmp_path / "own").write_text("0::/\n")
    assert limit_left(tmp_path, tmp_path / "own") == 0


def test_free_memory_is_never_more_than_the_machine_has() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_processes_of_one_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_memory() < alone / 4
