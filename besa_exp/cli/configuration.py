"""The configuration folder, the name a run gets from its configuration, and the reading of both into `RunSettings`.

Below this module nobody sees a `DictConfig`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError

from besa_exp.cli.reading import MISSING_VALUE, UNREAD, Reader
from besa_exp.errors import ConfigurationError
from besa_exp.presets import METHOD_GROUPS
from besa_exp.report.methods import differences, method_of
from besa_exp.run_folder.identity import NOT_DECIDING, results_identity, without_places
from besa_exp.run_folder.lookup import run_and_model
from besa_exp.settings import EvaluationSettings, RunSettings, TuneSettings
from besa_exp.tensors.pattern import fixes_sparsity

Of = TypeVar("Of", EvaluationSettings, TuneSettings)
# (group, key, default) of keys that came later: at their defaults they change no result, so runs made before them are
# found again.
LATER_KEYS = (
    ("calibration", "column", "text"),
    ("calibration", "chat_template", False),
    ("evaluator", "column", "text"),
    ("evaluator", "include_path", None),
    ("evaluator", "max_windows", None),
    ("evaluator", "prompts", None),
    ("recovery", "method", None),
    ("recovery", "exchange", False),
    ("recovery", "shard", False),
    ("recovery", "task", None),
    ("recovery", "task_loss", "options"),
    ("recovery", "shots", 500),
    ("recovery", "tested", 500),
)
LATER_GROUPS = ("structure", "ignore")  # that make no part of a name where they say nothing, for the same reason
WANDB_MODES_ONCE = {"dryrun": "offline", "run": "online"}  # as its older versions called them
HASH_LENGTH = 8
NAME_LENGTH = 24  # of each part of a run's name
SIZES = ("num_samples", "seq_len")  # of the calibration set, part of a run's name where they are not the preset's
MOST_TOLD = 3  # differences from the presets in a run's name


class Unreadable(ConfigurationError):
    """Values of the wrong type or unknown keys; `by_key` maps each key to its problem."""

    def __init__(self, by_key: Mapping[str, str]):
        super().__init__(*by_key.values())
        self.by_key = dict(by_key)


def as_values(config: DictConfig) -> dict[str, Any]:
    """The job's part of a composed configuration as plain values, interpolations resolved."""
    return {str(key): _plain(config, str(key)) for key in config if key != "hydra"}


def _plain(config: DictConfig, key: str) -> Any:
    node = config._get_node(key)
    try:
        if OmegaConf.is_config(node):
            return OmegaConf.to_container(node, resolve=True)  # a node keeps its parent: ${seed} works
        return MISSING_VALUE if OmegaConf.is_missing(config, key) else config[key]
    except InterpolationToMissingValueError:
        return MISSING_VALUE
    except InterpolationKeyError as error:
        told = str(error).splitlines()[0]
        raise Unreadable(
            {key: f"{error.full_key or key}: {told}; ${{seed}} and the like name a key of the run"}
        ) from error


def method_name(choices: Mapping[str, Any]) -> str:
    """The presets of the method, `owl+wanda+obs`, from Hydra's choices."""
    return "+".join(str(choices[group]) for group in METHOD_GROUPS if choices.get(group) not in (None, "null"))


def read_settings(config: DictConfig, pruner_name: str, with_pruner: bool = True) -> RunSettings:
    """Typed settings. `pruner_name` is what `method_name` says; without the pruner (and what goes with it) torch is not
    imported.

    Unreadable: unknown keys, missing or ill-typed values, or values a pruner refuses; all of them."""
    values = as_values(config)
    if isinstance(values.get("model"), dict):
        _name_model(values)
    given: dict[str, Any] = {"pruner_name": pruner_name}
    if not with_pruner:
        given |= {group: values.pop(group, None) for group in METHOD_GROUPS}
    return _read(config, values, RunSettings, given)


def read_of_checkpoint(config: DictConfig, cls: type[Of]) -> Of:
    """Typed settings of `besa evaluate` or `besa tune`; `model.path` is what `checkpoint` means.

    Unreadable: unknown keys, missing or ill-typed values; all of them."""
    values = as_values(config)
    model, checkpoint = values.get("model"), values.get("checkpoint")
    if isinstance(model, dict):
        model["path"] = "embedded" if checkpoint == MISSING_VALUE else run_and_model(str(checkpoint))[1]
        _name_model(values)
    return _read(config, values, cls, {})


