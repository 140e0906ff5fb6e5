"""What calibration accumulates about the inputs of a linear, in fp32 whatever the weights are.

A sample is one calibration sequence; squared norms and Hessians are means over samples, as in the authors' codes of
Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), so that they do not depend on how samples are batched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp import distributed
from besa_exp.blocks import Block, Hidden
from besa_exp.errors import RunError
from besa_exp.linears import Linear, watch

FEW_TOKENS = 32  # with fewer the norm of an input is known to worse than an eighth: 1 / sqrt(2 * tokens)
logger = logging.getLogger(__name__)


@runtime_checkable
class Statistic(Protocol):
    """Accumulates over batches of a linear's inputs."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor, samples: int) -> None: ...

    def sum_over_ranks(self) -> None: ...

    def is_finite(self) -> bool: ...


@runtime_checkable
class WithNorm(Statistic, Protocol):
    """A statistic that tells what `InputNorm` does, whatever else."""

    @property
    def squared_norm(self) -> Float[Tensor, " in"]: ...


S = TypeVar("S", bound=Statistic)


class InputNorm:
    """Mean over samples of ||X_j||^2, the squared norm of input feature j over the tokens of a sample [in].

    Squares are fp32, their sums fp64: how samples are batched and dealt out to ranks does not show in fp32, where one
    unit in the last place can swap the ranks of two weights."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        self.total += inputs.float().flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
        self.samples += samples

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """The statistic, called `scaler_row` in Wanda's code."""
        return (self.total / self.samples).float()

    def sum_over_ranks(self) -> None:
        """That of the samples of all ranks."""
        self.total, self.samples = distributed.all_sum(self.total), distributed.total(self.samples)

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.total.float().isfinite().all())


class InputMoments:
    """What DSnoT (arXiv 2310.08915) asks of each input feature: `squared_norm` as `InputNorm` has it, the mean over
    samples of its sum over a sample's tokens, and its variance over all tokens. Sums are fp64, as there."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros_like(self.squares)
        self.samples = self.tokens = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        tokens = inputs.float().flatten(0, -2)
        self.squares += tokens.square().sum(dim=0, dtype=torch.float64)
        self.sums += tokens.sum(dim=0, dtype=torch.float64)
        self.samples += samples
        self.tokens += len(tokens)

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """Mean over samples of ||X_j||^2."""
        return (self.squares / self.samples).float()

    @property
    def total(self) -> Float[Tensor, " in"]:
        """Mean over samples of the sum over a sample's tokens."""
        return (self.sums / self.samples).float()

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """E[x^2] - E[x]^2 over all tokens."""
        mean = self.sums / self.tokens
        return (self.squares / self.tokens - mean.square()).clamp(min=0).float()

    def sum_over_ranks(self) -> None:
        """Those of the samples of all ranks."""
        self.squares, self.sums = distributed.all_sum(self.squares), distributed.all_sum(self.sums)
        self.samples, self.tokens = distributed.total(self.samples), distributed.total(self.tokens)

    def is_finite(self) -> bool:
        """Whether no input overflowed or was NaN."""
        return bool(self.squares.float().isfinite().all())


class Hessian:
    """H = 2/n sum over samples of X^T X [in in], the Hessian of the layer-wise squared error (SparseGPT, Section 3)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device)  # right where above the diagonal
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"], samples: int) -> None:
        """Accumulate the tokens of `samples` more samples (some models flatten samples and tokens into one axis)."""
        tokens = inputs.float().flatten(0, -2)
        columns = tokens.shape[1]
        width = max(columns // 16, 128)  # H is symmetric: panels that reach from the diagonal to the right spare 15/32
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
    not finite, or a linear was never called.

    Experts of a stack that fewer than FEW_TOKENS tokens reach are given all tokens in a second pass; other experts that
    none reach count every input alike, so that their weights' magnitude decides. Both are named in the log."""
    if statistic is None:
        return {}, block.outputs(inputs, batch_size, out=out)
    outputs = torch.empty_like(inputs) if out is None else out
    statistics, tokens = _pass(block, inputs, statistic, batch_size, block.linears, outputs)
    few = {
        name: linear
        for name, linear in block.linears.items()
        if linear.expert is not None and tokens.get(name, 0) < FEW_TOKENS
    }
    if few:
        logger.info("%s: %s; calibrated on all tokens", block.name, _few_tokens(few, tokens))
        statistics |= _pass(block, inputs, statistic, batch_size, few, None)[0]
    for name, linear in block.linears.items():
        if name not in statistics and linear.of_mixture:
            logger.info("%s.%s: no token reached it; its weights' magnitude decides", block.name, name)
            columns, device = linear.weight.shape[1], linear.weight.device
            statistics[name] = statistic(columns, device)
            statistics[name].add(torch.eye(columns, device=device), 1)
        if name not in statistics:
            raise RunError(f"{block.name}: {name} did not run on the calibration tokens; cannot prune it.")
        if not statistics[name].is_finite():
            raise RunError(
                f"{block.name}.{name}: the statistic of its inputs is not finite (NaN or inf in the calibration "
                "activations); load the model in float32 or bfloat16 (model.dtype) or check its weights."
            )
    return statistics, outputs


