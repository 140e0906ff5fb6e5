"""The model and its tokenizer, by transformers: safetensors only, remote code only when the user asks for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from besa_exp.blocks.block import Block, capture_blocks
from besa_exp.checkpoints.conversion import converted_folder
from besa_exp.checkpoints.fetch import fetched_config, fetched_model
from besa_exp.checkpoints.gguf_file import inspect_gguf, is_gguf
from besa_exp.checkpoints.inspect import (
    CONTEXT_KEYS,
    code_of,
    index_without_metadata,
    inspect_model_folder,
    weight_files,
)
from besa_exp.checkpoints.streaming import StreamedWeights, open_streamed
from besa_exp.checkpoints.tensor_sources import without_ignored
from besa_exp.checkpoints.transformers_config import dtype_of, read_config
from besa_exp.errors import ConfigurationError, RunError, Unavailable, first_line
from besa_exp.hub.client import NoSuchModel, is_hub_id
from besa_exp.machine import distributed
from besa_exp.machine.memory import free_memory
from besa_exp.settings import ModelSettings
from besa_exp.tensors.statistics import is_finite
from besa_exp.texts.embedded.text import MODEL_DIR

CONTEXT = 2048  # tokens that the families without a limit were trained on at a time
SHARE_OF_FREE = 0.5  # of the memory that is free: larger models are streamed
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, weights frozen, and its tokenizer, None where it has none. `weights` is set when its
    blocks are streamed: they are in memory only while `weights` puts them there. `folder`: where its files lie.
    `notes`: what was read otherwise than its config says, in sentences that stand in results.json. `stored`: the dtype
    that it is saved in, where it is computed in another."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    weights: StreamedWeights | None
    folder: Path
    notes: tuple[str, ...] = ()
    stored: torch.dtype | None = None

    def blocks(self) -> list[Block]:
        """All blocks, none of which is called: nothing is captured for them."""
        return capture_blocks(self.model, torch.zeros(1, 1, dtype=torch.long))

    def resident(self, blocks: Sequence[Block] | None = None) -> Iterable[Block]:
        """The blocks (None: all, none of which is called) in order, each with its weights while it is out."""
        given = self.blocks() if blocks is None else blocks
        return self.weights.resident(given) if self.weights else given

    def callable(self) -> AbstractContextManager[None]:
        """The model as a whole can be called for as long as this lasts."""
        return self.weights.on_demand(self.model) if self.weights else nullcontext()


def load_model(settings: ModelSettings, device: torch.device, offline: bool, whole_for: str = "") -> LoadedModel:
    """The model on `device`, whole or streamed: the same one, by the same config, dtype, files and ties. `whole_for`:
    what needs it whole; then one that would be streamed is refused, before a weight is read.

    ConfigurationError: it cannot be found, has no safetensors, its class is not known to transformers, its files do not
    make up its weights, or it cannot be streamed although that was asked for."""
    transformers_logging.disable_progress_bar()
    folder = _checked_folder(settings, offline)
    with _loading(settings):
        config, notes = read_config(folder, settings.trust_remote_code)
    streamed = _streamed(settings, folder, device, whole_for)
    model, weights = streamed or (_whole(settings, folder, config, device), None)
    notes += _ties_undone(model)
    for note in notes:
        logger.warning("%s: %s", settings.path, note)
    return LoadedModel(model, load_tokenizer(settings, folder), weights, folder, tuple(notes))


def _streamed(
    settings: ModelSettings, folder: Path, device: torch.device, whole_for: str
) -> tuple[PreTrainedModel, StreamedWeights] | None:
    """The streamed model where that is asked for, or the whole one would be large; None: it is to be loaded whole."""
    size = weight_bytes(folder)
    if not is_to_stream(settings, size, device):
        return None
    if whole_for:
        raise ConfigurationError(
            f"model.load={settings.load}: {settings.path} ({size / 1e9:.1f} GB) would be streamed, one block in memory "
            f"at a time, and {whole_for} needs it whole; set model.load=whole where it fits"
        )
    try:
        return open_streamed(folder, settings.dtype, device, settings.trust_remote_code)
    except ValueError as error:
        if settings.load == "streamed":
            raise ConfigurationError(
                f"model.load=streamed: {settings.path} cannot be streamed ({error}); set model.load=whole"
            ) from error
        logger.warning("%s is large but is loaded whole: %s", settings.path, error)
        return None


def _whole(settings: ModelSettings, folder: Path, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Each tensor goes from its file to the device by itself: the host never holds the model beside it."""
    asked = {"use_safetensors": True, "trust_remote_code": settings.trust_remote_code, "device_map": {"": device}}
    asked |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused by name
    with _loading(settings), _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype_of(config, settings.dtype, folder), **asked
        )
    model, loading = loaded
    _check_all_loaded(settings, model, loading)
    return model.eval().requires_grad_(False)


@contextmanager
def _loading(settings: ModelSettings) -> Iterator[None]:
    """Whatever transformers raises, but for too little memory, becomes one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"model.path={settings.path}: cannot be loaded ({first_line(error)}); it must be a folder or hub id of a "
            "decoder-only model that transformers knows, saved as safetensors"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers' table of missing and unexpected tensors is not shown: `_check_all_loaded` says what matters."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    its = logging.getLogger("transformers.modeling_utils")
    its.addFilter(other)
    try:
        yield
    finally:
        its.removeFilter(other)


def _ties_undone(model: Any) -> list[str]:
    """A sentence for each two weights that the class and config tie, and whose values in the files differ."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [
        f"its config ties {name} to {source}, its files hold two different ones: both are used, as transformers does"
        for name, source in tied.items()
        if name not in model.all_tied_weights_keys
    ]


