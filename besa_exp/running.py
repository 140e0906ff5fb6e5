"""A run under way: what its parts are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from besa_exp.console import RunConsole
from besa_exp.followed_folder import FollowedFolder
from besa_exp.models import LoadedModel
from besa_exp.run_folder import RunFolder
from besa_exp.settings import RunSettings
from besa_exp.spent import Spent


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and what it has taken so far."""

    settings: RunSettings
    device: torch.device
    folder: RunFolder | FollowedFolder
    console: RunConsole
    spent: Spent


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """What the plan shows of a model besides the settings."""
    facts = {
        "weights": f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(next(loaded.model.parameters()).device),
    }
    return facts | ({"in memory": "one block at a time"} if loaded.weights else {})
