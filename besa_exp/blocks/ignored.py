"""What stays dense: linears whose `BLOCK.linear`, such as `0.mlp.down_proj`, a pattern matches (`0.*`, `*.down_proj`).

An ignored linear is none to the block loop: it is not observed, pruned, counted or masked, so that a target is met over
the rest. A block of which nothing is left to prune is passed as it is. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from besa_exp.errors import did_you_mean

if TYPE_CHECKING:
    from besa_exp.blocks.block import Block


@dataclass(frozen=True)
class Ignored:
    """`numbers`: for each block its number in the dense model, where blocks have been removed."""

    patterns: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    def names(self, block: Block) -> dict[str, str]:
        """{linear: BLOCK.linear}."""
        number = self.numbers[block.index] if self.numbers else block.index
        return {name: f"{number}.{name}" for name in block.linears}

    def rest(self, block: Block) -> Block:
        names = self.names(block)
        kept = {name: linear for name, linear in block.linears.items() if not is_ignored(names[name], self.patterns)}
        return replace(block, linears=kept)

    def check(self, blocks: Sequence[Block]) -> list[str]:
        """What is wrong with the patterns for these blocks."""
        return check_ignored(self.patterns, [name for block in blocks for name in self.names(block).values()])


def is_ignored(name: str, patterns: Collection[str]) -> bool:
    """Of a linear by its `BLOCK.linear`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_ignored(patterns: Collection[str], names: Collection[str]) -> list[str]:
    """Each pattern must match one of `names`, BLOCK.linear, and all of them together must leave one."""
    problems = [
        f"ignore={pattern}: matches no linear{did_you_mean(pattern, names)}; a pattern is matched with BLOCK.linear, "
        f"blocks counted from 0, such as {next(iter(names))}: write for example 0.* or *.{_last_part(names)}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if patterns and all(is_ignored(name, patterns) for name in names):
        problems.append(f"ignore={','.join(patterns)}: matches every linear, so that nothing is pruned; ignore fewer")
    return problems


def _last_part(names: Collection[str]) -> str:
    return next(iter(names)).rpartition(".")[2]
