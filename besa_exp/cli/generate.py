"""`besa generate DIR [--prompt TEXT]`: what the pruned model of a run says, the dense one beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from besa_exp.errors import ConfigurationError, RunError
from besa_exp.evaluation.checks import PROMPTS
from besa_exp.machine.environment_variables import set_before_imports
from besa_exp.run_folder.lookup import check_run, run_and_model
from besa_exp.settings import ModelSettings

PLAIN_WIDTH = 120
DESCRIPTION = """\
Lets the pruned model of a run go on from each prompt, greedily, and the dense model it was made from beside it.
DIR may be any model folder; without a run's configuration it speaks alone."""


def generate(arguments: Sequence[str]) -> int:
    """Prints the texts; 0. ConfigurationError: there is no model to load."""
    parser = argparse.ArgumentParser(prog="besa generate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("place", metavar="DIR", help="a run folder that kept its model, or a model folder")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for several")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="new tokens at most (default: %(default)s)")
    parser.add_argument("--no-dense", action="store_true", help="the pruned model alone")
    parser.add_argument("--offline", action="store_true", help="never reach for the network")
    asked = parser.parse_args(arguments)
    prompts = asked.prompt or list(PROMPTS)
    if asked.tokens < 1 or not all(prompts):
        raise ConfigurationError("--tokens must be at least 1, and a --prompt must have a character")
    models = _models(asked.place, asked.no_dense)
    set_before_imports(offline=asked.offline)
    said = {which: _texts(settings, prompts, asked.tokens, asked.offline) for which, settings in models.items()}
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, emoji=False)
    for number, prompt in enumerate(prompts):
        table = Table(box=box.SIMPLE, title=Text(prompt, style="bold"), title_justify="left", show_edge=False)
        for which in said:
            table.add_column(which, ratio=1, overflow="fold")
        table.add_row(*(Text(texts[number]) for texts in said.values()))
        console.print(table)
    return 0


def _models(place: str, alone: bool) -> dict[str, ModelSettings]:
    """The dense model first; without a run there is none."""
    run, path = run_and_model(place)
    if run is None:
        return {"model": ModelSettings(Path(path).name, path)}
    if problems := check_run(run):
        raise ConfigurationError(*(problem.replace("checkpoint=", "") for problem in problems))
    given = _dense(run)
    pruned = ModelSettings(run.name, path, trust_remote_code=bool(given.get("trust_remote_code")))
    if alone or "path" not in given or given["path"] == path:
        return {"pruned": pruned}
    keys = ("path", "revision", "dtype", "trust_remote_code", "convert")
    dense = ModelSettings(Path(str(given["path"])).name, **{key: given[key] for key in keys if key in given})
    return {"dense": dense, "pruned": pruned}


def _dense(run: Path) -> dict[str, Any]:
    try:
        model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return model if isinstance(model, dict) else {}


def _texts(settings: ModelSettings, prompts: Sequence[str], tokens: int, offline: bool) -> list[str]:
    import torch

    from besa_exp.checkpoints.load import load_model
    from besa_exp.evaluation.continuations import continuations

    loaded = load_model(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"), offline)
    if loaded.tokenizer is None:
        raise ConfigurationError(
            f"{settings.path}: it has no tokenizer, and text needs one; copy the dense model's there"
        )
    if loaded.weights is not None:
        raise RunError(f"{settings.path} does not fit the memory as a whole, and a streamed model is too slow to speak")
    return continuations(loaded.model, loaded.tokenizer, prompts, tokens)