def _checked_folder(settings: ModelSettings, offline: bool) -> Path:
    """The folder of safetensors, converted from pickled weights or a GGUF file where that is asked for."""
    if (unpacked := unpacked_gguf(settings)) is not None:
        return unpacked
    folder = _folder(settings, offline, fetched_model)
    facts, problems = inspect_model_folder(folder, "model.path", settings.convert, settings.trust_remote_code)
    problems = problems or index_without_metadata(folder)
    if facts is None or problems:
        raise ConfigurationError(*problems)
    if code := code_of(json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        runs = "is run" if settings.trust_remote_code else "is not run: transformers' own classes are used"
        logger.warning("%s: the code that comes with it, %s, %s", settings.path, ", ".join(code), runs)
    return distributed.from_first(lambda: converted_folder(folder)) if facts.to_convert else folder


def unpacked_gguf(settings: ModelSettings) -> Path | None:
    """The folder that the GGUF file of `model.path` was unpacked into, now or before; None: it names none.
    ConfigurationError: it cannot be."""
    file = Path(model_path(settings))
    if not is_gguf(file):
        return None
    _, problems = inspect_gguf(file, "model.path", settings.convert)
    if problems:
        raise ConfigurationError(*problems)
    from besa_exp.checkpoints.gguf_weights import converted_gguf

    return distributed.from_first(lambda: converted_gguf(file))


def _check_all_loaded(settings: ModelSettings, model: nn.Module, loading: Mapping[str, Any]) -> None:
    """transformers only warns of weights that the files lack, and draws them at random, or hold beyond the model's."""
    lacking = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
    lacking += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    left = without_ignored(model, loading["unexpected_keys"])
    where, kind = f"model.path={settings.path}: its files", type(model).__name__
    problems = []
    if lacking:
        problems.append(
            f"{where} lack {_few(lacking)} of {kind}, or hold them in another shape or without data; give the whole "
            "model"
        )
    if left:
        problems.append(
            f"{where} also hold {_few(left)}, which {kind} as config.json describes it does not have; correct "
            "config.json (such as the number of blocks), or remove these tensors from the files"
        )
    if problems:
        raise ConfigurationError(*problems)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_finite_weights(model: nn.Module, path: str) -> None:
    """RunError, before any long work: a weight that is in memory (a streamed model's blocks are not) holds NaN or
    infinity, which would show up as a NaN loss far from where it is, or at some late sample."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and weight.is_floating_point() and weight.numel() and not is_finite(weight.detach()):
            raise RunError(
                f"model.path={path}: {name} holds NaN or infinity: the model is broken as it is saved, or overflows as "
                f"{str(weight.dtype).removeprefix('torch.')}; copy it again, or set model.dtype=float32"
            )


def load_tokenizer(settings: ModelSettings, folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None, and a warning, where there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # noqa: BLE001 - of any type, by what its files hold
        reason = first_line(error)  # a log that keeps the error keeps all that its frames hold: the model
        logger.warning("%s has no tokenizer that loads (%s): only token files can be read", settings.path, reason)
        return None


def config_folder(settings: ModelSettings, offline: bool) -> Path:
    """A folder that holds the model's config; of a hub id no weight is fetched, and a GGUF file is unpacked."""
    return unpacked_gguf(settings) or _folder(settings, offline, fetched_config)


def _folder(settings: ModelSettings, offline: bool, fetch: Callable[[ModelSettings, bool], Path]) -> Path:
    """The folder of the model's files; of a hub id, what `fetch` fetches into the local cache. ConfigurationError: the
    hub has no such model, or its files cannot be fetched."""
    path, where = Path(model_path(settings)), f"model.path={settings.path}"
    if path.is_dir():
        return path
    if not is_hub_id(settings.path):
        raise ConfigurationError(f"{where}: there is no such folder, and it is no hub id (owner/name); check the path")
    try:
        return fetch(settings, offline)
    except NoSuchModel as error:
        raise ConfigurationError(
            f"{where}: {error}; check model.path and model.revision, or log in (hf auth login) if it is private or "
            "gated"
        ) from error
    except Unavailable as error:
        raise ConfigurationError(
            f"{where}: not in the local cache, and the hub cannot be reached "
            f"({'offline=true' if offline else error}); check the network, HF_ENDPOINT and proxies, or fetch it "
            f"where there is one (hf download {settings.path}) and give model.path that folder"
        ) from error


def weight_bytes(folder: Path) -> int:
    """The size of the safetensors files that make up the model."""
    return sum(file.stat().st_size for file in weight_files(folder)[0])


def is_to_stream(settings: ModelSettings, size: int, device: torch.device) -> bool:
    """Whether files of `size` bytes are streamed, if they can be: by themselves where they are more than the free
    memory easily holds beside what pruning needs."""
    if settings.load != "auto":
        return settings.load == "streamed"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return size > SHARE_OF_FREE * min(free, free_memory())


def model_path(settings: ModelSettings) -> str:
    """The folder or hub id that transformers is given."""
    return str(MODEL_DIR if settings.path == "embedded" else Path(settings.path).expanduser())


def hub_id(settings: ModelSettings) -> str | None:
    """The model's name on the hub; None: it is embedded, or a folder or file of this machine."""
    return None if Path(model_path(settings)).exists() else settings.path


def model_context(model: nn.Module) -> int:
    """The longest window the model takes, in tokens; CONTEXT where its config does not say, as of BLOOM, which has no
    limit of its own."""
    config: Any = model.config
    known = (getattr(config.get_text_config(), key, None) for key in CONTEXT_KEYS)
    return int(next((length for length in known if length), CONTEXT))


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of token ids that the model has an embedding for."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
