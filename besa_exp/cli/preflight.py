"""All that can be found wrong with a run before anything is loaded: every problem, in complete sentences, in seconds.

Each says what is wrong, where (the key), the rule, and the remedy. Neither a model nor torch is imported,
but where the pruner is to be asked or a CUDA device is named.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from besa_exp.blocks.ignored import check_ignored, is_ignored
from besa_exp.checkpoints.fetch import cached_folder
from besa_exp.checkpoints.gguf_file import inspect_gguf, is_gguf
from besa_exp.checkpoints.inspect import (
    BLOCK_AND_LINEAR,
    ModelFolder,
    inspect_config,
    inspect_model_folder,
    saved_dtype,
)
from besa_exp.checkpoints.narrowed_config import dimensions_of
from besa_exp.cli.hub_needs import missing_offline, needs_of
from besa_exp.errors import did_you_mean
from besa_exp.evaluation.checks import check_evaluator, check_skipping
from besa_exp.hub.client import is_hub_id
from besa_exp.hub.publish import check_push
from besa_exp.machine.disk import check_disk, required_bytes
from besa_exp.run_folder.identity import check_finished
from besa_exp.run_folder.inputs import check_run_inputs
from besa_exp.run_folder.lookup import check_run, run_and_model
from besa_exp.settings import (
    CalibrationSettings,
    EvaluationSettings,
    ModelSettings,
    RunSettings,
    SaveSettings,
    TrackerSettings,
    TuneSettings,
)
from besa_exp.tensors.pattern import indivisible, parse_pattern
from besa_exp.texts.calibration_check import check_calibration
from besa_exp.texts.embedded.text import MODEL_DIR

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}  # auto: as saved
TRACKERS = ("wandb", "none")
TRACKER_MODES = ("offline", "online", "disabled")


def preflight(
    settings: RunSettings, folder: Path = Path("outputs"), unknown: Collection[str] = (), here: bool = True
) -> list[str]:
    """The problems of a run that would write to `folder`; none: it may start.

    `unknown` names the groups whose preset could not be found, about which nothing is said, and may hold
    `calibration.path` where none was given. `here` False: the run will
    be on another machine, whose device and disk are not this one's."""
    facts, context, problems = _check_shared(settings, unknown, here, "model.path")
    problems += _check_target(settings, facts, context, "pruner" not in unknown)
    calibrated = settings.skipping is not None and settings.skipping.is_calibrated
    if "calibration" not in unknown and (calibrated or not settings.is_dense):
        length = None if "calibration.path" in unknown else context
        problems += check_calibration(settings.calibration, length)
    not_read = (settings.is_dense and not calibrated) or {"calibration", "calibration.path"} & {*unknown}
    problems += _missing(settings, unknown, None if not_read else settings.calibration) if here else []
    problems += check_push(settings.save, settings.offline) if here else []
    if settings.is_dense and settings.save.push_to_hub:
        problems.append("save.push_to_hub: pruner=dense makes no model, it scores the one it is given; leave it out")
    problems += check_run_inputs(folder, settings) if here else []
    if settings.model.path != "embedded":
        problems += _check_apart(folder, "model", "the pruned one", settings.model.path)
    if here and facts:
        problems += check_disk(folder, _needed_bytes(settings, facts))
    return problems


def preflight_evaluation(
    settings: EvaluationSettings, folder: Path, unknown: Collection[str] = ()
) -> tuple[ModelFolder | None, list[str]]:
    """The facts of the checkpoint, None where they are not known yet, and the problems of scoring it into `folder`."""
    run, model = run_and_model(settings.checkpoint)
    of_run = check_run(run) if run else []
    facts, context, problems = _check_shared(settings, [*unknown, *(["model"] if of_run else [])], True, "checkpoint")
    saved = saved_dtype(Path(model)) if facts and run and folder.resolve() == run.resolve() else None
    if saved and settings.model.dtype not in ("auto", saved):
        problems.append(
            f"model.dtype={settings.model.dtype}: the scores of {run} are those of its model as saved, {saved}; leave "
            "model.dtype out, or name another folder with hydra.run.dir="
        )
    skipping = settings.skipping
    read = settings.calibration if skipping and skipping.is_calibrated and "calibration" not in unknown else None
    if read:
        problems += check_calibration(read, context)
    return facts, [*of_run, *problems, *_missing(settings, unknown, read)]


