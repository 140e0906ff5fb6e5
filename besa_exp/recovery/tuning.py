"""The tuning loop: the same for every method.

    for each step: windows by (seed, step) -> the method's step -> now and then, held-out loss -> best state, checkpoint

Held-out windows choose between the states, the pruned model's among them, so that the result is never worse on them
than what it began with. Everything of a step is a function of its number and of the tuner's state: a run that was
killed goes on from its last checkpoint, and ends with the same bits as one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.errors import RunError
from besa_exp.methods.tuning import downhill
from besa_exp.recovery.objective import Losses, mean_loss, next_token_losses, num_tokens, option_errors
from besa_exp.recovery.saved_states import Saved, SavedStates
from besa_exp.recovery.schedule import Schedule, batch_at
from besa_exp.recovery.sharded import own, own_keep, own_rows, whole
from besa_exp.recovery.tuner import Method, Objective, Taken, Tuner, Windows
from besa_exp.tensors.keep_bits import KeepBits
from besa_exp.texts.tasks import Options

logger = logging.getLogger(__name__)
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # times a method's step size that are tried
RUINED = 1e100  # times its factor is the loss of a size that ends in none: the search goes on to smaller ones
KEEP = "/keep"  # ends the name under which the bits of a tensor lie beside the best weights


@runtime_checkable
class Text(Protocol):
    """Windows of tokens by their number; a tensor [sample, seq] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Int[Tensor, " sample"], /) -> Windows: ...


@dataclass(frozen=True)
class Parts:
    """What is learned from, what chooses the best state by the mean of `losses`, the hash of both, and the examples of
    a task that are scored; None: it is text."""

    learned: Text
    held_out: Windows
    losses: Losses = next_token_losses
    sha256: str = ""
    tested: Options | None = None

    def accuracy(self, model: nn.Module, batch_size: int) -> float | None:
        """The share of the tested examples whose right option has the greatest score; None: it is text."""
        return None if self.tested is None else 1 - mean_loss(model, self.tested, batch_size, option_errors)


@dataclass(frozen=True)
class Plan:
    """`batch_size` windows a step; held-out windows judge after each `judge_every` steps and after the last, `judged`
    of them together; a checkpoint is written whenever they have judged. `trial`: so many steps, with the whole schedule
    in them, are tried with several times the method's step size, and what held-out windows like best is taken; 0: it is
    taken as it is."""

    schedule: Schedule
    batch_size: int = 8
    judge_every: int = 50
    judged: int = 8
    seed: int = 0
    trial: int = 0

    def judges_after(self, steps: int) -> bool:
        """Whether held-out windows judge once so many steps are done."""
        return steps % self.judge_every == 0 or steps == self.schedule.steps


@dataclass(frozen=True)
class Point:
    """One step of the course. `held_out`: after it, where it was judged."""

    step: int
    loss: float
    gradient_norm: float | None
    scale: float
    tokens: int
    seconds: float
    held_out: float | None = None


@dataclass
class Recovery:
    """How far it is, as a checkpoint holds it beside the tuner's state, and in the end what became of it: how many
    times the method's step size is taken, the steps done, held-out loss before and of the best state, after how many
    steps that was, the course, and why it ended early; None: it did not."""

    factor: float
    steps: int
    before: float
    after: float
    best_step: int
    points: list[Point] = field(default_factory=list)
    stopped: str | None = None


def tune(
    model: nn.Module,
    keep: Mapping[str, KeepBits],
    method: Method,
    objective: Objective,
    parts: Parts,
    plan: Plan,
    states: SavedStates | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
) -> tuple[Recovery, dict[str, KeepBits]]:
    """Tune `model`, which holds the pruned weights, in place; `keep` names its zeros. It ends with the best weights;
    what is kept of them is returned too.

    `on_point` is called with each step once, also of those that an earlier attempt did; what that did after its last
    checkpoint is done again and reported again."""
    clear_pruned(model, keep)
    judge = partial(_held_out_loss, model, parts, plan)
    saved = states.read() if states else None
    factor = 1.0 if saved else _found_factor(model, keep, method, objective, parts.learned, judge, plan)
    tuner = _begun(model, keep, method, plan.seed)
    keeper = _Best(tuner, states)
    if saved:
        course = _go_on(tuner, keeper, saved, on_point)
    else:
        before = judge(tuner)
        course = Recovery(factor, 0, before, before, 0)
        keeper.keep(0)
        keeper.save(course)
    while course.steps < plan.schedule.steps and course.stopped is None:
        point = _step(tuner, objective, parts.learned, plan, course.steps, course.factor)
        course.steps += 1
        if plan.judges_after(course.steps) and math.isfinite(point.loss):
            point = replace(point, held_out=judge(tuner))
        course.points.append(point)
        course.stopped = _reason(point)
        if point.held_out is not None and point.held_out < course.after:
            course.after, course.best_step = point.held_out, course.steps
            keeper.keep(course.steps)
        on_point(point)
        if plan.judges_after(course.steps) or course.stopped:
            keeper.save(course)
    return course, keeper.put_back()


