"""How many groups of heads and channels each block keeps, and which: importances, and the choice under a budget.

A unit's importance is read off the columns that carry it, those of o for a head and of down for a channel:

    I_j = mean over outputs i of |W_ij| ||X_j||,    ||X_j||^2 the mean over samples (Wanda-sp; magnitude: ||X_j|| = 1),

a head's is the sum over its columns, and a group's the mean over its heads. X are inputs behind blocks that have lost
already what they lose. The budget is one number of parameters for heads and channels of all blocks together, where
published methods give each kind the same share: a group of heads and a channel cost differently, and a model's size is
what is asked for. Each block keeps at least one group and one multiple of channels: a block without heads cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.linears import Linear
from besa_exp.blocks.observation import observe
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.rules import Count, Fraction, Seed, check_fields, one_of
from besa_exp.tensors.statistics import InputNorm

OF_HEADS = ("self_attn.o_proj",)
OF_CHANNELS = ("mlp.down_proj", "fc2", "mlp.dense_4h_to_h", "mlp.c_proj")
IMPORTANCES = ("wanda_sp", "magnitude", "random")


@dataclass(frozen=True)
class Importances:
    """One number for each unit of each block: importances, or probabilities to stay."""

    groups: Float[Tensor, "block group"]
    channels: Float[Tensor, "block channel"]

    @property
    def flat(self) -> Float[Tensor, " unit"]:
        """All groups of all blocks, then all channels."""
        return torch.cat([self.groups.flatten(), self.channels.flatten()])


def column_importance(
    weight: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"] | None = None
) -> Float[Tensor, " in"]:
    """I_j of each column, in fp32."""
    sizes = weight.float().abs().mean(dim=0)
    return sizes if squared_norm is None else sizes * squared_norm.sqrt()


def group_importance(columns: Float[Tensor, " in"], dimensions: Dimensions) -> Float[Tensor, " group"]:
    """Of each group, from the importances of o's columns: the mean over its heads of the sum over a head's."""
    heads = columns.view(dimensions.heads, dimensions.head_dim).sum(dim=1)
    return heads.view(dimensions.groups, dimensions.heads_of_group).mean(dim=1)


def carrying_linears(linears: Mapping[str, Linear]) -> tuple[str, str]:
    """The names of the linears whose columns are a block's heads, and its channels. ValueError: there are none."""
    names = [next((name for name in known if name in linears), None) for known in (OF_HEADS, OF_CHANNELS)]
    if names[0] is None or names[1] is None:
        raise ValueError(
            f"structure: widths are read off {' or '.join(OF_HEADS)} and {' or '.join(OF_CHANNELS)}, which a block of "
            f"{', '.join(list(linears)[:4])} ... has not; remove blocks (structure=shortgpt or sleb)"
        )
    return names[0], names[1]


def random_importances(dimensions: Dimensions, seed: int) -> Importances:
    """Normal draws, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (dimensions.blocks, dimensions.groups), (dimensions.blocks, dimensions.channels)
    groups, channels = (torch.randn(shape, generator=generator) for shape in shapes)
    return Importances(groups, channels)


@torch.no_grad()
def importances_of(
    blocks: Iterable[Block],
    inputs: Hidden,
    dimensions: Dimensions,
    kept: tuple[int, int],
    batch_size: int,
    norms: bool = True,
) -> Importances:
    """Wanda-sp's, block by block on the outputs of the blocks before it, each with its `kept` most important groups and
    channels alone; without `norms` magnitude's, which need no inputs. `inputs`, of the first block, are overwritten."""
    groups, channels = [], []
    for block in blocks:
        attention, ffn = carrying_linears(block.linears)
        squared: dict[str, Tensor] = {}
        if norms:
            statistics, _ = observe(block, inputs, InputNorm, batch_size, torch.empty_like(inputs))
            squared = {name: statistics[name].squared_norm for name in (attention, ffn)}
        columns = [column_importance(block.linears[name].weight, squared.get(name)) for name in (attention, ffn)]
        groups.append(group_importance(columns[0], dimensions).cpu())
        channels.append(columns[1].cpu())
        if norms:
            found = zip((groups, channels), kept, strict=True)
            own_groups, own_channels = (_largest(one[-1][None], [number])[0] for one, number in found)
            with masked(block, own_groups, own_channels, dimensions):
                block.outputs(inputs, batch_size, out=inputs)
    return Importances(torch.stack(groups), torch.stack(channels))


def importances_by_name(name: str, dense: DenseModel, kept: tuple[int, int], seed: int) -> Importances:
    """Of one of IMPORTANCES; `kept`: see `importances_of`."""
    if name == "random":
        return random_importances(dense.dimensions, seed)
    norms = name == "wanda_sp"
    return importances_of(dense.blocks(), dense.inputs(), dense.dimensions, kept, dense.batch_size, norms)


