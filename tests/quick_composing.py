"""Hydra composes some thirty presets for each command, most of a small run's time. Once this module is imported it is a
fifth quicker, with the same result."""

from __future__ import annotations

from typing import Any

import yaml
from hydra._internal import defaults_list
from omegaconf import OmegaConf

whole_map: Any = defaults_list._create_interpolation_map


def interpolation_map(overrides: Any, defaults: Any, self_added: bool) -> Any:
    """What is chosen so far. Hydra makes it for each preset, and looks into it where one of its defaults is an
    interpolation."""
    interpolated = any(default.is_interpolation() for default in defaults)
    return whole_map(overrides, defaults, self_added) if interpolated else OmegaConf.create()


defaults_list._create_interpolation_map = interpolation_map
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
