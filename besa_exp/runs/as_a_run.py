"""A model object, and torch, as a run has them, while a notebook's model is pruned or tuned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from besa_exp.machine.device import set_determinism


@contextmanager
def as_a_run(model: nn.Module, seed: int, deterministic: bool = True) -> Iterator[None]:
    """As a run has it: evaluation mode, frozen weights, nothing compiled (what a block computes is replaced for a
    while), seeds and deterministic algorithms. All of it is put back."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    model.eval().requires_grad_(False)
    try:
        # What torch.compile made of modules and functions is left alone. Where nothing was compiled, its modules, which
        # take a second to import, are not there.
        uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with torch_as_before(), uncompiled:
            set_determinism(seed, deterministic)
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


@contextmanager
def torch_as_before() -> Iterator[None]:
    """Random states and determinism are put back: they are the program's that calls. So are its `no_grad`,
    `inference_mode`, `autocast` and default dtype and device, without which numbers are those of a command."""
    dtype = torch.get_default_dtype()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as exact:
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                exact.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                exact.enter_context(torch.device("cpu"))
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # pyright: ignore[reportAttributeAccessIssue]
