"""The configuration folder, the name a run gets from its configuration, and the reading of both into `RunSettings`.

Below this module nobody sees a `DictConfig`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from besa_exp.errors import ConfigurationError
from besa_exp.presets import CONF_DIR
from besa_exp.settings import RunSettings
from besa_exp.typed_reading import UNREAD, Reader

__all__ = ["CONF_DIR", "Unreadable", "as_values", "read_settings", "run_name"]

# What determines a run's result, and therefore its folder. Tracker, offline and overwrite do not.
DETERMINING_KEYS = (
    "model",
    "calibration",
    "pruner",
    "update",
    "budget",
    "evaluator",
    "sparsity",
    "pattern",
    "seed",
    "device",
    "deterministic",
    "save",
)
METHOD_GROUPS = ("budget", "pruner", "update")  # what a method is made of, in the order in which it is named
HASH_LENGTH = 8
NAME_LENGTH = 24  # of each part of a run's name


class Unreadable(ConfigurationError):
    """Values of the wrong type or unknown keys; `by_key` maps each key to its problem."""

    def __init__(self, by_key: Mapping[str, str]):
        super().__init__(*by_key.values())
        self.by_key = dict(by_key)


def as_values(config: DictConfig) -> dict[str, Any]:
    """The job's part of a composed configuration as plain values, interpolations resolved."""
    return {
        str(key): OmegaConf.to_container(config._get_node(key), resolve=True)  # a node keeps its parent: ${seed} works
        if OmegaConf.is_config(config._get_node(key))
        else ("???" if OmegaConf.is_missing(config, key) else config[key])
        for key in config
        if key != "hydra"
    }


def method_name(choices: Mapping[str, Any]) -> str:
    """The presets of the method, `owl+wanda+obs`, from Hydra's choices."""
    return "+".join(str(choices[group]) for group in METHOD_GROUPS if choices.get(group) not in (None, "null"))


def read_settings(config: DictConfig, pruner_name: str, with_pruner: bool = True) -> RunSettings:
    """Typed settings. `pruner_name` is what `method_name` says; without the pruner (and what goes with it) torch is not
    imported.

    Unreadable: unknown keys, missing or ill-typed values, or values a pruner refuses; all of them."""
    reader = Reader()
    values = as_values(config)
    if isinstance(values.get("model"), dict):
        values["model"].setdefault("name", _model_name(values))
    given: dict[str, Any] = {"pruner_name": pruner_name}
    if not with_pruner:
        given |= {group: values.pop(group, None) for group in METHOD_GROUPS}
    settings = reader.node(values, RunSettings, "", given)
    if settings is UNREAD or reader.problems:
        own = {key: problem for key, problem in reader.problems.items() if not _is_reference(config, key)}
        raise Unreadable(own or reader.problems)
    return settings


def _is_reference(config: DictConfig, key: str) -> bool:
    """Whether the value only repeats another key's, as calibration.seed repeats seed: one problem is enough."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(config, group) if group else config
    return isinstance(node, DictConfig) and OmegaConf.is_interpolation(node, name)


def run_name(config: DictConfig) -> str:
    """`<model>-<pruner>-<sparsity or pattern>-s<seed>-<hash>`: the same for all that gives the same result.

    `config` is composed with Hydra's own node, which knows the presets chosen."""
    values = {key: value for key, value in as_values(config).items() if key in DETERMINING_KEYS}
    if isinstance(values.get("model"), dict):
        values["model"].pop("load", None)  # where the weights lie, not what they are
    method = method_name(OmegaConf.select(config, "hydra.runtime.choices"))
    unstructured = values.get("pattern") == "unstructured"
    amount = values.get("sparsity") if unstructured else values.get("pattern")
    if not unstructured:
        values.pop("sparsity", None)  # the pattern fixes it
    digest = hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()
    parts = [_model_name(values), method, amount, f"s{values.get('seed')}", digest[:HASH_LENGTH]]
    return "-".join(_slug(part) for part in parts)


def _model_name(values: Mapping[str, Any]) -> str:
    """The last part of `model.path`: a preset's name would be wrong as soon as the path is another."""
    model = values.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    return "model" if path in (None, "???") else Path(str(path)).name


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


def _run_name_of_root(*, _root_: DictConfig) -> str:
    return run_name(_root_)


def _is_single_run(*, _root_: DictConfig) -> bool:
    """Whether the job is no sweep's. In a running job Hydra's node is elsewhere."""
    mode = OmegaConf.select(_root_, "hydra.mode")
    if "hydra" not in _root_ and HydraConfig.initialized():
        mode = HydraConfig.get().mode
    return mode != RunMode.MULTIRUN


OmegaConf.register_new_resolver("single_run", _is_single_run, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name_of_root, replace=True)
