"""A model of the hub in the local cache: which of its files a run reads. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from besa_exp.checkpoints.inspect import inspect_config, only_pickled
from besa_exp.errors import ConfigurationError
from besa_exp.hub.client import MODEL_FILES, OTHER_FORMATS, HubModel
from besa_exp.settings import ModelSettings


def fetched_model(settings: ModelSettings, offline: bool) -> Path:
    """The folder of all that is read of the hub's model. config.json comes first: what it speaks against is refused
    before the weights come.

    Unavailable: the files cannot be fetched. ConfigurationError: the config speaks against the model, or pickled
    weights are all there is."""
    model = HubModel.asked(settings.path, settings.revision, offline)
    folder = model.fetched(["*.json"])
    names = model.names or [file.name for file in folder.iterdir()]
    return model.fetched(wanted_files(settings, folder, names))


def fetched_config(settings: ModelSettings, offline: bool) -> Path:
    """The folder of the config and the code that comes with it; no weight is fetched. Unavailable: as above."""
    return HubModel.asked(settings.path, settings.revision, offline).fetched(["*.json", "*.py"])


def cached_folder(settings: ModelSettings) -> Path | None:
    """The folder of the hub's model in the local cache; None: its config is not there."""
    from huggingface_hub import try_to_load_from_cache  # half a second that only hub models need

    found = try_to_load_from_cache(settings.path, "config.json", revision=settings.revision)
    return Path(found).parent if isinstance(found, str) else None


def wanted_files(settings: ModelSettings, folder: Path, names: Sequence[str]) -> list[str]:
    """Patterns of the files to fetch; `names` are all that the hub has, or the cache where it was not asked.
    ConfigurationError: as above."""
    from huggingface_hub.utils import filter_repo_objects

    where = f"model.path={settings.path}"
    problems = inspect_config(folder, where, settings.trust_remote_code)[1]
    read = filter_repo_objects(names, ignore_patterns=OTHER_FORMATS)
    safe = any(name.endswith(".safetensors") for name in read)
    pickles = [name for name in names if name.endswith(".bin")]
    if pickles and not safe and not settings.convert:
        problems.append(only_pickled(where, pickles[0]))
    if problems:
        raise ConfigurationError(*problems)
    return MODEL_FILES + (["*.bin"] if settings.convert and not safe else [])
