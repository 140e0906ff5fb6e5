"""From the settings of a recovery to what the tuning loop takes, and all that speaks against them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.units import sub_blocks
from besa_exp.errors import ConfigurationError, RunError, did_you_mean
from besa_exp.machine import distributed
from besa_exp.recovery.descent import Adam
from besa_exp.recovery.full import Full, Norms, norms_and_biases
from besa_exp.recovery.lora import Lora
from besa_exp.recovery.mezo import Mezo
from besa_exp.recovery.objective import TASK_LOSSES, Distillation, NextToken, next_token_losses
from besa_exp.recovery.reconstruction import Blocks, Reconstruction
from besa_exp.recovery.schedule import Schedule
from besa_exp.recovery.sketch import Sketch
from besa_exp.recovery.sparsegrad import SparseGrad, kinds_in, no_zero_stays
from besa_exp.recovery.spiel import Spiel, entries_of
from besa_exp.recovery.tuner import Method, Objective
from besa_exp.recovery.tuning import Plan
from besa_exp.rules import broken_rules
from besa_exp.settings import RecoverySettings
from besa_exp.texts.sources import check_source
from besa_exp.texts.tasks import check_task

TRIAL = 0.1  # of the steps, with which a step size is tried
BY_ADAM = {
    "full": Full, "lora": Lora, "scale": partial(Lora, alpha=None), "norms": Norms, "blocks": Blocks, "sketch": Sketch,
    "sparsegrad": SparseGrad,
}  # fmt: skip
OWN_KEYS = {
    "full": ("embeddings",),
    "lora": ("rank", "alpha", "norms"),
    "scale": ("rank", "norms"),
    "norms": (),
    "blocks": ("scope",),
    "sketch": ("bits", "norms"),
    "sparsegrad": ("share", "gather", "kinds"),
    "mezo": ("lr", "decay", "eps"),
    "spiel": ("lr", "decay", "selection", "density", "reselect", "gather", "first", "exchange"),
}  # what each takes beside AdamW's


def steps_of(asked: RecoverySettings) -> int:
    """How many there are: those that see `tokens`, where that is said."""
    if asked.tokens is None:
        return asked.steps
    assert asked.seq_len is not None
    return max(1, math.ceil(asked.tokens / (asked.batch_size * asked.seq_len)))


def method_of(asked: RecoverySettings) -> Method:
    """The method, with a step size to begin the search with where none is given. ValueError: there is none of this
    name, or it refuses a value."""
    if asked.method is not None:
        return _not_ours(asked)
    if asked.name not in OWN_KEYS:
        rule = f"must be one of {', '.join(OWN_KEYS)}{did_you_mean(asked.name, OWN_KEYS)}"
        raise ValueError(f"recovery.name={asked.name}: {rule}; one of your own goes with recovery.method")
    own: dict[str, Any] = {key: getattr(asked, key) for key in OWN_KEYS[asked.name] if getattr(asked, key) is not None}
    if asked.name in BY_ADAM:
        lr = BY_ADAM[asked.name]().adam.lr if asked.lr is None else asked.lr
        return BY_ADAM[asked.name](adam=Adam(lr, decay=asked.decay, clip=asked.clip), **own)
    if asked.clip is not None:
        raise ValueError(f"recovery.clip={asked.clip:g}: recovery={asked.name} clips no gradient; set it to null")
    if asked.name == "mezo":
        return Mezo(together=asked.windows_together, **own)
    return Spiel(steps=steps_of(asked), **own)


def _not_ours(asked: RecoverySettings) -> Method:
    """`asked.method` with the step size that is asked for, and the other settings of AdamW where it takes them.
    ValueError: it is no method, or goes by the name of one of ours."""
    method: Any = asked.method
    kind = type(method).__name__
    if not (isinstance(asked.method, Method) and (hasattr(method, "adam") or hasattr(method, "lr"))):
        raise ValueError(f"recovery.method={kind}: a recovery method has begin, adam or lr; see docs/extending.md")
    if asked.name in OWN_KEYS:
        raise ValueError(f"recovery.name={asked.name}: is a method of the package; give {kind} a name of its own")
    lr = step_size(method) if asked.lr is None else asked.lr
    if hasattr(method, "adam"):
        return replace(method, adam=Adam(lr, decay=asked.decay, clip=asked.clip))
    return replace(method, lr=lr)


def step_size(method: Any) -> float:
    """The method's, at its highest."""
    return method.adam.lr if hasattr(method, "adam") else method.lr


