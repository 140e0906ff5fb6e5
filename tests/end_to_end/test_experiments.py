"""Every experiment and testbed runs: its first job in miniature, on a random model and tokens, all else as it says. End
to end because a preset is right when a run takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import CONF_DIR, as_values, method_name, read_settings
from besa_exp.presets import presets
from besa_exp.runs.prune import prune

MINIATURE = ["model.dtype=float32", "calibration.num_samples=4", "device=cpu", "tracker=none", "evaluator.tasks=[]"]
MINIATURE.append("save.verify=false")  # in a process of its own


def first_job(lines: list[str]) -> list[str]:
    """The lines of the first job of a sweep, or of the only one."""
    composer = Composer("prune")
    config = compose("prune", lines, return_hydra_config=True)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    return composer.spread(composer.parse(lines), params)[0]


CASES = [*([f"experiment={name}"] for name in presets("experiment"))]
CASES += [
    ["experiment=best", f"testbed={name}"] for name in presets("testbed") if name not in ("embedded", "tinystories")
]
CASES += [["experiment=paper_layer_wise", "testbed=tinystories"]]


@pytest.mark.parametrize("chosen", CASES, ids=" ".join)
def test_an_experiment_runs_in_miniature(chosen: list[str], given: list[str], tmp_path: Path) -> None:
    paths = [line for line in given if line.startswith(("model.path=", "calibration.path="))]
    tokens = next(line for line in paths if line.startswith("calibration")).partition("=")[2]
    lines = [*chosen, *MINIATURE, *paths, f"evaluator.perplexity_sets=[{tokens}]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", first_job(lines), return_hydra_config=True)
        values = as_values(config)
        settings = read_settings(config, method_name(config.hydra.runtime.choices))
    results = prune(settings, tmp_path / "run", values)
    assert results["perplexity"][tokens] > 1
    assert results["unavailable"] == {}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pruner"] == results["pruner"]
