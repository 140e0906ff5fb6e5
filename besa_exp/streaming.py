"""A model whose blocks are in memory one at a time, each read from the safetensors files when its turn comes.

Embeddings, final norm and head stay. The modules are built without weights; a block's are read, used and dropped again.
It works where the files hold the tensors under the names of transformers' modules, one to one, which most decoders'
do; others are loaded whole (`cannot_stream` says why).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from besa_exp.blocks import Block, discover_blocks

NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers that older checkpoints still hold


@dataclass
class StreamedWeights:
    """Where each tensor lies, {name in the model: file}, and what it becomes."""

    files: dict[str, Path]
    dtype: torch.dtype
    device: torch.device

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, on the CPU in the run's dtype, by full name."""
        return self._read([name for name in self.files if name.startswith(prefix)])

    def read_outside(self, prefix: str) -> dict[str, Tensor]:
        """All other tensors, read like those."""
        return self._read([name for name in self.files if not name.startswith(prefix)])

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Each file is opened once."""
        tensors: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files[name] for name in names):
            with safe_open(path, framework="pt") as file:
                for name in (name for name in names if self.files[name] == path):
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensors

    def load(self, name: str, module: nn.Module) -> None:
        """Put the weights into a block."""
        prefix = f"{name}."
        state = {name.removeprefix(prefix): tensor.to(self.device) for name, tensor in self.read(prefix).items()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)

    def release(self, module: nn.Module) -> None:
        """Take the weights out of a block; buffers that no file holds stay."""
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is not None:
                    inner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        give_back_memory()

    @contextmanager
    def on_demand(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Lets the model be called as a whole: each block's weights are read anew in each of its forward passes."""
        hooks = []
        for name, module in blocks.items():
            hooks.append(module.register_forward_pre_hook(partial(self._load_before, name)))
            hooks.append(module.register_forward_hook(lambda module, *_: self.release(module)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _load_before(self, name: str, module: nn.Module, args: object) -> None:
        self.load(name, module)

    def resident(self, blocks: Sequence[Block]) -> Iterator[Block]:
        """The blocks in order, each with its weights while it is out."""
        for block in blocks:
            for layer in block.layers:
                self.load(layer.name, layer.module)
            try:
                yield block
            finally:
                for layer in block.layers:
                    self.release(layer.module)

    def with_blocks(self, files: Mapping[str, Path]) -> StreamedWeights:
        """The same model with other files for some tensors."""
        return StreamedWeights({**self.files, **files}, self.dtype, self.device)


def open_streamed(
    folder: Path, dtype: str, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, StreamedWeights]:
    """The model without its blocks' weights, in evaluation mode, and where they lie. ValueError: `cannot_stream`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wanted = dtype_of(config, dtype)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    files = tensor_files(folder)
    if reason := cannot_stream(model, files):
        raise ValueError(reason)
    weights = StreamedWeights(files, wanted, device)
    path, modules = discover_blocks(model)
    model.load_state_dict(weights.read_outside(f"{path}."), strict=False, assign=True)
    model.tie_weights()
    inside = {inner for block in modules for inner in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model.eval().requires_grad_(False), weights


def cannot_stream(model: PreTrainedModel, files: Mapping[str, Path]) -> str | None:
    """Why the model must be loaded whole; None: it need not."""
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return f"{type(model).__name__} keeps some modules in fp32"
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name for name in model.state_dict() if name not in tied}
    missing = sorted(wanted - files.keys())
    left = sorted(name for name in files.keys() - wanted - tied if not name.endswith(NOT_WEIGHTS))
    if missing or left:
        named, lack = ", ".join((missing or left)[:2]), "lack" if missing else "also hold"
        return (
            f"the files {lack} {named}: their names are not those of {type(model).__name__}, whose tensors "
            "transformers renames or merges as it loads"
        )
    return None


def give_back_memory() -> None:
    """Lets glibc return what was freed to the system. It keeps freed tensors of up to 32 MB in pieces: a streamed model
    of 4 GB was seen to grow by 100 MB a block. Other C libraries need no word."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


def dtype_of(config: PreTrainedConfig, wanted: str) -> torch.dtype:
    """What the weights are computed in: as `wanted`, or for auto as they were saved."""
    if wanted != "auto":
        return getattr(torch, wanted)
    saved = config.get_text_config().dtype or config.dtype or torch.float32
    return saved if isinstance(saved, torch.dtype) else getattr(torch, saved)