def plan_of(asked: RecoverySettings) -> Plan:
    """The plan of all steps. ValueError: a value that it refuses."""
    steps = steps_of(asked)
    schedule = Schedule(steps, int(asked.warm_up * steps), asked.schedule)
    trial = math.ceil(TRIAL * steps) if asked.lr is None else 0
    return Plan(schedule, asked.batch_size, math.ceil(steps / asked.checks), asked.windows_together, asked.seed, trial)


def distillation_of(asked: RecoverySettings) -> Distillation:
    """What of the dense model's is followed. ValueError: a value that it refuses."""
    return Distillation(asked.distill, asked.distill_weight, asked.task_weight, asked.temperature)


def follows_dense(asked: RecoverySettings) -> bool:
    """Whether the dense model is needed beside the pruned one."""
    return asked.name == "blocks" or asked.distill != "none"


def objective_of(asked: RecoverySettings, method: Method, model: nn.Module, teacher: nn.Module | None) -> Objective:
    """What is minimised. ConfigurationError: a dense model is missing, not asked for, or is another one."""
    if teacher is not None:
        _check_dense(asked, model, teacher)
    if not isinstance(method, Blocks):
        losses = next_token_losses if asked.task is None else TASK_LOSSES[asked.task_loss]
        return NextToken(model, distillation_of(asked), teacher, asked.windows_together, asked.checkpointing, losses)
    if teacher is None:
        raise ConfigurationError("recovery=blocks: needs the dense model, whose states it follows; give teacher=")
    assert asked.seq_len is not None
    return Reconstruction.of(model, teacher, method.scope, asked.windows_together, asked.seq_len)


def _check_dense(asked: RecoverySettings, model: Any, dense: Any) -> None:
    """ConfigurationError: its logits, or its hidden states where these are followed, have other shapes."""
    of_dense, own = (one.get_input_embeddings().weight.shape for one in (dense, model))
    compared = (
        ["tokens in its vocabulary"] if asked.distill == "logits" else ["tokens in its vocabulary", "hidden units"]
    )
    for axis, what in enumerate(compared):
        if of_dense[axis] != own[axis]:
            raise ConfigurationError(
                f"the dense model has {of_dense[axis]} {what}, the one that follows it {own[axis]}; give "
                "the one that was pruned"
            )


def check_fit(asked: RecoverySettings, model: nn.Module) -> list[str]:
    """What of the loaded model, or of the processes there are, speaks against it, in complete sentences."""
    problems = []
    if asked.name == "mezo" and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        problems.append("recovery=mezo: float16 rounds its small steps away; set model.dtype=bfloat16 or float32")
    if asked.name == "norms" and not norms_and_biases(model):
        problems.append("recovery=norms: this model has no norm and no bias with a weight; use recovery=lora")
    method = method_of(asked)
    if isinstance(method, SparseGrad) and not kinds_in(model, method.kinds):
        problems.append(f"recovery.kinds={','.join(method.kinds)}: the model has no linear of these names")
    if isinstance(method, Spiel) and not any(entries_of(model, method.density).values()):
        problems.append(f"recovery.density={method.density}: leaves no linear an entry to tune; raise it")
    if asked.name in ("spiel", "sparsegrad") and distributed.num_ranks() > 1:
        problems.append(f"recovery={asked.name}: runs in one process; start it without torchrun")
    if asked.shard:
        problems += _check_dealt_out(asked)
    if asked.name == "blocks" and asked.scope == "sub_block":
        first = capture_blocks(model, torch.zeros(1, 2, dtype=torch.long))[0]
        try:
            sub_blocks(first, embed(model, [first], torch.zeros(1, 2, dtype=torch.long), 1))
        except RunError:
            problems.append(
                f"recovery.scope=sub_block: {first.name} runs attention and MLP side by side, so that they have no "
                "states of their own; use recovery.scope=block"
            )
    return problems


def check_recovery(
    asked: RecoverySettings,
    sparsity: float,
    pattern: str,
    context: int | None,
    quantised: bool = False,
    blocks_removed: bool = False,
) -> list[str]:
    """All that speaks against tuning a model of this sparsity, pattern and context so, in complete sentences.
    `blocks_removed`: the pruned model has fewer blocks than the dense one."""
    if asked.task is not None:
        problems = check_task(asked.task, asked.path) + _check_task_loss(asked)
    else:
        problems = check_source(asked.path, "recovery.path", "calibration", asked.column) if asked.path else []
        if asked.task_loss != "options":
            problems.append(f"recovery.task_loss={asked.task_loss}: is of a task; name one with recovery.task")
    problems += broken_rules(asked, "recovery")
    assert asked.seq_len is not None
    if context is not None and asked.seq_len > context:
        problems.append(f"recovery.seq_len={asked.seq_len}: exceeds the model's context; set it to {context} or less")
    problems += _check_method(asked, sparsity, pattern, quantised) + _check_followed(asked, blocks_removed)
    if problems:
        return problems
    for make in (plan_of, distillation_of, method_of):
        try:
            make(asked)
        except ValueError as error:
            problems.append(str(error))
    return problems or _check_trial(asked)


