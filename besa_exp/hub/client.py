"""The hub's own client: a model's files, whether the hub answers, its local cache, and work without a network.

The client itself tries each file five times, half a minute where there is no network, and waits for ever for a hub that
is silent; so the hub is asked once, and soon.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from besa_exp.errors import Unavailable, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_TIMEOUT = 15.0  # seconds; of one request
NOT_CACHED = "not in the local cache"
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
MODEL_FILES += ["README.md"]  # its licence tags
OTHER_FORMATS = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in forms that are not read


def is_hub_id(path: str) -> bool:
    """Whether `model.path` names a model of the hub: owner/name, and no file or folder of this machine."""
    local = Path(path).expanduser().exists() or Path(path.split("/")[0]).expanduser().is_dir()
    return HUB_ID.fullmatch(path) is not None and not path.startswith(".") and not local


def failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises where it cannot do what it is asked."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] # its client's, by version

    return OSError, HTTPError


class NoSuchModel(Unavailable):
    """The hub answers, and shows no such model or revision."""


@dataclass(frozen=True)
class HubModel:
    """A model of the hub: the `names` of its files, none where the hub was not asked, and why it is `unreachable`."""

    repository: str
    revision: str | None
    names: tuple[str, ...] = ()
    unreachable: str | None = None

    @staticmethod
    def asked(repository: str, revision: str | None, offline: bool) -> HubModel:
        """Asks the hub, unless `offline`. NoSuchModel: it knows none."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if offline:
            return HubModel(repository, revision, unreachable=NOT_CACHED)
        try:
            info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise NoSuchModel(
                f"the hub has no such model or revision, or hides it from you ({first_line(error)})"
            ) from error
        except failures() as error:
            return HubModel(repository, revision, unreachable=first_line(error))
        return HubModel(repository, revision, tuple(file.rfilename for file in info.siblings or []))

    def fetched(self, patterns: Sequence[str]) -> Path:
        """The folder, in the local cache, of its files that match, downloaded unless they are there or the hub is
        unreachable. Unavailable: why they are not there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                self.repository,
                revision=self.revision,
                local_files_only=self.unreachable is not None,
                allow_patterns=list(patterns),
                ignore_patterns=OTHER_FORMATS,
            )
        except LocalEntryNotFoundError as error:
            incomplete = hasattr(error, "snapshot_path")  # some of the files are there
            reason = first_line(error) if incomplete else self.unreachable
            raise Unavailable(reason or first_line(error)) from error
        except (ValueError, *failures()) as error:
            raise Unavailable(first_line(error)) from error
        return Path(folder)


def hub_problem() -> str | None:
    """Why the hub cannot be reached; None: it answers."""
    from huggingface_hub import constants

    return _problem(constants.ENDPOINT)


@cache
def _problem(endpoint: str) -> str | None:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=HUB_TIMEOUT)
    except failures() as error:
        return first_line(error)
    return None


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
