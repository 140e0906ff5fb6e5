"""AdamW on what the tensors of a model are made of.

Most methods say how a tensor W follows from what is trained, and how dL/dW becomes a gradient to that: the values of
the kept weights (`full`), the factors of B A (`lora`, `scale`), a table (`sketch`), a rotated W (`sparsegrad`). This is
the part that is the same for all: dL/dW of one tensor at a time, sums over micro-batches and ranks, clipping, AdamW in
fp32 by PyTorch's fused kernel, and the new W written into the model in its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.recovery.sharded import is_dealt_out, own
from besa_exp.recovery.tuner import Objective, Taken, Windows
from besa_exp.rules import NotNegative, Positive, check_fields
from besa_exp.tensors.keep_bits import KeepBits


@runtime_checkable
class Form(Protocol):
    """One tensor of the model as a function of what is trained."""

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """What is trained, in fp32, by its own names; changed in place by the steps."""
        ...

    def write(self, parameter: Tensor) -> None:
        """Make the tensor what it is now. Pruned places are 0 before, and stay so."""
        ...

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """The gradient to `trained`, in fp32, from that to the tensor."""
        ...


@dataclass(frozen=True)
class Adam:
    """The settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101). `decay` pulls on what makes up tensors of two
    axes and more; norms and biases are spared. `clip`: the greatest norm of the gradient over all that is trained."""

    lr: Positive
    decay: NotNegative = 0.0
    clip: Positive | None = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "recovery")


@contextmanager
def taking_gradients(parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Backward passes inside give each parameter's gradient, with its name, to `take` as soon as it is whole, and drop
    it; no other is computed. Kept for all tensors until the step they would take as much memory as the model."""

    @torch.no_grad()
    def taken(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        take(name, parameter.grad)
        parameter.grad = None

    hooks = [
        parameter.requires_grad_().register_post_accumulate_grad_hook(partial(taken, name))
        for name, parameter in parameters.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


class Descent:
    """A tuner (`tuner.Tuner`) of the parameters named in `forms`."""

    def __init__(self, model: nn.Module, forms: Mapping[str, Form], adam: Adam, keep: Mapping[str, KeepBits]) -> None:
        if not forms:
            raise RunError("this recovery finds nothing to tune in the model; use another, such as recovery=lora")
        self.forms, self.adam, self.keep = forms, adam, keep
        self.parameters = {name: model.get_parameter(name) for name in forms}
        self.sharded: Any = model if any(map(is_dealt_out, self.parameters.values())) else None
        self.leaves = {f"{name}/{key}": leaf for name, form in forms.items() for key, leaf in form.trained.items()}
        decayed = [leaf for name, leaf in self.leaves.items() if self._owner(name).dim() > 1]
        spared = [leaf for name, leaf in self.leaves.items() if self._owner(name).dim() <= 1]
        groups = [{"params": decayed, "weight_decay": adam.decay}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=adam.lr, betas=(0.9, 0.999), eps=1e-8, fused=True
        )

    def step(self, objective: Objective, windows: Windows, number: int, scale: float) -> Taken:
        loss, norm = self.differentiate(objective, windows)
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.adam.lr * scale
            self.optimizer.step()
            self.write()
        self.optimizer.zero_grad()
        return Taken(loss, norm)

    def differentiate(self, objective: Objective, windows: Windows) -> tuple[float, float]:
        """The loss, and the gradient's norm before it is clipped; each leaf has its clipped gradient then, of all
        ranks. A method whose gradient is taken elsewhere than at the weights overrides this."""
        with taking_gradients(self.parameters, self._take):
            loss, multiple = objective.differentiate(windows)
        return loss, self._finish_gradients(multiple)

    @torch.no_grad()
    def write(self) -> None:
        """Make the model's tensors what the leaves say."""
        for name, form in self.forms.items():
            form.write(own(self.parameters[name]))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """All is in memory. A pass without gradients leaves what is in no block whole, and it would stay as it is."""
        yield
        if self.sharded:
            self.sharded.reshard()

    def state(self) -> dict[str, Tensor]:
        """What is trained, and AdamW's moments and count of steps."""
        moments = {
            f"{name}/{key}": value
            for name, leaf in self.leaves.items()
            for key, value in self.optimizer.state[leaf].items()
        }
        held = {name: leaf.detach() for name, leaf in self.leaves.items()} | moments
        if not self.sharded:
            return held
        return {name: distributed.end_to_end(value).cpu() if value.dim() else value for name, value in held.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, leaf in self.leaves.items():
            held = {key: value for key, value in state.items() if key == name or key.startswith(f"{name}/")}
            if self.sharded:
                held = {key: distributed.own_part(v, len(leaf)) if v.dim() else v for key, v in held.items()}
            leaf.copy_(held.pop(name))
            moments = {key.removeprefix(f"{name}/"): value for key, value in held.items()}
            # the fused kernel takes its count of steps, too, from the leaf's device
            self.optimizer.state[leaf] = {key: value.to(leaf.device, copy=True) for key, value in moments.items()}
        self.write()

    def _owner(self, leaf_name: str) -> nn.Parameter:
        return self.parameters[leaf_name.rpartition("/")[0]]

    def _take(self, name: str, gradient: Tensor) -> None:
        form = self.forms[name]
        for key, found in form.gradients(own(gradient)).items():
            leaf = form.trained[key]
            leaf.grad = found if leaf.grad is None else leaf.grad.add_(found)

    @torch.no_grad()
    def _finish_gradients(self, multiple: float) -> float:
        """Sum over ranks, divide, clip. The norm before it was clipped. FSDP2 has taken the mean over ranks."""
        squares = torch.zeros((), dtype=torch.float64)
        for leaf in self.leaves.values():
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # a rank without a window of the batch
            if self.sharded:
                leaf.grad = found.mul_(distributed.num_ranks() / multiple)
            else:
                leaf.grad = distributed.all_sum(found).div_(multiple)
            squares = squares + torch.linalg.vector_norm(leaf.grad).double().square()
        norm = math.sqrt(float(distributed.all_sum(squares.cpu()) if self.sharded else squares))
        if self.adam.clip is not None and norm > self.adam.clip:
            for leaf in self.leaves.values():
                assert leaf.grad is not None
                leaf.grad.mul_(self.adam.clip / norm)
        return norm
