"""One pass over a block that watches what its linears are given: a statistic for each, and the block's outputs; and
passes that differentiate the block, for importances that ask for gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.linears import Linear, watch
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.tensors.importance import Importance
from besa_exp.tensors.statistics import S, by_shared_input, is_finite

FEW_TOKENS = 32  # with fewer the norm of an input is known to worse than an eighth: 1 / sqrt(2 * tokens)
logger = logging.getLogger(__name__)


@torch.no_grad()
def observe(
    block: Block, inputs: Hidden, statistic: type[S] | None, batch_size: int, out: Hidden | None = None
) -> tuple[dict[str, S], Hidden]:
    """One pass of the block as it is over all samples: a statistic, of the samples of all ranks, for every linear
    (linears that are given the same tensor share one) and the outputs, into `out` where given, which may be `inputs`
    itself. RunError: a statistic is not finite, or a linear was never called.

    Experts of a stack that fewer than FEW_TOKENS tokens reach are given all tokens in a second pass; other experts that
    none reach count every input alike, so that their weights' magnitude decides. Both are named in the log."""
    if statistic is None:
        return {}, block.outputs(inputs, batch_size, out=out)
    outputs = torch.empty_like(inputs) if out is None else out
    if out is inputs and any(linear.expert is not None for linear in block.linears.values()):
        inputs = inputs.clone()  # for a second pass
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
            statistics[name].add(torch.eye(columns, device=device))
            statistics[name].sum_over_ranks(distributed.num_ranks())  # each adds the same
        if name not in statistics:
            raise RunError(f"{block.name}: {name} did not run on the calibration tokens; cannot prune it.")
        if not statistics[name].is_finite():
            raise RunError(
                f"{block.name}.{name}: the statistic of its inputs is not finite (NaN or inf in the calibration "
                "activations); load the model in float32 or bfloat16 (model.dtype) or check its weights."
            )
    return statistics, outputs


