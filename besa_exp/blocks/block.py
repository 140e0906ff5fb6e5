"""The decoder blocks of a model, discovered and made callable on their own.

A block is called with exactly the arguments that the model itself gives it: they are captured by hooks from a real
forward pass and replayed verbatim, block by block, so that rotary tables, masks and whatever a next release of
transformers adds arrive untouched. `replay_check` proves it at the start of every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.call_arguments import Arguments, Reached, arguments_of_the_shape, check_states, hidden_of
from besa_exp.blocks.linears import LOOKED_FOR, Linear, discover_linears, find_linears, with_weights
from besa_exp.blocks.products import Product, computed_by, is_plain
from besa_exp.errors import RunError

Hidden = Float[Tensor, "sample seq hidden"]


@dataclass(frozen=True)
class Block:
    """One decoder layer: its module, its linears by path (`self_attn.q_proj`), and its captured call arguments.

    `arguments` gives, for a batch size, the positional arguments after the hidden states and all keyword arguments.
    `parts`: the decoder layers, where these are several that are pruned together (`besa_exp.blocks.units`).
    `compute_dtype`: what products are computed in, where that is not the weights' dtype. `fixed`: further linears that
    are decided already, with the weights [out in] that they have here in place of the model's own."""

    index: int
    name: str
    module: nn.Module
    linears: Mapping[str, Linear]
    arguments: Callable[[int], Arguments]
    parts: tuple[Block, ...] = ()
    compute_dtype: torch.dtype | None = None
    fixed: Mapping[str, tuple[Linear, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Block, ...]:
        return self.parts or (self,)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the linears, as the model has them. They must not be changed."""
        return {name: linear.weight.detach() for name, linear in self.linears.items()}

    @property
    def num_weights(self) -> int:
        return sum(linear.weight.numel() for linear in self.linears.values())

    @property
    def device(self) -> torch.device:
        """Where the block computes; hidden states that lie elsewhere are brought there batch by batch."""
        return next(self.module.parameters()).device

    @property
    def product_dtype(self) -> torch.dtype:
        return self.compute_dtype or next(iter(self.linears.values())).weight.dtype

    def __call__(
        self,
        hidden: Hidden,
        weights: Mapping[str, Tensor] | None = None,
        products: Mapping[str, Product] = MappingProxyType({}),
    ) -> Hidden:
        """The block's output, with `weights` (linear path to [out in]) in place of its own where given, and plain
        linears computed by `products` where given."""
        hidden = hidden.to(self.device)
        if len(hidden) == 0:  # a rank that owns no sample of a batch
            return hidden
        args, kwargs = self.arguments(hidden.shape[0])
        autocast = torch.autocast(hidden.device.type, self.compute_dtype, enabled=self.compute_dtype is not None)
        linears = self._all_linears()
        with autocast, computed_by(linears, products):
            if weights is None and not self.fixed:
                output = self.module(hidden, *args, **kwargs)
            else:
                weights = {**{name: weight for name, (_, weight) in self.fixed.items()}, **(weights or {})}
                parameters = with_weights(self.module, linears, weights)
                output = torch.func.functional_call(self.module, parameters, (hidden, *args), kwargs)
        output = hidden_of(output)
        assert output.shape == hidden.shape, f"{self.name} turned {tuple(hidden.shape)} into {tuple(output.shape)}"
        return output

    @torch.no_grad()
    def outputs(
        self, inputs: Hidden, batch_size: int, weights: Mapping[str, Tensor] | None = None, out: Hidden | None = None
    ) -> Hidden:
        """The outputs for all samples, `batch_size` at a time, in the inputs' dtype; into `out`, which may be `inputs`
        itself, or beside the inputs."""
        out = torch.empty_like(inputs) if out is None else out
        weights = weights if self.compute_dtype is None else self._rounded(weights or {}, self.compute_dtype)
        for start in range(0, len(inputs), batch_size):
            out[start : start + batch_size] = self(inputs[start : start + batch_size], weights)
        return out

    def _all_linears(self) -> dict[str, Linear]:
        return {**{name: linear for name, (linear, _) in self.fixed.items()}, **self.linears}

    def _rounded(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of a pass over many samples with those of plain linears as autocast would round them again for
        each."""
        own = {name: linear.weight for name, linear in self._all_linears().items() if is_plain(linear)}
        own |= {name: weight for name, (linear, weight) in self.fixed.items() if is_plain(linear)}
        return {**weights, **{name: weights.get(name, weight).to(dtype) for name, weight in own.items()}}


def samples_at(states: Hidden, places: Int[Tensor, " place"]) -> Float[Tensor, "place seq hidden"]:
    """states[places], by places that the host knows: a GPU that is sent an index keeps the host waiting until all that
    was asked of it before is done."""
    return torch.cat([states[place : place + 1] for place in places.tolist()] or [states[:0]])


def discover_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder layers with their path: the ModuleList that holds the most weights of linears in equal modules.

    RunError when there is none."""
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            weights = sum(linear.weight.numel() for linear in find_linears(module).values())
            best = max(best, (weights, path, list(module)), key=lambda found: found[0])
    if not best[2]:
        raise RunError(
            f"{type(model).__name__} has no decoder blocks that can be pruned: looked for a torch.nn.ModuleList of "
            f"equal modules that hold linears, that is {LOOKED_FOR}; prune a decoder-only transformers model."
        )
    return best[1], best[2]


def capture_blocks(model: nn.Module, input_ids: Int[Tensor, "sample seq"]) -> list[Block]:
    """The model's blocks in order. Arguments are captured on demand, once for each batch size, from the first samples
    of `input_ids`. NotAlone, then: they do not depend on the shape of the batch alone."""
    path, modules = discover_blocks(model)
    captured: dict[int, list[Arguments]] = {}

    def arguments_of(index: int) -> Callable[[int], Arguments]:
        def arguments(batch_size: int) -> Arguments:
            if batch_size not in captured:
                captured[batch_size] = arguments_of_the_shape(model, modules, input_ids[:batch_size])
            return captured[batch_size][index]

        return arguments

    return [
        Block(index, f"{path}.{index}", module, discover_linears(module, f"{path}.{index}"), arguments_of(index))
        for index, module in enumerate(modules)
    ]


@torch.no_grad()
def embed(
    model: nn.Module,
    blocks: list[Block],
    input_ids: Int[Tensor, "sample seq"],
    batch_size: int,
    allocate: Allocate | None = None,
) -> Hidden:
    """The hidden states that enter block 0, for all samples; `allocate` gives the room, by default on the device.
    NotAlone: they are of another shape."""
    states: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    device = next(model.parameters()).device
    out: Tensor | None = None
    with blocks[0].module.register_forward_pre_hook(catch, with_kwargs=True):
        for start in range(0, len(input_ids), batch_size):
            batch = input_ids[start : start + batch_size]
            with suppress(Reached):
                model(batch.to(device, non_blocking=True), use_cache=False)
            check_states(model, state := states.pop(), batch)
            if out is None:
                shape = torch.Size([len(input_ids), *state.shape[1:]])
                out = allocate(shape, state.dtype) if allocate else state.new_empty(shape)
            out[start : start + batch_size] = state
    assert out is not None, "there are no samples"
    return out
