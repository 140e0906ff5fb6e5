"""What calibration accumulates about the inputs of a linear, in fp32 whatever the weights are.

A sample is one calibration sequence; both statistics are means over samples, as in the authors' codes of Wanda
(arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), so that they do not depend on how samples are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.blocks import Block, Hidden
from besa_exp.errors import RunError


@runtime_checkable
class Statistic(Protocol):
    """Accumulates over batches of a linear's inputs."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor, samples: int) -> None: ...

    def is_finite(self) -> bool: ...


S = TypeVar("S", bound=Statistic)


class InputNorm:
    """Mean over samples of ||X_j||^2, the squared norm of input feature j over the tokens of a sample [in]."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float32, device=device)
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        self.total += inputs.float().flatten(0, -2).square().sum(dim=0)
        self.samples += samples

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """The statistic, called `scaler_row` in Wanda's code."""
        return self.total / self.samples

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.total.isfinite().all())


class Hessian:
    """H = 2/n sum over samples of X^T X [in in], the Hessian of the layer-wise squared error (SparseGPT, Section 3)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        tokens = inputs.float().flatten(0, -2)
        self.total.addmm_(tokens.T, tokens)
        self.samples += samples

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """The statistic."""
        return self.total * (2 / self.samples)

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.total.isfinite().all())


def by_shared_input(statistics: Mapping[str, S]) -> Iterator[tuple[S, tuple[str, ...]]]:
    """Each distinct statistic once, with the linears that share it (q, k and v; gate and up)."""
    groups: dict[int, list[str]] = {}
    for name, statistic in statistics.items():
        groups.setdefault(id(statistic), []).append(name)
    for names in groups.values():
        yield statistics[names[0]], tuple(names)


@torch.no_grad()
def observe(block: Block, inputs: Hidden, statistic: type[S] | None, batch_size: int) -> tuple[dict[str, S], Hidden]:
    """One pass of the block as it is over all samples: a statistic for every linear (linears that are given the same
    tensor share one) and the outputs. RunError: a statistic is not finite, or a linear was never called."""
    if statistic is None:
        return {}, block.outputs(inputs, batch_size)
    batches = inputs.split(batch_size)
    for batch in batches:
        block.arguments(len(batch))  # captured by a pass of the whole model, which must not meet the hooks below
    leaders = _shared_inputs(block, batches[0])
    statistics = {
        leader: statistic(block.linears[leader].in_features, inputs.device) for leader in set(leaders.values())
    }

    samples = 0

    def adder(leader: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: statistics[leader].add(args[0], samples)

    hooks = [block.linears[leader].register_forward_pre_hook(adder(leader)) for leader in statistics]
    outputs = []
    try:
        for batch in batches:
            samples = len(batch)
            outputs.append(block(batch))
    finally:
        for hook in hooks:
            hook.remove()
    for leader, observed in statistics.items():
        if not observed.is_finite():
            raise RunError(
                f"{block.name}.{leader}: the statistic of its inputs is not finite (NaN or inf in the calibration "
                "activations); load the model in float32 or bfloat16 (model.dtype) or check its weights."
            )
    return {name: statistics[leaders[name]] for name in block.linears}, torch.cat(outputs)


def _shared_inputs(block: Block, inputs: Hidden) -> dict[str, str]:
    """For every linear, the first linear that is given the very same tensor."""
    order: list[tuple[str, Tensor]] = []  # keeps the tensors alive, so that identities stay distinct

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: order.append((name, args[0]))

    hooks = [linear.register_forward_pre_hook(recorder(name)) for name, linear in block.linears.items()]
    try:
        block(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first: dict[int, str] = {}
    leaders = {name: first.setdefault(id(tensor), name) for name, tensor in order}
    missing = sorted(set(block.linears) - set(leaders))
    if missing:
        raise RunError(f"{block.name}: {', '.join(missing)} did not run on the calibration tokens; cannot prune it.")
    return leaders
