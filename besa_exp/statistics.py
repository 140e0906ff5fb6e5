"""What calibration accumulates about the inputs of a linear, in fp32 whatever the weights are.

A sample is one calibration sequence; both statistics are means over samples, as in the authors' codes of Wanda
(arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), so that they do not depend on how samples are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp import distributed
from besa_exp.blocks import Block, Hidden
from besa_exp.errors import RunError


@runtime_checkable
class Statistic(Protocol):
    """Accumulates over batches of a linear's inputs."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor, samples: int) -> None: ...

    def sum_over_ranks(self) -> None: ...

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

    def sum_over_ranks(self) -> None:
        """That of the samples of all ranks."""
        self.total, self.samples = distributed.all_sum(self.total), distributed.total(self.samples)

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.total.isfinite().all())


class Hessian:
    """H = 2/n sum over samples of X^T X [in in], the Hessian of the layer-wise squared error (SparseGPT, Section 3)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device)  # right where above the diagonal
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        tokens = inputs.float().flatten(0, -2)
        columns = tokens.shape[1]
        width = max(columns // 8, 256)  # H is symmetric: panels that reach from the diagonal to the right spare 7/16
        for start in range(0, columns, width):
            panel = slice(start, start + width)
            self.upper[panel, start:].addmm_(tokens[:, panel].T, tokens[:, start:])
        self.samples += samples

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """The statistic."""
        upper = self.upper.triu()
        return (upper + upper.triu(1).T).mul_(2 / self.samples)

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """What `InputNorm` accumulates: half the diagonal."""
        return self.upper.diagonal() / self.samples

    def sum_over_ranks(self) -> None:
        """That of the samples of all ranks."""
        self.upper, self.samples = distributed.all_sum(self.upper), distributed.total(self.samples)

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.upper.isfinite().all())


def by_shared_input(statistics: Mapping[str, S]) -> Iterator[tuple[S, tuple[str, ...]]]:
    """Each distinct statistic once, with the linears that share it (q, k and v; gate and up)."""
    groups: dict[int, list[str]] = {}
    for name, statistic in statistics.items():
        groups.setdefault(id(statistic), []).append(name)
    for names in groups.values():
        yield statistics[names[0]], tuple(names)


@torch.no_grad()
def observe(
    block: Block, inputs: Hidden, statistic: type[S] | None, batch_size: int, out: Hidden | None = None
) -> tuple[dict[str, S], Hidden]:
    """One pass of the block as it is over all samples: a statistic, of the samples of all ranks, for every linear
    (linears that are given the same tensor share one) and the outputs, into `out` where given. RunError: a statistic is
    not finite, or a linear was never called."""
    if statistic is None:
        return {}, block.outputs(inputs, batch_size, out=out)
    for batch in inputs.split(batch_size):
        block.arguments(len(batch))  # captured by a pass of the model, which must not meet the hooks below
    observer = _Observer(statistic)
    hooks = [linear.register_forward_pre_hook(observer.hook(name)) for name, linear in block.linears.items()]
    hooks.append(block.module.register_forward_pre_hook(observer.next_batch, with_kwargs=True))
    try:
        outputs = block.outputs(inputs, batch_size, out=out)
    finally:
        for hook in hooks:
            hook.remove()
    statistics = _of_all_ranks(block, observer.statistics, statistic)
    for name in block.linears:
        if name not in statistics:
            raise RunError(f"{block.name}: {name} did not run on the calibration tokens; cannot prune it.")
        if not statistics[name].is_finite():
            raise RunError(
                f"{block.name}.{name}: the statistic of its inputs is not finite (NaN or inf in the calibration "
                "activations); load the model in float32 or bfloat16 (model.dtype) or check its weights."
            )
    return statistics, outputs


def _of_all_ranks(block: Block, own: Mapping[str, S], statistic: type[S]) -> dict[str, S]:
    """The statistics summed over ranks. A linear that some ranks' samples do not reach, as in a mixture of experts, has
    nothing to add there."""
    if distributed.num_ranks() == 1:
        return dict(own)
    leaders: dict[str, str] = {}  # of the linears that share a statistic the first, by linear
    for found in distributed.gathered({name: names[0] for _, names in by_shared_input(own) for name in names}):
        leaders |= found
    summed: dict[str, S] = {}
    for name in sorted(set(leaders.values())):
        linear = block.linears[name]
        summed[name] = own[name] if name in own else statistic(linear.in_features, linear.weight.device)
        summed[name].sum_over_ranks()
    return {name: summed[leaders[name]] for name in block.linears if name in leaders}


class _Observer(Generic[S]):
    """Finds out as the block runs which linears are given the same tensor, and lets them share one statistic.

    `seen` keeps the inputs of the forward pass under way alive, so that their identities stay distinct."""

    def __init__(self, statistic: type[S]) -> None:
        self.statistic = statistic
        self.statistics: dict[str, S] = {}
        self.seen: list[tuple[str, Tensor]] = []
        self.samples = 0

    def next_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass of the block."""
        self.seen.clear()
        self.samples = len(args[0] if args else kwargs["hidden_states"])

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Adds the inputs of the linear `name` to its statistic, unless they were added for another."""
        return lambda module, args: self._add(name, args[0])

    def _add(self, name: str, inputs: Tensor) -> None:
        for leader, tensor in self.seen:
            if tensor is inputs:
                self.statistics.setdefault(name, self.statistics[leader])
                return
        self.seen.append((name, inputs))
        if name not in self.statistics:
            self.statistics[name] = self.statistic(inputs.shape[-1], inputs.device)
        self.statistics[name].add(inputs, self.samples)
