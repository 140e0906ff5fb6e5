"""The course of a search, which is read in arrears: nothing waits for the numbers of a step.

A GPU's are copied to the host while it goes on, and are checked and reported when they have arrived, a step or two
later; all of them before a search decides anything by a loss. On a CPU they are there at once.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.reports import Step
from besa_exp.errors import RunError

NOTHING_PASSES = "too much of the block is zero for a gradient to pass; ask for a lower sparsity"
logger = logging.getLogger(__name__)


@dataclass
class Course:
    """The `steps` of a search in `block`, in order, each of which is given to `on_step`. `coming`: numbers of further
    ones, and what says that they have arrived."""

    block: Block
    on_step: Callable[[Step], None] = lambda step: None
    steps: list[Step] = field(default_factory=list)
    coming: deque[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=deque)
    warned: bool = False

    def add(
        self,
        loss: Tensor,
        sparsity: Tensor | float,
        gradient: Tensor | None = None,
        reconstruction: Tensor | None = None,
        penalty: Tensor | float = 0.0,
    ) -> None:
        """The next step. RunError: the loss of a step that has arrived, or its `gradient`, is not finite; its block and
        number are named. Where a gradient is all zero although there is a loss, a warning is logged, once: the search
        learns nothing in such a step."""
        largest = -1.0 if gradient is None else gradient.abs().max()
        numbers = (loss, loss if reconstruction is None else reconstruction, penalty, sparsity, largest)
        values = torch.stack([_on(loss.device, number) for number in numbers])
        event = torch.cuda.Event() if loss.is_cuda else None
        self.coming.append((values.to("cpu", non_blocking=True), event))
        if event is not None:
            event.record(torch.cuda.current_stream(loss.device))
        self._report(wait=False)

    def wait(self) -> None:
        """Until all steps have arrived."""
        self._report(wait=True)

    def _report(self, wait: bool) -> None:
        while self.coming:
            values, event = self.coming[0]
            if event is not None and wait:
                event.synchronize()
            if event is not None and not event.query():
                return
            self.coming.popleft()
            self._check(*values.tolist())

    def _check(self, loss: float, reconstruction: float, penalty: float, sparsity: float, largest: float) -> None:
        number, name = len(self.steps), self.block.name
        if not math.isfinite(loss):
            raise RunError(
                f"{name}: the loss is {loss} at step {number}; its inputs or targets are not finite, or the model's "
                "dtype overflows: load it in float32 or bfloat16 (model.dtype)."
            )
        self.steps.append(Step(self.block.index, number, loss, reconstruction, penalty, sparsity))
        self.on_step(self.steps[-1])
        if not math.isfinite(largest):
            raise RunError(
                f"{name}: the gradient is {largest} at step {number}; the dtype overflows: compute in float32 or "
                "bfloat16 (compute_dtype or model.dtype)."
            )
        if largest == 0 and reconstruction > 0 and not self.warned:
            self.warned = True
            half = self.block.product_dtype == torch.float16
            logger.warning(
                "%s: the gradient of step %d is zero everywhere although the loss is %.3g, so nothing is learned from "
                "it; %s",
                name,
                number,
                reconstruction,
                "compute in float32 or bfloat16 (compute_dtype or model.dtype)" if half else NOTHING_PASSES,
            )


def _on(device: torch.device, number: Tensor | float) -> Tensor:
    """A number that does not wait for the host to be copied there."""
    if isinstance(number, Tensor):
        return number.detach().double()
    return torch.full((), number, dtype=torch.float64, device=device)
