"""A model whose blocks are in memory one at a time, each read from the safetensors files when its turn comes.

Embeddings, final norm and head stay. The modules are built without weights; a block's are read, used and dropped again.
It works where each tensor can be made of stored ones without the rest of the model (`tensor_sources`); other models are
loaded whole (`streamed_sources` says why).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from besa_exp.blocks.block import Block, discover_blocks
from besa_exp.checkpoints.tensor_sources import (
    Source,
    Stored,
    as_saved,
    read_tensors,
    stored_tensors,
    tensor_sources,
    tensors_of_file,
)
from besa_exp.checkpoints.transformers_config import dtype_of, read_config
from besa_exp.machine.background import ahead
from besa_exp.machine.memory import give_back_memory

LARGE = 8 * 2**20  # more than the temporaries that inner loops work in, which are used again and again
KEPT_IN_FP32 = ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules")  # of transformers; the second in fp16 alone
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass
class StreamedWeights:
    """What each tensor is made of, {name in the model: source}, and what it becomes: of `dtype` where it is read, on
    `device`, and there of the dtype `computed`, where that is another."""

    sources: dict[str, Source]
    dtype: torch.dtype
    device: torch.device
    computed: torch.dtype | None = None

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, on the CPU in the run's dtype, by full name."""
        return read_tensors([self.sources[name] for name in self.sources if name.startswith(prefix)], self.dtype)

    def read_outside(self, prefix: str) -> dict[str, Tensor]:
        return read_tensors([self.sources[name] for name in self.sources if not name.startswith(prefix)], self.dtype)

    def load(self, name: str, module: nn.Module) -> None:
        self._put(name, module, self.read(f"{name}."))

    def _put(self, name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        state = {full.removeprefix(f"{name}."): self._placed(tensor) for full, tensor in tensors.items()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.computed if tensor.is_floating_point() else None, non_blocking=True)

    def release(self, module: nn.Module) -> None:
        """Take the weights out of a block; buffers that no file holds stay."""
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is not None:
                    inner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        give_back_memory()

    def on_demand(self, model: nn.Module) -> AbstractContextManager[None]:
        """Lets the model be called as a whole: each block's weights are read again in each of its forward passes."""
        path, modules = discover_blocks(model)
        blocks = {f"{path}.{index}": module for index, module in enumerate(modules)}
        return on_demand(blocks, self.load, self.release)

    def resident(
        self, blocks: Sequence[Block], see: Callable[[Block, Mapping[str, Tensor]], None] | None = None
    ) -> Iterator[Block]:
        """The blocks in order, each with its weights while it is out; meanwhile a thread reads those of the next one,
        and shows each layer's to `see`."""

        def read(block: Block) -> tuple[Block, list[dict[str, Tensor]]]:
            tensors = [self.read(f"{layer.name}.") for layer in block.layers]
            if see is not None:
                for layer, own in zip(block.layers, tensors, strict=True):
                    see(layer, own)
            return block, [self._pinned(own) for own in tensors]

        for block, tensors in ahead(read, blocks):
            for layer, own in zip(block.layers, tensors, strict=True):
                self._put(layer.name, layer.module, own)
            tensors.clear()
            try:
                yield block
            finally:
                for layer in block.layers:
                    self.release(layer.module)

    def _pinned(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where a GPU can fetch them without the host."""
        on_gpu = self.device.type == "cuda"
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if on_gpu else tensors

    def with_blocks(self, model: PreTrainedModel, files: Iterable[Path]) -> StreamedWeights:
        """The same model with other files for some tensors, which hold them under the model's own names."""
        sources = {name: source for file in files for name, source in tensors_of_file(file, model).items()}
        return replace(self, sources={**self.sources, **sources})


@contextmanager
def on_demand(
    blocks: Mapping[str, nn.Module], load: Callable[[str, nn.Module], None], release: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Each block, by its name in the model, is loaded before each of its forward passes and released after it."""

    def before(name: str, module: nn.Module, _: object) -> None:
        load(name, module)

    with ExitStack() as hooks:
        for name, module in blocks.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name)))
            hooks.enter_context(module.register_forward_hook(lambda module, *_: release(module)))
        yield


def open_streamed(
    folder: Path, dtype: str, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, StreamedWeights]:
    """The model without its blocks' weights, in evaluation mode, and where they lie.

    ValueError: why it cannot be streamed (`streamed_sources`)."""
    give_back_large_tensors()
    config, _ = read_config(folder, trust_remote_code)
    wanted = dtype_of(config, dtype, folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    weights = StreamedWeights(streamed_sources(model, stored_tensors(folder)), wanted, device)
    path, modules = discover_blocks(model)
    model.load_state_dict(weights.read_outside(f"{path}."), strict=False, assign=True)
    # As from_pretrained does: two that are to be tied but differ stay apart.
    model.tie_weights(missing_keys=model.state_dict().keys() - weights.sources.keys(), recompute_mapping=False)
    inside = {inner for block in modules for inner in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model.eval().requires_grad_(False), weights


def streamed_sources(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """As `tensor_sources`. ValueError, too: what of a 16-bit model stays in fp32, `from_pretrained` alone knows."""
    kept = {torch.float16: KEPT_IN_FP32, torch.bfloat16: KEPT_IN_FP32[:1]}.get(model.dtype, ())
    if any(getattr(model, names, None) for names in kept):
        told = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"{type(model).__name__} in {told} keeps some modules in fp32")
    return tensor_sources(model, stored)


def saves_blocks_anew(model: PreTrainedModel) -> bool:
    """Whether a block's tensors have other names or shapes in the saved model, so that its file cannot be reused."""
    path, modules = discover_blocks(model)
    block = {f"{path}.{len(modules) - 1}.{name}": tensor for name, tensor in modules[-1].state_dict().items()}
    return as_saved(model, block).keys() != block.keys()


def give_back_large_tensors() -> None:
    """From now on glibc returns each freed tensor of LARGE bytes and more to the system at once. By itself it keeps
    those of up to 32 MB: 200 to 350 MB beside blocks of 206 MB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
