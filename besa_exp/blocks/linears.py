"""The linears of a block: named weights [out in], whatever kind of module holds them, and the inputs that reach them.

There are three kinds. `torch.nn.Linear` holds [out in]. transformers' `Conv1D` (GPT-2) holds [in out], seen transposed
here. The experts of a mixture lie stacked in one parameter [expert out in], or [expert in out], of a module that keeps
to transformers' experts interface (`gate_up_proj`, `down_proj`, `has_gate`, `is_transposed`, `_apply_gate`); each
expert's part is a linear of its own, `mlp.experts.3.down_proj`. Routers are linears to nobody: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from besa_exp.errors import RunError

LOOKED_FOR = (
    "torch.nn.Linear, transformers' Conv1D, and experts stacked as in transformers' experts interface (a module with "
    "has_gate, is_transposed, gate_up_proj or up_proj, and down_proj)"
)
OnInput = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Linear:
    """One weight of a block: the module that holds it, the parameter's path inside the block, and how it lies there.

    `expert`: its number in a stacked parameter. `of_mixture`: a router chooses whether it runs."""

    module: nn.Module
    path: str
    expert: int | None = None
    transposed: bool = False
    of_mixture: bool = False

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """A view of the parameter: what is written into it is written into the model."""
        return self.part_of(getattr(self.module, self.path.rpartition(".")[2]))

    def part_of(self, stored: Tensor) -> Tensor:
        """Of a tensor that lies as the parameter does, a view of what belongs to this weight, [out in]."""
        part = stored if self.expert is None else stored[self.expert]
        return part.T if self.transposed else part


def discover_linears(block: nn.Module, name: str = "block") -> dict[str, Linear]:
    """Every linear of a block by its path. RunError: most of the block's weights are something else."""
    linears = find_linears(block)
    held = {linear.path for linear in linears.values()}
    others = {
        path: parameter
        for path, parameter in block.named_parameters()
        if path not in held and parameter.dim() > 1 and min(parameter.shape) > 1
    }
    size = sum(linear.weight.numel() for linear in linears.values())
    if sum(parameter.numel() for parameter in others.values()) > size:
        path, largest = max(others.items(), key=lambda item: item[1].numel())
        owner = type(block.get_submodule(path.rpartition(".")[0])).__name__
        raise RunError(
            f"{name}: most of its weights lie in no linear, such as {path} {list(largest.shape)} of {owner}; they "
            f"would stay dense. Looked for {LOOKED_FOR}"
        )
    return linears


def find_linears(module: nn.Module) -> dict[str, Linear]:
    """Every linear inside a module, by path."""
    from transformers.pytorch_utils import Conv1D  # a second that perplexity and the checks do not need

    routers, chosen = _routers(module), _chosen(module)
    linears: dict[str, Linear] = {}
    for path, inner in module.named_modules():
        if count := _num_stacked(inner):
            for expert in range(count):
                for kind in (_first_projection(inner), "down_proj"):
                    place = f"{path}.{kind}".lstrip(".")
                    linears[f"{path}.{expert}.{kind}".lstrip(".")] = Linear(
                        inner, place, expert, inner.is_transposed is True, of_mixture=True
                    )
        elif isinstance(inner, nn.Linear | Conv1D) and inner not in routers and inner.weight.numel():
            linears[path] = Linear(
                inner, f"{path}.weight", transposed=isinstance(inner, Conv1D), of_mixture=inner in chosen
            )
    return linears