def _read(config: DictConfig, values: Mapping[str, Any], cls: type, given: Mapping[str, Any]) -> Any:
    reader = Reader()
    settings = reader.node(values, cls, "", given)
    if settings is UNREAD or reader.problems:
        own = {key: problem for key, problem in reader.problems.items() if not _is_reference(config, key)}
        raise Unreadable(own or reader.problems)
    return settings


def _is_reference(config: DictConfig, key: str) -> bool:
    """Whether the value only repeats another key's, as calibration.seed repeats seed: one problem is enough."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(config, group) if group else config
    return isinstance(node, DictConfig) and name in node and OmegaConf.is_interpolation(node, name)


def run_name(config: DictConfig) -> str:
    """`<model>-<pruner>-<what differs from its preset>-<sparsity or pattern>-s<seed>-<hash>`: the same for all that
    gives the same result.

    `config` is composed with Hydra's own node, which knows the presets chosen. The hash is over their names and the
    values of their fields, never over where a class lies; it alone identifies a run."""
    values = as_values(config)
    model = _model_name(values)
    values = {k: v for k, v in results_identity(values).items() if k not in LATER_GROUPS or v not in (None, [])}
    values = _without_later_keys(values)
    choices = OmegaConf.select(config, "hydra.runtime.choices")
    method = method_name(choices)
    differing = _told_differences(method, values, str(choices.get("calibration")))
    pattern, amount = str(values.get("pattern")), values.get("sparsity")
    if fixes_sparsity(pattern):
        amount = pattern
    elif pattern != "unstructured":
        amount = f"{pattern}-{amount}"
    digest = _digest(values | {"method": method})
    skipping = [f"skipping_{under['name']}"] if isinstance(under := values.get("skipping"), dict) else []
    parts = [model, method, *differing, amount, *skipping, f"s{values.get('seed')}", digest]
    return "-".join(_slug(part) for part in parts)


def _told_differences(method: str, values: Mapping[str, Any], calibration: str) -> list[str]:
    """`scope=pair`, `num_samples=16`: what a person changed of the presets, the first few."""
    differing = method_of(method, values, "unstructured").variant.split(", ")
    given = values.get("calibration")
    sizes = {key: given[key] for key in SIZES if key in given} if isinstance(given, Mapping) else {}
    told = [text for text in [*differing, *differences(sizes, "calibration", calibration)] if text][:MOST_TOLD]
    return [re.sub(r"^path=.*/", "path=", text) for text in told]  # a file is enough: names hold no folders


def evaluation_folder(config: DictConfig) -> str:
    """Where scores of `config.checkpoint` are kept: beside the run that made it, else `outputs/<name>-scores-<hash>`,
    the hash over the checkpoint and how it is loaded, so that further scores of it join those that are there. Scores
    under a skipping policy are others: they stand in `outputs/<name>-skipping_ffn-<hash>`, one folder a policy."""
    values = as_values(config)
    run, path = run_and_model(str(values.get("checkpoint")))
    under = _skipping_asked(values)
    if run is not None and not under:
        return str(run)
    digest = _digest([_place(path), _deciding(values.get("model") or {}), *under])
    kind = f"skipping_{under[0]['name']}" if under else "scores"
    return f"outputs/{_slug(run.name if run else Path(path).name)}-{kind}-{digest}"


def _skipping_asked(values: Mapping[str, Any]) -> list[Any]:
    """What decides a policy besides the model; [] where nothing is skipped."""
    skipping = values.get("skipping")
    if not isinstance(skipping, Mapping):
        return []
    return [*without_places({key: values.get(key) for key in ("skipping", "calibration")}).values()]


def tuning_folder(config: DictConfig) -> str:
    """`outputs/<checkpoint>-<recovery>-s<seed>-<hash>`, the hash over all that determines the result."""
    values = as_values(config)
    run, path = run_and_model(str(values.get("checkpoint")))
    keys = ("calibration", "recovery", "evaluator", "seed", "device", "save", "deterministic")
    deciding = {key: values.get(key) for key in keys}
    deciding |= {"teacher": teacher} if (teacher := values.get("teacher")) else {}
    deciding |= _without_later_keys({"recovery": values.get("recovery")})
    if isinstance(model := values.get("model"), dict):
        deciding["model"] = _deciding(model)
    digest = _digest([_place(path), without_places(deciding)])
    recovery = values.get("recovery")
    name = recovery.get("name") if isinstance(recovery, dict) else "recovery"
    parts = [Path(run or path).name, name, f"s{values.get('seed')}", digest]
    return "outputs/" + "-".join(_slug(part) for part in parts)


def _digest(content: Any) -> str:
    """The first letters of a hash, the same for equal settings."""
    return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


def _place(path: str) -> str:
    """Of a checkpoint: a folder is the same from wherever it is named."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def _deciding(model: Mapping[str, Any]) -> dict[str, Any]:
    """How a checkpoint is loaded."""
    return {key: value for key, value in model.items() if key not in (*NOT_DECIDING, "path")}


