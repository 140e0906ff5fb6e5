"""A skipping policy that remembers what it decided, call by call and block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Decided:
    """In one block: which tokens ran its FFN [sample seq], and the cosines that the rule was given, if it was."""

    ran: Tensor
    similarity: Tensor | None = None


def watched(policy: Any) -> tuple[Any, list[Decided]]:
    """The same policy, and what it decides."""
    decided: list[Decided] = []

    class Watched(type(policy)):
        def skips(self, *args: Any) -> Tensor:
            skipped = super().skips(*args)
            decided.append(Decided(~skipped))
            return skipped

        def left_after(self, *args: Any) -> Tensor:
            decided[-1].similarity = args[-1]
            return super().left_after(*args)

    return Watched(**vars(policy)), decided