def find_norms(module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters of each norm inside a module, by path: of a module that holds nothing but parameters of one axis.
    Biases of linears, and routers, are of modules that hold more."""
    norms = []
    for path, inner in module.named_modules():
        own = dict(inner.named_parameters())
        if own and not any(inner.children()) and all(parameter.dim() == 1 for parameter in own.values()):
            norms.append({f"{path}.{name}": parameter for name, parameter in own.items()})
    return norms


def with_weights(module: nn.Module, linears: Mapping[str, Linear], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's parameters, as they are stored, that hold `weights` instead of their own: those of linears by their
    name, others by their path. Differentiable."""
    parameters: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        if name not in linears:
            parameters[name] = weight
            continue
        linear = linears[name]
        stored = weight.T if linear.transposed else weight
        if linear.expert is None:
            parameters[linear.path] = stored
        else:
            stacks.setdefault(linear.path, {})[linear.expert] = stored
    for path, experts in stacks.items():
        own = module.get_parameter(path)
        parameters[path] = stacked([experts.get(number, own[number]) for number in range(len(own))])
    return parameters


def room_like(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An empty tensor like each. Those that fill one piece of memory do so again: `stacked` takes it."""
    rooms = {}
    for names in in_one_piece(weights):
        first = weights[names[0]]
        piece = first.new_empty(sum(weights[name].numel() for name in names)) if len(names) > 1 else None
        for name in names:
            weight = weights[name]
            at = (weight.shape, weight.stride(), weight.storage_offset())
            rooms[name] = torch.empty_like(weight) if piece is None else piece.as_strided(*at)
    return {name: rooms[name] for name in weights}


def in_one_piece(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of equal weights that fill one piece of memory, as a stack's do, in its order; of others each alone."""
    by_piece: dict[int, list[str]] = {}
    for name, weight in weights.items():
        by_piece.setdefault(weight.untyped_storage()._cdata, []).append(name)
    groups = []
    for names in by_piece.values():
        names.sort(key=lambda name: weights[name].storage_offset())
        first, shapes = weights[names[0]], {weights[name].shape for name in names}
        whole = len(shapes) == 1 and len(names) * first.nbytes == first.untyped_storage().nbytes()
        groups += [names] if whole else [[name] for name in names]
    return groups


def stacked(parts: Sequence[Shaped[Tensor, "*_part"]]) -> Shaped[Tensor, "expert ..."]:
    """torch.stack(parts), and no copy where they lie one after the other in one piece of memory. Differentiable."""
    first = parts[0]
    piece, start, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    lie = all(
        part.is_contiguous() and (part.untyped_storage()._cdata, part.storage_offset()) == (piece, start + size * place)
        for place, part in enumerate(parts)
    )
    return _Lying.apply(*parts) if lie else torch.stack([*parts])


class _Lying(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        first = parts[0].detach()
        return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.unbind()


@contextmanager
def watch(
    linears: Mapping[str, Linear], on_input: OnInput, on_tokens: OnInput, all_tokens: bool = False
) -> Iterator[None]:
    """Hooks hand over the inputs [*token in] of each of `linears` whenever they run: `on_input` of those that are
    given a tensor of the block, which may be the same for several; `on_tokens` of the experts of a stack, each the
    tokens that the router sends it, none at all included, or with `all_tokens` what all tokens would be there."""
    stacks: dict[nn.Module, dict[tuple[int, str], str]] = {}
    with ExitStack() as hooks:
        for name, linear in linears.items():
            if linear.expert is None:
                hooks.enter_context(linear.module.register_forward_pre_hook(partial(_tell, on_input, name)))
            else:
                names = stacks.setdefault(linear.module, {})
                names[linear.expert, linear.path.rpartition(".")[2]] = name
        for experts, names in stacks.items():
            hook = partial(_tell_experts, on_tokens, names, all_tokens)
            hooks.enter_context(experts.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def replaced_forwards(modules: list[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Modules that compute something else for a while."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward  # on the instance: it hides the class's
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _tell(on_input: OnInput, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    on_input(name, args[0])


def _tell_experts(
    on_tokens: OnInput,
    names: Mapping[tuple[int, str], str],
    all_tokens: bool,
    experts: Any,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
) -> None:
    hidden, chosen = (*args, *kwargs.values())[:2]  # in the interface's order, whatever each family calls them
    hidden = hidden.reshape(-1, hidden.shape[-1])
    first = _first_projection(experts)
    ours = sorted({expert for expert, _ in names})
    # Tokens in the order of their experts, by one sort; only where each expert's begin is read
    by_expert, order = chosen.flatten().sort(stable=True)
    edges = torch.arange(ours[-1] + 2, dtype=chosen.dtype, device=chosen.device)
    begin = torch.searchsorted(by_expert, edges).tolist()
    for expert in ours:
        own = order[begin[expert] : begin[expert + 1]] // chosen.shape[-1]
        tokens = hidden if all_tokens else hidden[own]
        on_tokens(names[expert, first], tokens)
        on_tokens(names[expert, "down_proj"], expert_activations(experts, expert, tokens))


@torch.no_grad()
def expert_activations(experts: Any, expert: int, tokens: Float[Tensor, "token hidden"]) -> Float[Tensor, "token in"]:
    """What `down_proj` of one expert of a stack is given for `tokens`."""
    first = _first_projection(experts)
    weight = getattr(experts, first)[expert]
    projected = tokens @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        projected = projected + getattr(experts, f"{first}_bias")[expert]
    return experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)


def _first_projection(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _num_stacked(module: Any) -> int:
    """How many experts a module holds stacked in the way of transformers' experts interface; 0: it is another."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj")):
        return 0
    stacked = [getattr(module, name, None) for name in (_first_projection(module), "down_proj")]
    is_stack = all(isinstance(parameter, nn.Parameter) and parameter.dim() == 3 for parameter in stacked)
    return len(module.down_proj) if is_stack else 0


def _mixtures(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, int]]:
    """Each mixture inside a module: what holds router and experts, the experts, and their number."""
    for inner in module.modules():
        for child in inner.children():
            if count := _num_stacked(child):
                yield inner, child, count
            elif isinstance(child, nn.ModuleList) and len(child) > 1 and _holds_linears(child):
                yield inner, child, len(child)


def _holds_linears(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())


def _chosen(block: nn.Module) -> set[nn.Module]:
    """All modules inside experts."""
    return {inner for _, experts, _ in _mixtures(block) for inner in experts.modules()}


def _routers(block: nn.Module) -> Collection[nn.Module]:
    """Linears that choose or weigh experts: beside them, with as many outputs as there are experts, or a single one."""
    return {
        linear
        for mixture, experts, count in _mixtures(block)
        for linear in set(mixture.modules()) - set(experts.modules())
        if isinstance(linear, nn.Linear) and linear.out_features in (1, count)
    }