def _without_later_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys of groups that were added later, where they say what went without saying before."""
    kept = dict(values)
    for group, key, default in LATER_KEYS:
        if isinstance(kept.get(group), dict) and kept[group].get(key) == default:
            kept[group] = {name: value for name, value in kept[group].items() if name != key}
    return kept


def _name_model(values: Mapping[str, Any]) -> None:
    """A model that has no name gets one; what is no text is left to be refused."""
    if values["model"].get("name") in (None, "", MISSING_VALUE):
        values["model"]["name"] = _model_name(values)


def _model_name(values: Mapping[str, Any]) -> str:
    """As `model.name` says, else the last part of `model.path`: a preset's name would be wrong as soon as the path is
    another."""
    model = values.get("model")
    if isinstance(model, Mapping) and model.get("name"):
        return str(model["name"])
    path = model.get("path") if isinstance(model, Mapping) else None
    return "model" if path in (None, MISSING_VALUE) else Path(str(path)).name


def _canonical(value: Any) -> Any:
    """Equal settings as equal JSON: 0 and 0.0 are one number."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _slug(part: Any) -> str:
    """Safe in any shell and file system, and bounded."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(part)).strip("._-")[:NAME_LENGTH] or "_"


def _kept_name(root: DictConfig) -> str:
    """A run that is there already under another name, as an earlier version gave it, keeps that one."""
    name = run_name(root)
    if Path("outputs", name).exists():
        return name
    kept = sorted(Path("outputs").glob(f"*-s*-{name.rpartition('-')[2]}"))
    return kept[0].name if kept else name


def _of_hydra(root: DictConfig, key: str) -> Any:
    """A value of Hydra's node, which in a running job is elsewhere."""
    if "hydra" not in root and HydraConfig.initialized():
        return OmegaConf.select(cast(DictConfig, HydraConfig.get()), key)
    return OmegaConf.select(root, f"hydra.{key}")


def _from_wandb(name: str, default: Any = None) -> Any:
    """What W&B's environment variable `WANDB_<name>` says, where it says something: its users rely on them."""
    value = os.environ.get(f"WANDB_{name}", "").strip()
    if name == "TAGS":
        return OmegaConf.create([tag.strip() for tag in value.split(",") if tag.strip()] or list(default))
    return WANDB_MODES_ONCE.get(value, value) if name == "MODE" and value else value or default


# What a configuration may ask of itself as ${NAME:}.
OF_ROOT: Mapping[str, Callable[[DictConfig], Any]] = {
    "run_name": _kept_name,
    "evaluation_folder": evaluation_folder,
    "tuning_folder": tuning_folder,
    "model_name": lambda root: _model_name(
        {"model": {k: OmegaConf.select(root, f"model.{k}") for k in ("name", "path")}}
    ),
    "single_run": lambda root: _of_hydra(root, "mode") != RunMode.MULTIRUN,  # the job is no sweep's
    "study": lambda root: (_of_hydra(root, "runtime.choices") or {}).get("experiment"),  # trackers group runs by it
}


def _asked_of_root(answer: Callable[[DictConfig], Any]) -> Callable[..., Any]:
    return lambda *, _root_: answer(_root_)


OmegaConf.register_new_resolver("wandb", _from_wandb, replace=True)
for _name, _answer in OF_ROOT.items():
    OmegaConf.register_new_resolver(_name, _asked_of_root(_answer), replace=True)
