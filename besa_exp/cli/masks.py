"""`besa masks apply`: a pruned checkpoint from dense weights and the masks of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from besa_exp.cli.preflight import bytes_as, check_model
from besa_exp.errors import ConfigurationError
from besa_exp.machine.disk import check_disk
from besa_exp.settings import ModelSettings


def masks(arguments: Sequence[str]) -> int:
    """The exit code. ConfigurationError: all that speaks against it, before anything is loaded."""
    parsed = _parser().parse_args(list(arguments))
    model = ModelSettings(Path(parsed.model).name, parsed.model, parsed.revision)
    description, problems = _check(parsed.masks, model, parsed.out)
    if problems:
        raise ConfigurationError(*problems)
    from besa_exp.runs.rebuild import Masks, rebuild

    command = ["besa", "masks", "apply", parsed.masks.name, "--model", model.name, "--out", parsed.out.name]
    weights, zeros = rebuild(Masks(parsed.masks, description), model, parsed.out, command)
    print(f"done: {zeros / weights:.2%} zeros by {description['method']} -> {parsed.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="besa masks", description=__doc__)
    apply = parser.add_subparsers(dest="action", required=True).add_parser(
        "apply",
        help="rebuild the model of a run that kept its masks",
        description="Writes to OUT the model that the run has pruned: every safetensors file has the bytes of the one "
        "that the run saved, or would have saved with save.model=true. Methods that update weights are refused.",
    )
    apply.add_argument("masks", type=Path, metavar="MASKS", help="a run's masks.safetensors")
    apply.add_argument("--model", required=True, help="the dense model: a folder, a hub id, or `embedded`")
    apply.add_argument("--revision", help="of a hub id")
    apply.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet, or an empty one")
    return parser


def _check(path: Path, model: ModelSettings, out: Path) -> tuple[dict, list[str]]:
    """What the masks say of themselves, and all problems."""
    facts, problems = check_model(model, key="--model")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"--out={out}: there is something already; give a folder that does not exist yet")
    from besa_exp.checkpoints.files import masks_description

    try:
        description = masks_description(path)
    except ConfigurationError as error:
        return {}, [*error.problems, *problems]
    if "method" not in description:
        problems.append(f"{path}: masks of one block of a run; give the run's masks.safetensors")
    elif description["weights_updated"]:
        problems.append(
            f"{path}: {description['method']} updated the weights that it kept, so masks and dense weights do not "
            "give its model; prune with save.model=true to keep it (magnitude, wanda and besa decide masks alone)"
        )
    problems += [
        f"{path}: the run changed the model by a {stage} too, which masks and dense weights do not give; prune with "
        "save.model=true to keep its model"
        for stage in ("structure", "recovery")  # in this order
        if stage in description
    ]
    if facts and "dtype" in description:
        problems += check_disk(out, bytes_as(description["dtype"], facts), "--out", "")
    return description, problems
