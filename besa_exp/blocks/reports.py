"""What the stages of a run report: frozen values that files, W&B, console and page read. No torch here.

What became of a block of the dense model is one of three: masked (`BlockReport`: zeros among its weights), narrowed
(`Narrowed`: fewer heads or channels; it is masked afterwards as any other), removed (`Removed`). A block that a
`StructureReport` does not name stayed whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import isnan, nan
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimisation step of one block (BESA, Section 3.3, Eq. 5): loss = reconstruction + penalty."""

    block: int
    step: int
    loss: float
    reconstruction: float
    penalty: float
    expected_sparsity: float


@dataclass(frozen=True)
class ModelStep:
    """One step of a search over the whole model: `divergence` from the dense model, mean KL a token in nats, of the
    step's samples, and the least that the probe samples had so far."""

    step: int
    divergence: float
    probe_divergence: float


@dataclass(frozen=True)
class LinearReport:
    """How many of one linear's weights are zero; `allocated` is the sparsity the allocation asked of it."""

    name: str  # path inside the block, such as self_attn.q_proj
    weights: int
    pruned: int
    allocated: float

    @staticmethod
    def counted(name: str, weight: Any, allocated: float) -> LinearReport:
        zeros = weight.numel() - int(weight.bool().count_nonzero())  # of floats 15 x slower
        return LinearReport(name, weight.numel(), zeros, allocated)

    @property
    def sparsity(self) -> float:
        """Measured fraction of zeros in [0, 1]."""
        return self.pruned / self.weights

    def to_dict(self) -> dict[str, Any]:
        """As `linears` in results.json holds it under its name."""
        counts = {"weights": self.weights, "pruned": self.pruned}
        return counts | {"sparsity": self.sparsity, "allocated": self.allocated}


def share_of_zeros(linears: Iterable[LinearReport]) -> float:
    """Of all their weights; 0 where there are none."""
    counts = [(linear.pruned, linear.weights) for linear in linears]
    return sum(pruned for pruned, _ in counts) / max(1, sum(weights for _, weights in counts))


