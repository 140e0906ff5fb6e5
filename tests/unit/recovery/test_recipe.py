"""The presets of recovery become methods and plans, and all that speaks against them is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import SIZES, tiny
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from besa_exp.presets import preset, presets
from besa_exp.recovery.lora import Lora
from besa_exp.recovery.mezo import Mezo
from besa_exp.recovery.recipe import check_fit, check_recovery, method_of, plan_of, step_size, steps_of
from besa_exp.recovery.spiel import Spiel
from besa_exp.recovery.tuner import Method
from besa_exp.settings import RecoverySettings

NAMES = sorted(presets("recovery"))


def asked(name: str = "full", **changes) -> RecoverySettings:
    return replace(preset("recovery", name), **{"seq_len": 256} | changes)


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_is_the_method_of_its_name(name: str) -> None:
    method = method_of(asked(name))
    assert isinstance(method, Method)
    assert type(method).__name__.lower() == name.replace("scale", "lora")
    assert not isinstance(method, Lora) or (method.alpha is None) == (name == "scale")
    assert check_recovery(asked(name), 0.0, "unstructured", 512) == []


def test_values_reach_the_method() -> None:
    lora = method_of(asked("lora", rank=3, alpha=5.0, lr=0.5, decay=0.1, clip=None))
    assert isinstance(lora, Lora)
    assert (lora.rank, lora.alpha, lora.adam.lr, lora.adam.decay, lora.adam.clip) == (3, 5.0, 0.5, 0.1, None)
    assert method_of(asked("mezo", micro_batch=3, eps=0.5)) == Mezo(lr=1e-5, eps=0.5, together=3)
    spiel = method_of(asked("spiel", density=0.25, steps=77))
    assert isinstance(spiel, Spiel)
    assert (spiel.steps, spiel.density, spiel.exchange) == (77, 0.25, False)


def test_a_step_size_that_is_not_given_is_begun_with() -> None:
    for name in NAMES:
        assert step_size(method_of(asked(name))) > 0
        assert step_size(method_of(asked(name, lr=0.125))) == 0.125


def test_tokens_stand_for_the_steps_that_see_them() -> None:
    assert steps_of(asked(steps=7)) == 7
    assert steps_of(asked(tokens=1000, batch_size=4, seq_len=16)) == 16  # 64 a step: 15.6
    assert steps_of(asked(tokens=1, batch_size=4, seq_len=16)) == 1


def test_the_plan_warms_up_and_judges_as_asked() -> None:
    plan = plan_of(asked(warm_up=0.25, checks=4, batch_size=3, micro_batch=2, seed=5, steps=20))
    assert [step for step in range(1, 21) if plan.judges_after(step)] == [5, 10, 15, 20]
    uneven = plan_of(asked(checks=4, steps=11))
    assert [step for step in range(1, 12) if uneven.judges_after(step)] == [3, 6, 9, 11]
    assert (plan.trial, plan_of(asked(lr=0.1, steps=20)).trial) == (2, 0)
    assert (plan.schedule.warm_up, plan.schedule.steps, plan.batch_size, plan.judged, plan.seed) == (5, 20, 3, 2, 5)
    assert [plan.schedule.scale(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "lara"}, "did you mean lora"),
        ({"lr": 0.0}, "recovery.lr=0: must"),
        ({"clip": -1.0}, "recovery.clip=-1: must"),
        ({"decay": -1.0}, "recovery.decay=-1: must"),
        ({"name": "mezo", "clip": None, "decay": -1.0}, "recovery.decay=-1: must"),
        ({"name": "spiel", "clip": None, "lr": -1.0}, "recovery.lr=-1: must"),
        ({"name": "spiel", "clip": None, "lr": 0.1, "first": 0.0}, "recovery.first=0: must"),
        ({"name": "lora", "alpha": 0.0}, "recovery.alpha=0: must"),
        ({"distill": "logits", "task_weight": -1.0}, "recovery.task_weight=-1: must"),
        ({"task_loss": "answer"}, "name one with recovery.task"),
        ({"schedule": "step"}, "recovery.schedule=step"),
        ({"warm_up": 1.0}, "recovery.warm_up=1: must be in [0, 1)"),
        ({"checks": 0}, "recovery.checks=0"),
        ({"held_out": 0}, "recovery.held_out=0"),
        ({"distill": "all"}, "recovery.distill=all"),
        ({"temperature": 0.0}, "recovery.temperature"),
        ({"path": "nowhere.txt"}, "recovery.path=nowhere.txt"),
        ({"task": "bolq"}, "did you mean boolq"),
        ({"task": "rte", "task_loss": "f1"}, "recovery.task_loss=f1"),
        ({"task": "rte", "task_loss": "accuracy"}, "has no gradient"),
        ({"task": "rte", "distill": "logits"}, "its options are all that is followed"),
        ({"name": "norms", "shard": True}, "is for recovery=full"),
        ({"name": "mezo"}, "clips no gradient"),
        ({"distill": "logits", "distill_weight": 0.0, "task_weight": 0.0}, "nothing is learned"),
        ({"seed": -1}, "recovery.seed=-1: must be in [0, 4294967295]"),
        ({"steps": 0.5}, "recovery.steps=0.5: must be a whole number"),
        ({"name": "blocks", "scope": "half"}, "recovery.scope=half"),
        ({"name": "blocks", "distill": "logits"}, "follows the dense model's states"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told_with_its_key(changes: dict, told: str) -> None:
    problems = check_recovery(replace(asked(), **changes), 0.5, "unstructured", 512)
    assert len(problems) == 1
    assert told in problems[0]


def test_what_only_the_loaded_model_shows_is_refused() -> None:
    side_by_side, one_after_the_other = tiny("gpt_neox"), tiny("llama")
    blocks = asked("blocks", scope="sub_block")
    assert "use recovery.scope=block" in check_fit(blocks, side_by_side)[0]
    assert check_fit(blocks, one_after_the_other) == []
    assert "start several with torchrun" in check_fit(asked(shard=True), one_after_the_other)[0]
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **SIZES))
    assert "has no norm and no bias" in check_fit(asked("norms"), bare)[0]
    assert "kinds=fc1: the model has no" in check_fit(asked("sparsegrad", kinds=("fc1",)), one_after_the_other)[0]
    assert "an entry to tune" in check_fit(asked("spiel", density=1e-5), one_after_the_other)[0]
    assert check_fit(asked("spiel", density=1e-3), one_after_the_other) == []
    assert "model.dtype=bfloat16" in check_fit(asked("mezo"), one_after_the_other.half())[0]


@pytest.fixture
def of_two():
    """This process is the first of two; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("spiel", {}, ["recovery=spiel: runs in one process"]),
        ("sparsegrad", {}, ["recovery=sparsegrad: runs in one process"]),
        ("full", {"shard": True, "batch_size": 3, "held_out": 5}, ["recovery.batch_size=3", "recovery.held_out=5"]),
        ("full", {"shard": True, "batch_size": 4, "held_out": 6, "tested": 3}, []),
        ("full", {"shard": True, "task": "rte", "tested": 3}, ["recovery.tested=3"]),
        ("lora", {"batch_size": 3}, []),
    ],
)
def test_what_several_processes_cannot_share_is_refused(of_two, name: str, changes: dict, told: list[str]) -> None:
    problems = check_fit(asked(name, **changes), tiny("llama"))
    assert len(problems) == len(told)
    assert all(problem.startswith(begun) for problem, begun in zip(problems, told, strict=True))


