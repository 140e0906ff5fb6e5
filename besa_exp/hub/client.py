"""The hub's own client: which files of a model are fetched, its local cache, and work without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from besa_exp.errors import Unavailable, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]


MODEL_FILES += ["README.md"]  # its licence tags


OTHER_FORMATS = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in forms that are not read


NOT_CACHED = "not in the local cache"


def is_hub_id(path: str) -> bool:
    """Whether `model.path` names a model of the hub: owner/name, and no file or folder of this machine."""
    local = Path(path).expanduser().exists() or Path(path.split("/")[0]).expanduser().is_dir()
    return HUB_ID.fullmatch(path) is not None and not path.startswith(".") and not local


def model_snapshot(repository: str, revision: str | None, offline: bool) -> Path:
    """The folder of a model's files in the cache, downloaded unless they are there. Unavailable: why it is not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] # its client's, by version
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            local_files_only=offline,
            allow_patterns=MODEL_FILES,
            ignore_patterns=OTHER_FORMATS,
        )
    except LocalEntryNotFoundError as error:
        incomplete = hasattr(error, "snapshot_path")
        raise Unavailable(NOT_CACHED if offline and not incomplete else first_line(error)) from error
    except (OSError, ValueError, HTTPError) as error:
        raise Unavailable(first_line(error)) from error
    return Path(folder)


@contextmanager
def offline_hub(offline: bool = True) -> Iterator[None]:
    """Make datasets and the hub's client use their caches alone, also where HF_HUB_OFFLINE was not set before they were
    imported."""
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