def _few_tokens(few: Mapping[str, Linear], tokens: Mapping[str, int]) -> str:
    """`mlp.experts: fewer than 32 tokens reached 3 (0 tokens), 17 (12)`."""
    seen: dict[str, dict[str, None]] = {}
    for name, linear in few.items():
        seen.setdefault(linear.path.rpartition(".")[0], {})[f"{linear.expert} ({tokens.get(name, 0)})"] = None
    return "; ".join(
        f"{path}: fewer than {FEW_TOKENS} tokens reached experts {', '.join(found)}" for path, found in seen.items()
    )


def _pass(
    block: Block,
    inputs: Hidden,
    statistic: type[S],
    batch_size: int,
    linears: Mapping[str, Linear],
    out: Hidden | None,
) -> tuple[dict[str, S], dict[str, int]]:
    """The statistics of `linears` over all samples, and the tokens that reached each, both of all ranks; the block's
    outputs into `out`. Without `out` experts are given all tokens."""
    for batch in inputs.split(batch_size):
        block.arguments(len(batch))  # captured by a pass of the model, which must not meet the hooks below
    observer = _Observer(statistic)
    hooks = watch(linears, observer.add_shared, observer.add, all_tokens=out is None)
    hooks.append(block.module.register_forward_pre_hook(observer.next_batch, with_kwargs=True))
    try:
        if out is None:
            for batch in inputs.split(batch_size):
                block(batch)
        else:
            block.outputs(inputs, batch_size, out=out)
    finally:
        for hook in hooks:
            hook.remove()
    tokens: dict[str, int] = {}
    for counts in distributed.gathered(observer.tokens):
        tokens |= {name: tokens.get(name, 0) + count for name, count in counts.items()}
    return _of_all_ranks(block, observer.statistics, statistic), tokens


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
        weight = block.linears[name].weight
        summed[name] = own[name] if name in own else statistic(weight.shape[1], weight.device)
        summed[name].sum_over_ranks()
    return {name: summed[leaders[name]] for name in block.linears if name in leaders}


class _Observer(Generic[S]):
    """Adds up the inputs of linears as the block runs; those that are given the same tensor share one statistic.

    `seen` keeps the inputs of the forward pass under way alive, so that their identities stay distinct."""

    def __init__(self, statistic: type[S]) -> None:
        self.statistic = statistic
        self.statistics: dict[str, S] = {}
        self.tokens: dict[str, int] = {}
        self.seen: list[tuple[str, Tensor]] = []
        self.samples = 0

    def next_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass of the block."""
        self.seen.clear()
        self.samples = len(args[0] if args else kwargs["hidden_states"])

    def add_shared(self, name: str, inputs: Tensor) -> None:
        """Adds the inputs of the linear `name` to its statistic, unless they were added for another."""
        for leader, tensor in self.seen:
            if tensor is inputs:
                self.statistics.setdefault(name, self.statistics[leader])
                return
        self.seen.append((name, inputs))
        self.add(name, inputs)

    def add(self, name: str, inputs: Tensor) -> None:
        """Adds the inputs of the linear `name`, none at all included, to its own statistic."""
        self.tokens[name] = self.tokens.get(name, 0) + inputs.shape[:-1].numel()
        if name not in self.statistics:
            self.statistics[name] = self.statistic(inputs.shape[-1], inputs.device)
        self.statistics[name].add(inputs, self.samples)