def _begun(model: nn.Module, keep: Mapping[str, KeepBits], method: Method, seed: int) -> Tuner:
    """RunError: what the method begins is no tuner."""
    tuner: object = method.begin(model, keep, seed)
    if isinstance(tuner, Tuner):
        return tuner
    raise RunError(
        f"recovery.method={type(method).__name__}: begin gave {type(tuner).__name__}, no tuner; give a Descent, "
        "or what besa_exp/recovery/tuner.py asks of one (docs/extending.md)"
    )


def _held_out_loss(model: nn.Module, parts: Parts, plan: Plan, tuner: Tuner) -> float:
    with tuner.ready():
        return mean_loss(model, parts.held_out, plan.judged, parts.losses)


def _found_factor(
    model: nn.Module,
    keep: Mapping[str, KeepBits],
    method: Method,
    objective: Objective,
    learned: Text,
    judge: Callable[[Tuner], float],
    plan: Plan,
) -> float:
    """Of FACTORS, downhill from 1, the one with which the first steps, as if they were all, end at the least held-out
    loss; 1 where none are tried. The model is left as it was."""
    if not plan.trial:
        return 1.0
    before = {name: own(value.detach()).clone() for name, value in model.named_parameters() if not value.is_meta}
    warm_up = plan.schedule.warm_up * plan.trial // plan.schedule.steps
    short = replace(plan, schedule=replace(plan.schedule, steps=plan.trial, warm_up=warm_up))

    @torch.no_grad()
    def put_back() -> None:
        for name, value in before.items():
            own(model.get_parameter(name)).copy_(value)

    def loss_after(factor: float) -> float:
        tuner = _begun(model, keep, method, plan.seed)
        taken = (_step(tuner, objective, learned, short, number, factor) for number in range(plan.trial))
        stopped = any(_reason(point) for point in taken)
        loss = math.inf if stopped else judge(tuner)
        put_back()
        steps = "1 step" if plan.trial == 1 else f"{plan.trial} steps"
        logger.info("%s of %g times the step size: held-out loss %.4f", steps, factor, loss)
        return loss if math.isfinite(loss) else RUINED * factor

    return downhill(FACTORS, 1.0, loss_after)


@torch.no_grad()
def clear_pruned(model: nn.Module, keep: Mapping[str, KeepBits]) -> None:
    """Write +0.0 into every pruned place of what is in memory; blocks in files hold +0.0 there."""
    for name, bits in keep.items():
        if not (parameter := model.get_parameter(name)).is_meta and (kept := own_keep(bits, parameter)):
            kept.clear_(own(parameter))


def _go_on(tuner: Tuner, keeper: _Best, saved: Saved, on_point: Callable[[Point], None]) -> Recovery:
    """Where an earlier attempt was."""
    record, tensors, keeper.name = saved
    tuner.load(tensors)
    course = Recovery(**{**record, "points": [Point(**point) for point in record["points"]]})
    for point in course.points:
        on_point(point)
    return course


def _step(tuner: Tuner, objective: Objective, learned: Text, plan: Plan, number: int, factor: float) -> Point:
    begun = time.monotonic()
    windows = learned[batch_at(number, len(learned), plan.batch_size, plan.seed)]
    scale = factor * plan.schedule.scale(number)
    taken: object = tuner.step(objective, windows, number, scale)
    if not isinstance(taken, Taken):
        raise RunError(f"the tuner's step gave {type(taken).__name__}, not a Taken of besa_exp.recovery.tuner")
    seconds = time.monotonic() - begun
    return Point(number, taken.loss, taken.gradient_norm, scale, num_tokens(windows), seconds)


def _reason(point: Point) -> str | None:
    """Why the course ends with this point."""
    facts = {"loss": point.loss, "norm of the gradient": point.gradient_norm, "held-out loss": point.held_out}
    for name, value in facts.items():
        if value is not None and not math.isfinite(value):
            return (
                f"the {name} is {value} at step {point.step}; the best weights before are kept: use a smaller "
                "recovery.lr, or model.dtype=bfloat16 or float32 in the place of float16"
            )
    return None


@dataclass
class _Best:
    """The best weights so far: in files where there are states, else in memory."""

    tuner: Tuner
    states: SavedStates | None
    name: str | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def keep(self, step: int) -> None:
        """The weights are the best now, after so many steps."""
        now = {name: whole(parameter.detach()) for name, parameter in self.tuner.parameters.items()}
        now |= {f"{name}{KEEP}": bits.bits for name, bits in self.tuner.keep.items()}
        if self.states is None:
            self.copies = {name: tensor.to("cpu", copy=True) for name, tensor in now.items()}
        else:
            self.name = self.states.write_best(step, now)

    def save(self, course: Recovery) -> None:
        """How far it is, where there are states."""
        if self.states is not None:
            assert self.name is not None
            state = self.tuner.state()
            if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
                raise RunError(f"the tuner's state holds {odd[0]}, which is no tensor; it goes into a file of tensors")
            self.states.write(asdict(course), state, self.name)

    @torch.no_grad()
    def put_back(self) -> dict[str, KeepBits]:
        """Give the model the best weights; what of them is kept."""
        best = self.copies
        if self.states is not None:
            assert self.name is not None
            best = self.states.read_best(self.name)
        for name, parameter in self.tuner.parameters.items():
            own(parameter).copy_(own_rows(best[name], parameter))
        return {
            name: KeepBits.packed(best[f"{name}{KEEP}"].to(bits.bits.device), bits.shape)
            for name, bits in self.tuner.keep.items()
        }