def importance_work(name: str, costs: Costs, num_samples: int) -> Work:
    """What `importances_by_name` asks for: the norms, and then the outputs without what is least important."""
    return Work(0, 2 * num_samples * len(costs.blocks) * (name == "wanda_sp"))


@dataclass(frozen=True)
class Widths:
    """`ratio` of all parameters go: of every block as many groups and as many channels, those of least `importance`,
    channels in multiples of `multiple`."""

    ratio: Fraction
    importance: Annotated[str, one_of(*IMPORTANCES)] = "wanda_sp"
    multiple: Count = 1
    seed: Seed = 0

    narrows = True
    saved_as = None

    def __post_init__(self) -> None:
        check_fields(self, "structure")

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        return width_amount_problems(costs, dimensions, self.ratio, self.multiple)

    def work(self, costs: Costs, num_samples: int, batch_size: int) -> Work:
        return importance_work(self.importance, costs, num_samples)

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """In one walk through the blocks; nothing is kept on the way."""
        on_progress(f"importances of {self.importance}")
        kept = even_widths(dense.costs, dense.dimensions, self.ratio, self.multiple)
        importances = importances_by_name(self.importance, dense, kept, self.seed)
        return proportional(importances, kept)


@contextmanager
def masked(
    block: Block, groups: Bool[Tensor, "*row group"], channels: Bool[Tensor, "*row channel"], dimensions: Dimensions
) -> Iterator[None]:
    """The block, and with it its model, computes with only these groups and channels for as long as this lasts, of all
    rows of a batch or of each its own: what enters o and down is multiplied by 1 or 0."""
    heads = groups.repeat_interleave(dimensions.heads_of_group * dimensions.head_dim, dim=-1)
    with ExitStack() as hooks:
        for name, mask in zip(carrying_linears(block.linears), (heads, channels), strict=True):
            linear = block.linears[name]
            times = partial(_times, mask.to(linear.weight.device, linear.weight.dtype).unsqueeze(-2))
            hooks.enter_context(linear.module.register_forward_pre_hook(times))
        yield


def _times(factor: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0] * factor.to(args[0].dtype), *args[1:]


def kept_parameters(costs: Costs, ratio: float) -> int:
    """How many parameters may stay where `ratio` of all go."""
    return round((1 - ratio) * costs.total)


def narrowest(costs: Costs, dimensions: Dimensions, multiple: int) -> int:
    """Parameters with one group and one multiple of channels in each block: the least that can stay."""
    channels = min(multiple, dimensions.channels)
    return _fixed(costs, dimensions) + sum(costs.groups) + channels * sum(costs.channels)


def width_amount_problems(costs: Costs, dimensions: Dimensions, ratio: float, multiple: int) -> list[str]:
    """Why widths cannot give up `ratio` of all parameters, in complete sentences, before any weight is read."""
    if not 1 <= multiple <= dimensions.channels:
        return [f"structure.multiple={multiple}: must be in [1, {dimensions.channels}], the channels of a block"]
    least = narrowest(costs, dimensions, multiple)
    if kept_parameters(costs, ratio) >= least:
        return []
    return [
        f"structure.ratio={ratio}: no width meets it: with one group of heads and {multiple} channels in each block "
        f"{least:,} of {costs.total:,} parameters stay; set at most {1 - least / costs.total:.3f}, or a smaller "
        "structure.multiple"
    ]


def chosen_units(
    scores: Importances, costs: Costs, dimensions: Dimensions, ratio: float, multiple: int = 1, shape: str = "uneven"
) -> tuple[Bool[Tensor, "block group"], Bool[Tensor, "block channel"]]:
    """The units of largest score that fit a budget of parameters, `ratio` of all being gone; channels in multiples of
    `multiple`, or all. `uneven`: over all blocks together. `uniform`: of every block as many groups and as many
    channels, the two numbers with the largest sum of score times cost. Scores of the two kinds are compared."""
    assert not width_amount_problems(costs, dimensions, ratio, multiple), "no width meets the budget"
    budget = kept_parameters(costs, ratio)
    if shape == "uniform":
        pairs = _frontier(costs, dimensions, budget, multiple)
        numbers = max(pairs, key=lambda pair: _worth(scores, costs, *pair))
        groups, channels = ([number] * dimensions.blocks for number in numbers)
    else:
        groups, channels = _uneven_numbers(scores, costs, dimensions, budget, multiple)
    return _largest(scores.groups, groups), _largest(scores.channels, channels)