@dataclass(frozen=True)
class BlockReport:
    """One pruned block. The losses are the reconstruction loss (each token's squared error relative to its own size;
    `besa_exp.tensors.losses`) on the probe samples: `loss_before` with the starting mask, nothing learned or updated,
    `loss_after` with the weights as the block loop wrote them. NaN: not measured, as of a checkpoint that is tuned."""

    index: int
    linears: tuple[LinearReport, ...]
    loss_before: float
    loss_after: float
    seconds: float
    steps: tuple[Step, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the block's linears, weighted by weights; 0 where all of them stay dense."""
        return share_of_zeros(self.linears)

    def numbered(self, index: int) -> BlockReport:
        return replace(self, index=index, steps=tuple(replace(step, block=index) for step in self.steps))

    def to_dict(self, steps: bool = False) -> dict[str, Any]:
        """As `blocks` in results.json holds it; the course only with `steps`."""
        values = {
            "index": self.index,
            "reconstruction_loss": {"before": measured(self.loss_before), "after": measured(self.loss_after)},
            "seconds": self.seconds,
            "linears": {linear.name: linear.to_dict() for linear in self.linears},
        }
        return values | ({"steps": [asdict(step) for step in self.steps]} if steps else {})

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> BlockReport:
        """The inverse, of old results.json too, which do not say what was allocated: that is what was measured then."""
        loss = {when: nan if value is None else value for when, value in values["reconstruction_loss"].items()}
        linears = tuple(
            LinearReport(
                name,
                linear["weights"],
                linear["pruned"],
                linear["allocated"] if "allocated" in linear else linear["pruned"] / linear["weights"],
            )
            for name, linear in values["linears"].items()
        )
        steps = tuple(Step(**step) for step in values.get("steps", ()))
        return BlockReport(values["index"], linears, loss["before"], loss["after"], values["seconds"], steps)


def measured(loss: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if isnan(loss) else loss


@dataclass(frozen=True)
class Size:
    """How many there were in the dense model, and how many are left."""

    dense: int
    left: int


@dataclass(frozen=True)
class Narrowed:
    """A block that lost groups of heads (a key-value head with its query heads) or channels of its FFN."""

    index: int  # in the dense model
    groups: Size
    channels: Size
    parameters: Size


@dataclass(frozen=True)
class Removed:
    """A block that is not in the pruned model."""

    index: int  # in the dense model
    parameters: int


@dataclass(frozen=True)
class StructureReport:
    """What was taken out of the model whole, before the block loop. `num_blocks` and all numbers of blocks are those of
    the dense model; `changes` ascend by number. `weights`: of the linears in the blocks; `parameters`: of all.
    `saved_as`: how blocks of uneven widths are saved, padded or custom_code; None: they are even."""

    method: str
    num_blocks: int
    changes: tuple[Narrowed | Removed, ...]
    weights: Size
    parameters: Size
    saved_as: str | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """For each block of the pruned model its number in the dense one."""
        gone = {change.index for change in self.changes if isinstance(change, Removed)}
        return tuple(index for index in range(self.num_blocks) if index not in gone)

    def to_dict(self) -> dict[str, Any]:
        """As `structure` in results.json; `parameters` stand beside it there, for every run."""
        blocks = [{"kind": type(change).__name__.lower(), **asdict(change)} for change in self.changes]
        counts = {"num_blocks": self.num_blocks, "weights": asdict(self.weights)}
        uneven = {"saved_as": self.saved_as} if self.saved_as else {}
        return {"method": self.method, **counts, **uneven, "blocks": blocks}

    @staticmethod
    def from_dict(values: Mapping[str, Any], parameters: Mapping[str, int]) -> StructureReport:
        """The inverse, with `parameters` of the same results.json."""
        changes = tuple(_change(block) for block in values["blocks"])
        sizes = Size(**values["weights"]), Size(**parameters)
        return StructureReport(values["method"], values["num_blocks"], changes, *sizes, values.get("saved_as"))


def _change(values: Mapping[str, Any]) -> Narrowed | Removed:
    if values["kind"] == "removed":
        return Removed(values["index"], values["parameters"])
    groups, channels, parameters = (Size(**values[name]) for name in ("groups", "channels", "parameters"))
    return Narrowed(values["index"], groups, channels, parameters)


@dataclass(frozen=True)
class RecoveryReport:
    """The tuning of the whole pruned model. `loss_before` and `loss_after` are of held-out windows, mean cross-entropy
    a token in nats (of a task: its loss); the weights after `best_step` of the `steps` that were taken were kept;
    `stopped` says why it ended early, None where it did not; `lr`: the step size, as given or found. `task`: the name
    of a task that was learned, and its accuracy on other examples before and after."""

    method: str
    loss_before: float
    loss_after: float
    steps: int
    best_step: int
    tokens: int
    stopped: str | None = None
    lr: float | None = None
    task: Mapping[str, Any] | None = None

    @property
    def task_said(self) -> str:
        """`; accuracy on 500 examples of boolq 0.6120 before, 0.6340 after`; nothing where text was learned."""
        if self.task is None:
            return ""
        before, after = (self.task["accuracy"][when] for when in ("before", "after"))
        of = f"{self.task['examples']} examples of {self.task['name']}"
        return f"; accuracy on {of} {before:.4f} before, {after:.4f} after"

    def to_dict(self) -> dict[str, Any]:
        """As `recovery` in results.json."""
        values = asdict(self)
        loss = {when: values.pop(f"loss_{when}") for when in ("before", "after")}
        unknown = [key for key in ("lr", "task") if values[key] is None]
        rest = {key: value for key, value in values.items() if key not in unknown}
        return {"method": rest.pop("method"), "loss": loss, **rest}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RecoveryReport:
        rest = {key: value for key, value in values.items() if key != "loss"}
        return RecoveryReport(loss_before=values["loss"]["before"], loss_after=values["loss"]["after"], **rest)