def preflight_tuning(
    settings: TuneSettings, folder: Path, unknown: Collection[str] = (), finished: bool = False
) -> list[str]:
    """The problems of a tuning that would write to `folder`; what only the weights show is found when they are
    read. Of a `finished` one that is only shown those of its inputs alone."""
    run, model = run_and_model(settings.checkpoint)
    if run and (of_run := check_run(run)):
        return of_run
    from besa_exp.runs.recover import check_recovery_of  # imports torch
    from besa_exp.runs.tune import as_run, config_of_tuning, has_lost_blocks

    asked = as_run(settings)
    problems = check_run_inputs(folder, asked)
    if finished:
        return check_finished(folder, config_of_tuning(settings)) or problems
    if of_place := _check_apart(folder, "checkpoint", "the tuned model", model, *([run] if run else [])):
        return of_place
    facts, context, of_shared = _check_shared(asked, unknown, True, "checkpoint")
    problems += of_shared
    if "calibration" not in unknown:
        problems += check_calibration(settings.calibration, context)
    if not {"recovery", "calibration"} & {*unknown}:
        of_recovery = check_recovery_of(asked, 0.0, context, has_lost_blocks(settings)) + _check_teacher(settings)
        problems += [found for found in of_recovery if found not in problems]
    problems += _missing(asked, unknown, None if "calibration" in unknown else settings.calibration)
    problems += check_push(settings.save, settings.offline)
    return problems + (check_disk(folder, _needed_bytes(asked, facts)) if facts else [])


def _check_apart(folder: Path, what: str, made: str, *places: str | Path) -> list[str]:
    """A run would replace what lies in its folder."""
    if folder.expanduser().resolve() not in (Path(place).expanduser().resolve() for place in places):
        return []
    return [f"hydra.run.dir={folder}: is where the {what} lies; name another folder for {made}"]


def _check_teacher(settings: TuneSettings) -> list[str]:
    """Where a dense model is followed, which one it is has to be known."""
    from besa_exp.recovery.recipe import follows_dense
    from besa_exp.runs.tune import teacher_of

    if not follows_dense(settings.recovery):
        return []
    teacher = teacher_of(settings)
    if teacher is None:
        asked = "recovery=blocks" if settings.recovery.name == "blocks" else "recovery.distill"
        return [f"{asked}: follows the dense model, and no run says which one that is; name it with teacher=DENSE"]
    return check_model(teacher, "teacher")[1]


def _missing(
    settings: RunSettings | EvaluationSettings, unknown: Collection[str], calibration: CalibrationSettings | None
) -> list[str]:
    """What the local caches lack where there is to be no network."""
    model = None if "model" in unknown else settings.model
    evaluator = None if "evaluator" in unknown else settings.evaluator
    recovery = None if "recovery" in unknown else getattr(settings, "recovery", None)
    return missing_offline(needs_of(model, calibration, evaluator, recovery)) if settings.offline else []


def _check_shared(
    settings: RunSettings | EvaluationSettings, unknown: Collection[str], here: bool, key: str
) -> tuple[ModelFolder | None, int | None, list[str]]:
    """What is known of the model, its context, and the problems that pruning and scoring have in common; `key` is what
    a person set to name the model."""
    dtype, dtypes = settings.model.dtype, ("auto", *BYTES_OF_DTYPE)
    facts, problems = None, list[str]()
    if dtype not in dtypes:
        problems = [f"model.dtype={dtype}: must be one of {', '.join(dtypes)}{did_you_mean(dtype, dtypes)}"]
    if "model" not in unknown:
        facts, of_model = check_model(settings.model, key)
        problems += of_model
    context = facts.context if facts else settings.model.context
    if "evaluator" not in unknown:
        problems += check_evaluator(settings.evaluator, context)
    if settings.skipping and "skipping" not in unknown:
        problems += check_skipping(settings.skipping, settings.model.load)
    if "tracker" not in unknown:
        problems += _check_tracker(settings.tracker, settings.offline)
    return facts, context, problems + (_check_device(settings.device) if here else [])


def model_folder(settings: ModelSettings) -> Path | None:
    """The local folder that `model.path` names; None: it names none, as a hub id does not."""
    if settings.path == "embedded":
        return MODEL_DIR
    folder = Path(settings.path).expanduser()
    return folder if folder.is_dir() else None


def check_model(settings: ModelSettings, key: str = "model.path") -> tuple[ModelFolder | None, list[str]]:
    """What is known of the model and its problems, without loading it; `key` is what a person set to name it."""
    if not settings.path.strip():
        return None, [f"{key}=: is empty; give a model's folder, a hub id (owner/name), or embedded"]
    folder = model_folder(settings)
    if settings.revision and (folder or is_gguf(settings.path)):
        rule = "only a model of the hub has revisions, and what lies here is taken as it is; leave it out"
        return None, [f"model.revision={settings.revision}: {key}={settings.path} is local; {rule}"]
    if is_gguf(settings.path):
        return inspect_gguf(Path(settings.path).expanduser(), key, settings.convert)
    if folder is None:
        return _check_hub_id(settings, key)
    return inspect_model_folder(folder, key, settings.convert, settings.trust_remote_code)


