"""The model and its tokenizer, by transformers: safetensors only, remote code only when the user asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from besa_exp.embedded.text import MODEL_DIR
from besa_exp.errors import ConfigurationError
from besa_exp.settings import ModelSettings

logger = logging.getLogger(__name__)


def load_model(
    settings: ModelSettings, device: torch.device, offline: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in eval mode on `device`, weights frozen, and its tokenizer; None where it has none.

    ConfigurationError: it cannot be found, has no safetensors, or its class is not known to transformers."""
    transformers_logging.disable_progress_bar()
    path = model_path(settings)
    options: dict[str, Any] = {"revision": settings.revision, "local_files_only": offline}
    options["trust_remote_code"] = settings.trust_remote_code
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=settings.dtype, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"model.path={settings.path}: cannot be loaded ({reason}); it must be a folder or hub id of a decoder-only "
            "model that transformers knows, saved as safetensors"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no tokenizer that loads (%s): only token files can be read", settings.path, error)
        tokenizer = None
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, device)  # transformers' own `to` is not typed
    return model, tokenizer


def model_path(settings: ModelSettings) -> str:
    """The folder or hub id that transformers is given."""
    return str(MODEL_DIR if settings.path == "embedded" else Path(settings.path).expanduser())


def model_context(model: nn.Module) -> int:
    """The longest window the model takes, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)  # type: ignore[union-attr]