def squared_gradients(block: Block, inputs: Hidden) -> dict[str, Float[Tensor, "_out _in"]]:
    """E[(d||f(X)||_2 / dW)^2] of every linear, the mean over the samples X of all ranks, in fp32: how much the block's
    output moves with each weight. One forward and one backward pass a sample. RunError: a gradient is not finite."""

    def gradients_of(sample: Hidden, leaves: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad():
            norm = block(sample, leaves).float().norm()
        return torch.autograd.grad(norm, [*leaves.values()], materialize_grads=True)

    found = mean_squares(block.weights, inputs, gradients_of)
    for name, own in found.items():
        if not is_finite(own):
            raise RunError(
                f"{block.name}.{name}: the gradient to its weights is not finite; load the model in float32 or "
                "bfloat16 (model.dtype) or check its weights."
            )
    return found


def mean_squares(
    weights: Mapping[str, Float[Tensor, "_out _in"]],
    inputs: Hidden,
    gradients_of: Callable[[Hidden, Mapping[str, Tensor]], Sequence[Tensor]],
) -> dict[str, Float[Tensor, "_out _in"]]:
    """The mean over the samples of all ranks of the squares, in fp32, of what `gradients_of` gives for a sample and
    copies of the weights that take a gradient."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    total = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    for sample in inputs.split(1) if len(inputs) else ():  # a rank may own none
        for name, gradient in zip(total, gradients_of(sample, leaves), strict=True):
            total[name] += gradient.float().square()
    num_samples = distributed.total(len(inputs))
    return {name: distributed.all_sum(own) / num_samples for name, own in total.items()}


@dataclass(frozen=True)
class Observed:
    """What was observed about one block, and how important its weights are by that; computed when asked for."""

    importance: Importance
    statistics: Mapping[str, Any]
    squared_gradients: Mapping[str, Tensor]

    @staticmethod
    def of(
        importance: Importance, block: Block, inputs: Hidden, batch_size: int, out: Hidden | None = None
    ) -> tuple[Observed, Hidden]:
        """One pass of the block as it is, and what it makes of the inputs, into `out` where given."""
        gradients = squared_gradients(block, inputs) if importance.gradients else {}
        statistics, outputs = observe(block, inputs, importance.statistic, batch_size, out)
        return Observed(importance, statistics, gradients), outputs

    def score(self, block: Block, name: str) -> Float[Tensor, "out in"]:
        """The importance of one linear's weights; the block has them now. RunError: it is no number for each."""
        weight = block.linears[name].weight.detach()
        scores = self.importance(weight, self.statistics.get(name), self.squared_gradients.get(name))
        what = f"{block.name}.{name}: the importance {type(self.importance).__name__}"
        check_tensor(f"{what}: a score for each weight", scores, weight.shape)
        # Infinite ones are a choice: such weights stay. NaN of weights that are NaN is told where these are written.
        if torch.stack(scores.aminmax()).isnan().any() and is_finite(weight):
            raise RunError(f"{what} gave NaN, which has no rank; look for 0/0, and for roots of negative numbers")
        return scores


def check_tensor(what: str, found: object, shape: torch.Size, is_mask: bool = False) -> None:
    """RunError: it is no tensor of this shape, or of another kind. Values in the place of weights are numbers with a
    point: integers would be rounded ones."""
    kind = "torch.bool" if is_mask else "floating point"
    if not isinstance(found, Tensor):
        raise RunError(f"{what} must be {kind} {[*shape]}, not {type(found).__name__}")
    if found.shape != shape or not (found.dtype == torch.bool if is_mask else found.is_floating_point()):
        raise RunError(f"{what} must be {kind} {[*shape]}, not {found.dtype} {[*found.shape]}")


def _few_tokens(few: Mapping[str, Linear], tokens: Mapping[str, int]) -> str:
    """`mlp.experts: fewer than 32 tokens reached 3 (0 tokens), 17 (12)`."""
    seen: dict[str, dict[str, None]] = {}
    for name, linear in few.items():
        seen.setdefault(linear.path.rpartition(".")[0], {})[f"{linear.expert} ({tokens.get(name, 0)})"] = None
    return "; ".join(
        f"{path}: fewer than {FEW_TOKENS} tokens reached experts {', '.join(found)}" for path, found in seen.items()
    )


def _pass(
    block: Block, inputs: Hidden, statistic: type[S], batch_size: int, linears: Mapping[str, Linear], out: Hidden | None
) -> tuple[dict[str, S], dict[str, int]]:
    """The statistics of `linears` over all samples, and the tokens that reached each, both of all ranks; the block's
    outputs into `out`. Without `out` experts are given all tokens."""
    for batch in inputs.split(batch_size):
        block.arguments(len(batch))  # captured by a pass of the model, which must not meet the hooks below
    observer = _Observer(statistic)
    with (
        watch(linears, observer.add_shared, observer.add, all_tokens=out is None),
        block.module.register_forward_pre_hook(observer.next_batch),
    ):
        if out is None:
            for batch in inputs.split(batch_size):
                block(batch)
        else:
            block.outputs(inputs, batch_size, out=out)
    tokens: dict[str, int] = {}
    for counts in distributed.gathered(observer.tokens):
        tokens |= {name: tokens.get(name, 0) + count for name, count in counts.items()}
    return _of_all_ranks(block, observer.statistics, statistic, distributed.total(len(inputs))), tokens


def _of_all_ranks(block: Block, own: Mapping[str, S], statistic: type[S], samples: int) -> dict[str, S]:
    """The statistics summed over ranks, of all `samples`. A linear that some ranks' samples do not reach, as in a
    mixture of experts, has nothing to add there."""
    leaders: dict[str, str] = {}  # of the linears that share a statistic the first, by linear
    for found in distributed.gathered({name: names[0] for _, names in by_shared_input(own) for name in names}):
        leaders |= found
    summed: dict[str, S] = {}
    for name in sorted(set(leaders.values())):
        weight = block.linears[name].weight
        summed[name] = own[name] if name in own else statistic(weight.shape[1], weight.device)
        summed[name].sum_over_ranks(samples)
    return {name: summed[leader] for name, leader in leaders.items()}


class _Observer(Generic[S]):
    """Adds up the inputs of linears as the block runs; those that are given the same tensor share one statistic.

    `seen` keeps the inputs of the forward pass under way alive, so that their identities stay distinct."""

    def __init__(self, statistic: type[S]) -> None:
        self.statistic = statistic
        self.statistics: dict[str, S] = {}
        self.tokens: dict[str, int] = {}
        self.seen: list[tuple[str, Tensor]] = []

    def next_batch(self, module: nn.Module, args: object) -> None:
        """Before each forward pass of the block."""
        self.seen.clear()

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
        self.statistics[name].add(inputs)
