"""What goes wrong around a run: the hub, the clock, and the moment of a kill that falls into the evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NO_HUB = """
import socket, sys, time
from besa_exp import models
from besa_exp.main import main
models.HUB_TIMEOUT = 1.0
with socket.socket() as silent:  # takes connections and never answers; closed, its port refuses them
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    import huggingface_hub.constants
    huggingface_hub.constants.ENDPOINT = f"http://127.0.0.1:{silent.getsockname()[1]}"
    began = time.monotonic()
    first = main(sys.argv[1:])
second = main(sys.argv[1:])
print("codes", first, second, "seconds", time.monotonic() - began)
"""


def test_a_hub_that_cannot_be_reached_is_told_within_seconds_with_the_remedy(given: list[str], tmp_path: Path) -> None:
    keys = [argument for argument in given if not argument.startswith("model.path")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", NO_HUB, "prune", *keys, "model.path=an-owner/a-model"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment | {"HF_HOME": str(tmp_path / "hub")}
    )
    assert done.returncode == 0, done.stderr
    _, first, second, _, seconds = done.stdout.splitlines()[-1].split()
    assert (first, second) == ("2", "2")
    assert float(seconds) < 30
    said = done.stderr
    assert said.count("the hub cannot be reached") == 2
    assert "refused" in said
    assert said.count("hf download an-owner/a-model") == 2
    assert "Traceback" not in said
    assert list(Path.cwd().iterdir()) == [], "something was left behind"