def test_all_problems_are_told_together() -> None:
    problems = check_recovery(asked(lr=-1.0, distill="all", schedule="step"), 0.5, "unstructured", 512)
    assert len(problems) == 3


def test_a_window_longer_than_the_context_and_a_rounded_model_are_refused() -> None:
    assert "recovery.seq_len=513" in check_recovery(asked(seq_len=513), 0.5, "unstructured", 512)[0]
    assert "recovery=norms" in check_recovery(asked(), 0.5, "unstructured", 512, quantised=True)[0]
    assert check_recovery(asked("norms"), 0.5, "unstructured", 512, quantised=True) == []
    assert "none of the 50% zeros" in check_recovery(asked("sparsegrad"), 0.5, "unstructured", 512)[0]
    assert "only gather" in check_recovery(asked("sparsegrad", lr=None, steps=100), 0.0, "unstructured", 512)[0]
    assert check_recovery(asked("sparsegrad", lr=None, steps=101), 0.0, "unstructured", 512) == []
    assert "no step is left" in check_recovery(asked("sparsegrad", steps=10), 0.0, "unstructured", 512)[0]
    assert check_recovery(asked("sparsegrad", steps=11), 0.0, "unstructured", 512) == []
    assert "all entries are exchanged" in check_recovery(asked("spiel", lr=None, steps=50), 0.5, "2:4", 512)[0]
    for steps in (40, 51):
        assert check_recovery(asked("spiel", lr=None, steps=steps), 0.5, "2:4", 512) == []
    assert "names no linear" in check_recovery(asked("sparsegrad", kinds=()), 0.0, "unstructured", 512)[0]
    assert "2:4 is lost" in check_recovery(asked("spiel", exchange=True), 0.5, "2:4", 512)[0]
    assert check_recovery(asked("spiel", exchange=True), 0.5, "unstructured", 512) == []
    assert check_recovery(asked("spiel"), 0.5, "2:4", 512) == []