def _check_trial(asked: RecoverySettings) -> list[str]:
    """Steps of SparseGrad that only gather gradients must leave some; SpIEL's that are tried must not end with an
    exchange of all entries."""
    trial, method = plan_of(asked).trial, method_of(asked)
    if isinstance(method, Spiel) and trial == method.gather:
        return [
            f"recovery.lr=null: the {trial} steps of a trial end where all entries are exchanged for new ones "
            f"(recovery.gather={method.gather}), so that no step size can be found; set recovery.lr, or other "
            "recovery.steps"
        ]
    if not isinstance(method, SparseGrad) or (trial or steps_of(asked)) > method.gather:
        return []
    if not trial:
        return [
            f"recovery.gather={method.gather}: no step is left that tunes; set less than the {steps_of(asked)} steps"
        ]
    return [
        f"recovery.lr=null: the {trial} steps of a trial only gather gradients (recovery.gather={method.gather}), so "
        "that no step size can be found; set recovery.lr, or more recovery.steps"
    ]


def _check_dealt_out(asked: RecoverySettings) -> list[str]:
    """All processes compute a block at the same time, so that each must have as many windows as any other."""
    ranks = distributed.num_ranks()
    if ranks == 1:
        return ["recovery.shard=true: deals the model out to processes; start several with torchrun"]
    sizes = ["batch_size", "held_out", *(["tested"] if asked.task else [])]
    return [
        f"recovery.{name}={getattr(asked, name)}: recovery.shard=true needs a multiple of the {ranks} processes"
        for name in sizes
        if getattr(asked, name) % ranks
    ]


def _check_task_loss(asked: RecoverySettings) -> list[str]:
    problems = []
    if asked.task_loss not in TASK_LOSSES:
        near = did_you_mean(asked.task_loss, TASK_LOSSES)
        problems.append(f"recovery.task_loss={asked.task_loss}: must be one of {', '.join(TASK_LOSSES)}{near}")
    if asked.task_loss == "accuracy" and asked.name != "mezo":
        problems.append(
            "recovery.task_loss=accuracy: has no gradient; use recovery=mezo, or recovery.task_loss=options"
        )
    if follows_dense(asked):
        problems.append(
            "recovery.task: its options are all that is followed; use another method than blocks, and distill=none"
        )
    return problems


def _check_method(asked: RecoverySettings, sparsity: float, pattern: str, quantised: bool) -> list[str]:
    problems = []
    if asked.name == "mezo" and asked.distill == "squarehead":
        problems.append("recovery.distill=squarehead: needs hidden states, which mezo does not compute; use logits")
    if asked.shard and asked.name != "full":
        problems.append("recovery.shard=true: is for recovery=full; the other methods hold little beside the model")
    if asked.name == "sparsegrad" and sparsity > 0:
        problems.append(no_zero_stays(sparsity))
    if asked.name == "spiel" and asked.exchange and pattern != "unstructured":
        problems.append(
            f"recovery.exchange=true: moves zeros about, so that {pattern} is lost; set recovery.exchange=false"
        )
    if quantised and asked.name != "norms":
        problems.append(
            f"recovery={asked.name}: moves weights off the few values that they are rounded to; use recovery=norms"
        )
    return problems


def _check_followed(asked: RecoverySettings, blocks_removed: bool) -> list[str]:
    by_blocks = asked.name == "blocks"
    problems = []
    if by_blocks and (asked.distill != "none" or asked.checkpointing):
        problems.append(
            "recovery=blocks: follows the dense model's states and holds one window's activations by itself; leave "
            "recovery.distill and recovery.checkpointing out"
        )
    if blocks_removed and (by_blocks or asked.distill == "squarehead"):
        key = "recovery=blocks" if by_blocks else "recovery.distill=squarehead"
        problems.append(
            f"{key}: compares hidden states block by block, and this model has lost blocks; use recovery=full with "
            "recovery.distill=logits"
        )
    return problems