def proportional(importances: Importances, kept: tuple[int, int]) -> Structure:
    """Of every block the most important groups and channels, as many as `even_widths` gives: for importances of which
    those of heads and of channels cannot be compared."""
    groups, channels = ([number] * len(importances.groups) for number in kept)
    return structure_of(_largest(importances.groups, groups), _largest(importances.channels, channels))


def even_widths(costs: Costs, dimensions: Dimensions, ratio: float, multiple: int = 1) -> tuple[int, int]:
    """How many groups and channels every block keeps, in shares as equal as the budget and whole numbers allow."""
    assert not width_amount_problems(costs, dimensions, ratio, multiple), "no width meets the budget"
    pairs = _frontier(costs, dimensions, kept_parameters(costs, ratio), multiple)
    return min(pairs, key=lambda pair: abs(pair[0] / dimensions.groups - pair[1] / dimensions.channels))


def _fixed(costs: Costs, dimensions: Dimensions) -> int:
    """Parameters that no unit holds."""
    return costs.total - dimensions.groups * sum(costs.groups) - dimensions.channels * sum(costs.channels)


def _frontier(costs: Costs, dimensions: Dimensions, budget: int, multiple: int) -> list[tuple[int, int]]:
    """For each number of groups a block the most channels that fit."""
    pairs = []
    for groups in range(1, dimensions.groups + 1):
        left = budget - _fixed(costs, dimensions) - groups * sum(costs.groups)
        channels = min(left // max(1, sum(costs.channels)), dimensions.channels)
        if channels < dimensions.channels:
            channels -= channels % multiple
        if channels >= min(multiple, dimensions.channels):
            pairs.append((groups, int(channels)))
    return pairs


def _worth(scores: Importances, costs: Costs, groups: int, channels: int) -> float:
    """Sum over all blocks of the score times the cost of what would stay."""
    best = scores.groups.double().topk(groups, dim=1).values.sum(dim=1)
    most = scores.channels.double().topk(channels, dim=1).values.sum(dim=1)
    of_group, of_channel = (torch.tensor(cost, dtype=torch.float64) for cost in (costs.groups, costs.channels))
    return float((best * of_group).sum() + (most * of_channel).sum())


def _uneven_numbers(
    scores: Importances, costs: Costs, dimensions: Dimensions, budget: int, multiple: int
) -> tuple[list[int], list[int]]:
    """How many groups and channels each block keeps: units in falling order of score, channels a multiple at a time by
    the mean of its scores, as far as they fit. Of equals groups first, then the first block's."""
    least = min(multiple, dimensions.channels)
    groups = scores.groups.double().sort(dim=1, descending=True).values[:, 1:]
    bundles = scores.channels.double().sort(dim=1, descending=True).values[:, least:].split(multiple, dim=1)
    offers = [groups, *(bundle.mean(dim=1, keepdim=True) for bundle in bundles)]  # each [block, offers]
    sizes = torch.tensor([1] * groups.shape[1] + [bundle.shape[1] for bundle in bundles])
    kinds = torch.tensor([0] * groups.shape[1] + [1] * len(bundles))
    of_kinds = torch.tensor([costs.groups, costs.channels])
    order = torch.cat(offers, dim=1).T.flatten().argsort(descending=True, stable=True)
    places, blocks = order // dimensions.blocks, order % dimensions.blocks
    prices = of_kinds[kinds[places], blocks] * sizes[places]
    left = budget - narrowest(costs, dimensions, multiple)
    fits = int((prices.cumsum(0) <= left).sum())
    taken = torch.tensor([[1] * dimensions.blocks, [least] * dimensions.blocks])
    taken.index_put_((kinds[places[:fits]], blocks[:fits]), sizes[places[:fits]], accumulate=True)
    left -= int(prices[:fits].sum())
    for offer in range(fits, len(order)):  # smaller ones that still fit
        place, block = places[offer], blocks[offer]
        kind, size = kinds[place], sizes[place]
        ends = kind and size < multiple and taken[kind, block] + size < dimensions.channels
        if prices[offer] <= left and not ends:
            left -= int(prices[offer])
            taken[kind, block] += size
        if left < int(of_kinds.min()):
            break
    return taken[0].tolist(), taken[1].tolist()


def _largest(rows: Float[Tensor, "block unit"], counts: list[int]) -> Bool[Tensor, "block unit"]:
    """The units of largest score, so many of each block; of equals the first."""
    ranks = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < torch.tensor(counts)[:, None]


def structure_of(groups: Bool[Tensor, "block group"], channels: Bool[Tensor, "block channel"]) -> Structure:
    """All blocks, with these units."""
    kept = (tuple(tuple(row.nonzero().flatten().tolist()) for row in rows) for rows in (groups, channels))
    return Structure(tuple(range(len(groups))), *kept)
