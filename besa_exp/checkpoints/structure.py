"""What is left of a model of which whole parts are removed: blocks, groups of heads, channels.

A group is a key-value head with the query heads that read it (without grouped queries: a head). A channel is a number
between an FFN's two halves: a row of gate and up, a column of down. All numbers are those of the dense model, so that
what was removed is known for as long as the value is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from besa_exp.errors import ConfigurationError

FORMAT = 1
Units = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Dimensions:
    """How many there are in the dense model: blocks, and of each block groups, heads and channels, which a family whose
    widths are fixed does not say (0). `head_dim`: rows of a head."""

    blocks: int
    hidden: int
    groups: int
    heads: int
    head_dim: int
    channels: int

    @property
    def heads_of_group(self) -> int:
        """Query heads that read one key-value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Costs:
    """Parameters: those in no block, and by block all of its own, one group's and one channel's."""

    outside: int
    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of the dense model."""
        return self.outside + sum(self.blocks)


@dataclass(frozen=True)
class Structure:
    """`blocks`: the kept ones, ascending. `groups`, `channels`: of each kept block in this order those that stay,
    ascending; None: all in all blocks."""

    blocks: tuple[int, ...]
    groups: Units | None = None
    channels: Units | None = None

    def problems(self, dimensions: Dimensions) -> list[str]:
        """What speaks against it as a part of a model of these dimensions, in complete sentences."""
        found = _problems("blocks", self.blocks, dimensions.blocks)
        for name, units, count in (
            ("groups of heads", self.groups, dimensions.groups),
            ("channels", self.channels, dimensions.channels),
        ):
            if units is None:
                continue
            if len(units) != len(self.blocks):
                found.append(f"structure: lists the {name} of {len(units)} blocks and keeps {len(self.blocks)} blocks")
            for block, kept in zip(self.blocks, units, strict=False):
                found += _problems(f"{name} of block {block}", kept, count)
        return found

    @property
    def by_block(self) -> dict[int, int]:
        """Original number of each kept block to the number that it has among them."""
        return {block: place for place, block in enumerate(self.blocks)}

    def kept_groups(self, block: int, dimensions: Dimensions) -> tuple[int, ...]:
        """Of a kept block, by its original number."""
        return self.groups[self.by_block[block]] if self.groups else tuple(range(dimensions.groups))

    def kept_channels(self, block: int, dimensions: Dimensions) -> tuple[int, ...]:
        """Of a kept block, by its original number."""
        return self.channels[self.by_block[block]] if self.channels else tuple(range(dimensions.channels))

    @property
    def is_uniform(self) -> bool:
        """Whether all kept blocks have as many groups, and as many channels."""
        return all(len({len(kept) for kept in units or ()}) <= 1 for units in (self.groups, self.channels))

    def parameters_left(self, costs: Costs, dimensions: Dimensions) -> int:
        """Exactly; zeros that pad uneven widths are not counted."""
        left = costs.outside
        for block in self.blocks:
            groups = dimensions.groups - len(self.kept_groups(block, dimensions))
            channels = dimensions.channels - len(self.kept_channels(block, dimensions))
            left += costs.blocks[block] - groups * costs.groups[block] - channels * costs.channels[block]
        return left


def to_json(structure: Structure, dimensions: Dimensions) -> str:
    """The text of structure.json. What is kept whole is not listed."""
    fields: dict[str, Any] = {"format_version": FORMAT, "num_blocks": dimensions.blocks, "blocks": [*structure.blocks]}
    for name in ("groups", "channels"):
        units: Units | None = getattr(structure, name)
        if units is not None:
            fields[f"num_{name}"] = getattr(dimensions, name)
            fields[name] = {str(block): [*kept] for block, kept in zip(structure.blocks, units, strict=True)}
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "structure.json") -> Structure:
    """The inverse. ConfigurationError: it is no such file."""
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        blocks = tuple(fields["blocks"])
        groups, channels = (_units(fields.get(name), blocks) for name in ("groups", "channels"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{where}: cannot be read as a structure ({error!r}); give a run's structure.json"
        ) from error
    if version != FORMAT:
        raise ConfigurationError(f"{where}: format {version}, where this version reads {FORMAT}")
    if not all(isinstance(number, int) for number in blocks):
        raise ConfigurationError(f"{where}: blocks must be whole numbers, not {fields['blocks']}")
    return Structure(blocks, groups, channels)


def _units(fields: Mapping[str, Sequence[int]] | None, blocks: Sequence[int]) -> Units | None:
    return None if fields is None else tuple(tuple(fields[str(block)]) for block in blocks)


def _problems(what: str, kept: Sequence[int], count: int) -> list[str]:
    if not kept:
        return [f"structure: keeps none of the {count} {what}; at least one must stay"]
    if [*kept] != sorted(set(kept)):
        return [f"structure: the kept {what} must ascend without repeats, not {_few(kept)}"]
    if kept[0] < 0 or kept[-1] >= count:
        return [f"structure: keeps {what} number {kept[-1] if kept[0] >= 0 else kept[0]}; there are {count}, from 0"]
    return []


def _few(kept: Sequence[int]) -> str:
    return f"[{', '.join(map(str, kept[:8]))}{', ...' if len(kept) > 8 else ''}]"