def _check_hub_id(settings: ModelSettings, key: str) -> tuple[ModelFolder | None, list[str]]:
    path = settings.path
    if Path(path).expanduser().exists():
        return None, [f"{key}={path}: is a file; give the folder that holds config.json and the safetensors"]
    if not is_hub_id(path):
        return None, [f"{key}={path}: there is no such folder, and it is no hub id (owner/name); check the path"]
    folder = cached_folder(settings)
    # What is missing or broken in the cache is fetched, or named with all else that is missing where offline=true; but
    # not what the config says against the model.
    if folder is None:
        return None, []
    trusted = settings.trust_remote_code
    problems = inspect_config(folder, f"{key}={path}", trusted)[1]
    return inspect_model_folder(folder, key, settings.convert, trusted)[0], problems


def _check_target(
    settings: RunSettings, facts: ModelFolder | None, context: int | None, with_pruner: bool
) -> list[str]:
    problems: list[str] = []
    try:
        parse_pattern(settings.pattern)
    except ValueError as error:
        return [f"{error} (in a YAML file in quotes: pattern: '2:4')"]
    if facts:
        # Where the files name the linears as the model does: of others, and of experts, the run says it when it has
        # the model.
        if facts.linears and not facts.to_convert and not any(".experts." in name for name in facts.linears):
            problems += check_ignored(settings.ignore, [_in_a_block(name) for name in facts.linears])
        named = {name.removesuffix(".weight"): (_in_a_block(name), shape[1]) for name, shape in facts.linears.items()}
        pruned = {name: size for name, (own, size) in named.items() if not is_ignored(own, settings.ignore)}
        problems += indivisible(pruned, settings.pattern)
    if with_pruner and not problems:
        from besa_exp.methods.given import check_kinds, check_methods  # torch is there already: it came with the pruner

        if problems := check_kinds(vars(settings)):
            return problems
        problems = check_methods(vars(settings), settings.sparsity, settings.pattern)
        if settings.recovery:
            from besa_exp.runs.recover import check_recovery_of

            problems += check_recovery_of(settings, 0.0 if settings.keeps_weights else settings.sparsity, context)
        problems += _check_structure(settings) if settings.structure and facts else []
    return problems


def _check_structure(settings: RunSettings) -> list[str]:
    """What of the model cannot go, where its folder is known: of another one the run itself says so."""
    folder = model_folder(settings.model)
    if folder is None and is_hub_id(settings.model.path):
        folder = cached_folder(settings.model)
    if folder is None or not (folder / "config.json").is_file():
        return []
    from besa_exp.checkpoints.narrowed_tensors import costs_of_folder  # torch
    from besa_exp.runs.narrow import check_narrowing

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        dimensions = dimensions_of(config)
        costs = costs_of_folder(folder, dimensions)
    except ValueError as error:
        return [str(error)]
    return check_narrowing(settings.structure, config, dimensions, costs, settings.model.load == "streamed")


def _in_a_block(name: str) -> str:
    """`3.mlp.down_proj` of `model.layers.3.mlp.down_proj.weight`."""
    found = BLOCK_AND_LINEAR.search(name)
    return ".".join(found.groups()) if found else name


def _check_tracker(settings: TrackerSettings, offline: bool) -> list[str]:
    if settings.name not in TRACKERS:
        return [f"tracker.name={settings.name}: must be {' or '.join(TRACKERS)}{did_you_mean(settings.name, TRACKERS)}"]
    if settings.mode not in TRACKER_MODES:
        near = did_you_mean(settings.mode, TRACKER_MODES)
        source = " (WANDB_MODE says so)" if os.environ.get("WANDB_MODE") == settings.mode else ""
        return [f"tracker.mode={settings.mode}{source}: must be one of {', '.join(TRACKER_MODES)}{near}"]
    if offline and settings.mode == "online":
        return ["tracker.mode=online: needs the network, which offline=true forbids; set tracker.mode=offline"]
    return []


def _check_device(device: str) -> list[str]:
    if device in ("auto", "cpu"):
        return []
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not found:
        near = did_you_mean(device, ("auto", "cpu", "cuda"))
        return [f"device={device}: must be auto, cpu, cuda or cuda:N{near}"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(found[1] or 0) < count:
        return []
    there = f"this machine has cuda:0 to cuda:{count - 1}" if count else "PyTorch finds no CUDA device on this machine"
    return [f"device={device}: {there}; set device=auto or device=cpu"]


def bytes_as(dtype: str, facts: ModelFolder) -> int:
    """Of the model in a dtype of BYTES_OF_DTYPE; in any other as it is saved."""
    a_weight = BYTES_OF_DTYPE.get(dtype)
    return facts.weights * a_weight if a_weight else facts.saved_bytes


def _needed_bytes(settings: RunSettings, facts: ModelFolder) -> int:
    model_bytes = bytes_as(settings.model.dtype, facts)
    in_linears = sum(rows * columns for rows, columns in facts.linears.values())
    whole = settings.model.load == "whole"
    save = SaveSettings(model=False, masks=False) if settings.is_dense else settings.save
    needed = required_bytes(model_bytes, in_linears, facts.weights, save, whole)
    narrowed = model_bytes if settings.structure and settings.model.load == "streamed" else 0  # until the run is done
    return needed + narrowed + (facts.saved_bytes if facts.to_convert else 0)
