"""ShortGPT: the blocks that change the hidden states least go, all at once (Men et al., arXiv 2403.03853).

    BI_i = mean over tokens of 1 - cos(x_i, x_{i+1}),    x_i, x_{i+1} the states before and after block i.

The angular metric removes a run of n blocks in a row instead (Gromov et al., arXiv 2403.17887), that of least

    d(s, n) = mean over samples of arccos(cos(x_s, x_{s+n})) / pi    at the last token.

Products are fp32 whatever the states are, their sums fp64; of a state of zeros the cosine is 0. The authors' code
computes in fp16, where 1 - cos moves in steps of 0.0005 and a cosine that overflows counts as 0.5, and takes the last
block's output after the final norm, where that block's own output is taken here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.rules import CountOrZero, Fraction, check_fields, one_of, within

Removed = Annotated[int, within(least=1, note="as structure=null removes none")]
SMALLEST = 1e-30  # of a product of norms


def cosine(one: Float[Tensor, "*token hidden"], other: Float[Tensor, "*token hidden"]) -> Float[Tensor, "*token"]:
    """<x, y> / (||x|| ||y||) of each token, in fp64 from fp32 products; 0 where one is zero."""
    one, other = one.float(), other.float()
    product, first, second = (
        (x * y).sum(dim=-1, dtype=torch.float64) for x, y in ((one, other), (one, one), (other, other))
    )
    return (product / (first * second).sqrt().clamp(min=SMALLEST)).clamp(-1, 1)


def block_influence(before: Hidden, after: Hidden) -> Float[Tensor, "sample seq"]:
    """1 - cos(x_i, x_{i+1}) of each token."""
    return 1 - cosine(before, after)


def angular_distance(
    one: Float[Tensor, "*token hidden"], other: Float[Tensor, "*token hidden"]
) -> Float[Tensor, "*token"]:
    """arccos(cos(x, y)) / pi of each token, in [0, 1]."""
    return cosine(one, other).arccos() / torch.pi


@dataclass(frozen=True)
class Passage:
    """One pass of the dense model: BI of each block, over the tokens of all ranks, and this rank's samples' states at
    the last token, before the first block and after each."""

    influence: Float[Tensor, " block"]
    last_tokens: Float[Tensor, "depth sample hidden"]


@torch.no_grad()
def passage(blocks: Iterable[Block], inputs: Hidden, batch_size: int) -> Passage:
    """`inputs`, those of the first block, are overwritten; each block is read once."""
    influence, last = [], [inputs[:, -1].float().cpu().clone()]
    for block in blocks:
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(inputs), batch_size):
            batch = slice(start, start + batch_size)
            after = block(inputs[batch])
            total = total + block_influence(inputs[batch].to(after.device), after).double().sum()
            inputs[batch] = after
        tokens = distributed.total(len(inputs)) * inputs.shape[1]
        influence.append(distributed.all_sum(total.cpu()) / tokens)
        last.append(inputs[:, -1].float().cpu().clone())
    return Passage(torch.stack(influence), torch.stack(last))


def least_influential(influence: Float[Tensor, " block"], count: int, protected: Sequence[int] = ()) -> list[int]:
    """The blocks to remove in order, the least first; of equals the earlier."""
    order = torch.argsort(influence, stable=True).tolist()
    return [block for block in order if block not in protected][:count]


def least_turning_run(
    last_tokens: Float[Tensor, "depth sample hidden"], count: int, protected: Sequence[int] = ()
) -> tuple[list[int], Float[Tensor, " start"]]:
    """The `count` blocks in a row across which states turn least, and d(s, count) of each start s. Infinite: a
    protected block is among them."""
    starts = len(last_tokens) - count
    angles = angular_distance(last_tokens[:starts], last_tokens[count:]).double().sum(dim=1)
    distances = distributed.all_sum(angles) / distributed.total(last_tokens.shape[1])
    for start in range(starts):
        if any(start <= block < start + count for block in protected):
            distances[start] = torch.inf
    start = int(distances.argmin())
    return [*range(start, start + count)], distances


@dataclass(frozen=True)
class ShortGPT:
    """`blocks` are removed; None: as many as come nearest to `ratio` of all parameters. `metric`: `influence`, each
    block by itself, or `angular`, a run. `protect_first`, `protect_last`: so many blocks stay at each end."""

    blocks: Removed | None = None
    ratio: Fraction | None = None
    metric: Annotated[str, one_of("influence", "angular")] = "influence"
    protect_first: CountOrZero = 0
    protect_last: CountOrZero = 0

    narrows = False
    saved_as = None

    def __post_init__(self) -> None:
        check_fields(self, "structure")
        check_amount(self.blocks, self.ratio)

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        protected = {"protect_first": self.protect_first, "protect_last": self.protect_last}
        return amount_problems(self.blocks, self.ratio, costs, protected)

    def work(self, costs: Costs, num_samples: int, batch_size: int) -> Work:
        return Work(0, num_samples * len(costs.blocks))

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """From one pass of the dense model. What was measured of each block, or run of blocks, is kept."""
        on_progress("one pass of the dense model")
        found = passage(dense.blocks(), dense.inputs(), dense.batch_size)
        removed, told = self.removed(found, dense.costs)
        progress.write(told)
        return without(removed, len(found.influence))

    def removed(self, found: Passage, costs: Costs) -> tuple[list[int], dict[str, list[float | None]]]:
        """The blocks that go, and of each block its influence, or of each first block of a run the distance across it;
        None: protected. RunError: a state is not finite."""
        if wrong := (~found.influence.isfinite()).nonzero().flatten().tolist():
            raise RunError(
                f"structure=shortgpt: the states before or after block {wrong[0]} are not finite; load the model in "
                "float32 or bfloat16 (model.dtype)"
            )
        count, number = amount(self.blocks, self.ratio, costs), len(found.influence)
        protected = [*range(self.protect_first), *range(number - self.protect_last, number)]
        if self.metric == "influence":
            return least_influential(found.influence, count, protected), {"influence": found.influence.tolist()}
        removed, distances = least_turning_run(found.last_tokens, count, protected)
        return removed, {"angular_distance": [one if math.isfinite(one) else None for one in distances.tolist()]}


def without(removed: Sequence[int], num_blocks: int) -> Structure:
    """What stays after these blocks are gone."""
    return Structure(tuple(block for block in range(num_blocks) if block not in removed))


def check_amount(blocks: int | None, ratio: float | None) -> None:
    """ValueError: neither is given."""
    if blocks is None and ratio is None:
        raise ValueError(
            "structure.blocks=null and structure.ratio=null: give one of the two, the number of blocks to remove or "
            "the share of all parameters"
        )


def amount(blocks: int | None, ratio: float | None, costs: Costs) -> int:
    """How many blocks go: `blocks`, or as many as come nearest to `ratio` of all parameters, blocks being equal in the
    mean; of two equally near the fewer."""
    if blocks is not None:
        return blocks
    assert ratio is not None, "check_amount has seen one of the two"
    each = sum(costs.blocks) / len(costs.blocks)
    wanted = ratio * costs.total
    return min(range(len(costs.blocks) + 1), key=lambda count: abs(count * each - wanted))


def amount_problems(blocks: int | None, ratio: float | None, costs: Costs, protected: Mapping[str, int]) -> list[str]:
    """Why so many blocks cannot go, in complete sentences. `protected`: how many stay at each end, by the key that says
    so."""
    number, count = len(costs.blocks), amount(blocks, ratio, costs)
    asked = f"structure.blocks={blocks}" if blocks is not None else f"structure.ratio={ratio}"
    free = number - sum(protected.values())
    if count == 0 and ratio is not None:
        share = costs.blocks[0] / costs.total
        return [
            f"{asked}: a single block of the {number} has {share:.1%} of the parameters; set at least {share / 2:.3f}"
        ]
    if count >= number:
        return [f"{asked}: would remove all {number} blocks; at least one must stay"]
    if count > max(free, 0):
        return [
            f"{asked}: would remove {count} blocks, and {max(free, 0)} of the {number} are not protected "
            f"({', '.join(f'structure.{key}={value}' for key, value in protected.items())})"
        ]
    return []
