"""What a run leaves can be read by whom the umask lets read it. End to end because every writer of a run is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from besa_exp.cli.main import main


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(load: str, given: list[str]) -> None:
    before = os.umask(0o027)
    try:
        assert main(["prune", *given, f"model.load={load}", "calibration.save_tokens=true"]) == 0
    finally:
        os.umask(before)
    files = [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert {"masks.safetensors", "calibration.safetensors", "results.json"} <= {path.name for path in files}
    assert sum(path.parent.name == "model" and path.suffix == ".safetensors" for path in files)
    wrong = {str(path): oct(path.stat().st_mode & 0o777) for path in files if path.stat().st_mode & 0o777 != 0o640}
    assert wrong == {}
