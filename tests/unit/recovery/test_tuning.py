"""The tuning loop: what it promises of held-out text, interruptions, and losses that are not finite."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from pruned_llama import WINDOWS, assert_same_bits, assert_zeros_exact, pruned_llama, weights_of

from besa_exp.errors import ConfigurationError, RunError
from besa_exp.recovery.descent import Adam, Descent
from besa_exp.recovery.full import Full, Norms
from besa_exp.recovery.lora import Lora
from besa_exp.recovery.objective import NextToken, mean_loss
from besa_exp.recovery.saved_states import SavedStates
from besa_exp.recovery.schedule import Schedule, batch_at, key_of
from besa_exp.recovery.tuner import Taken
from besa_exp.recovery.tuning import Parts, Plan, tune
from besa_exp.tensors.keep_bits import KeepBits

LEARNED, HELD_OUT = WINDOWS[:8], WINDOWS[8:]
PLAN = Plan(Schedule(6, warm_up=2), batch_size=3, judge_every=2)


class Killed(Exception):
    """Ends a run where it is."""


def tuned(method, plan=PLAN, folder=None, held_out=HELD_OUT, on_point=lambda point: None, identity=None, **objective):
    model, keep = pruned_llama()
    for name, bits in keep.items():
        model.get_parameter(name)[~bits.mask()] = -0.0
    states = SavedStates(folder, identity or {"lr": 0.01}) if folder else None
    parts = Parts(LEARNED, held_out)
    report, _ = tune(model, keep, method, NextToken(model, **objective), parts, plan, states, on_point)
    assert_zeros_exact(model, keep)
    judged = {point.step + 1: point.held_out for point in report.points if point.held_out is not None}
    judged = {0: report.before} | {step: loss for step, loss in judged.items() if math.isfinite(loss)}
    assert (report.best_step, report.after) == min(judged.items(), key=lambda item: item[1])
    return model, report


def killing_at(step, told):
    def on_point(point):
        told.append(point)
        if point.step == step:
            raise Killed

    return on_point


def test_the_result_is_better_on_held_out_text_where_that_is_what_is_learned():
    plan = Plan(Schedule(8), batch_size=8, judge_every=4)
    model, report = tuned(Full(Adam(lr=3e-3)), plan, held_out=LEARNED)
    assert report.after < report.before - 0.5
    assert mean_loss(model, LEARNED, 3) == pytest.approx(report.after, rel=1e-5)
    assert report.stopped is None
    assert [point.step for point in report.points] == list(range(8))
    assert [point.held_out is not None for point in report.points] == [False, False, False, True] * 2
    assert [point.tokens for point in report.points] == [8 * 24] * 8


def test_a_course_that_only_makes_it_worse_ends_with_the_pruned_model():
    """Held-out text is what the pruned model says itself."""
    said = HELD_OUT[:, :1]
    with torch.no_grad():
        for _ in range(23):
            said = torch.cat([said, pruned_llama()[0](said).logits[:, -1:].argmax(dim=-1)], dim=1)
    model, report = tuned(Full(Adam(lr=0.5, clip=None)), held_out=said)
    assert (report.best_step, report.after) == (0, report.before)
    assert_same_bits(model, pruned_llama()[0])


FULL, LORA = Full(Adam(lr=3e-3)), Lora(Adam(lr=1e-2), rank=4)


@cache
def whole_course(method):
    """Of a run that was not killed."""
    return tuned(method, held_out=LEARNED)


@pytest.mark.parametrize(("method", "killed_at"), [(FULL, 0), (FULL, 2), (FULL, 5), (LORA, 3)])
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path, method, killed_at):
    whole, expected = whole_course(method)
    told = []
    with pytest.raises(Killed):
        tuned(method, folder=tmp_path, held_out=LEARNED, on_point=killing_at(killed_at, told))
    later = []
    model, report = tuned(method, folder=tmp_path, held_out=LEARNED, on_point=later.append)
    assert_same_bits(model, whole)
    assert (report.before, report.after, report.best_step) == (expected.before, expected.after, expected.best_step)
    assert [(p.step, p.loss, p.held_out) for p in later] == [(p.step, p.loss, p.held_out) for p in expected.points]
    again = []
    finished, _ = tuned(method, folder=tmp_path, held_out=LEARNED, on_point=again.append)
    assert [point.seconds for point in again] == [point.seconds for point in later]  # told, not computed
    assert_same_bits(finished, whole)


def test_the_step_size_is_found_by_trial_once_and_the_course_is_that_of_the_size_given(tmp_path):
    """Of sizes a hundred times too small and more the greatest, and a killed run does not search again."""
    searched = replace(PLAN, trial=3)
    small = Full(Adam(lr=3e-5))
    given, expected = whole_course(FULL)
    with pytest.raises(Killed):
        tuned(small, searched, tmp_path, LEARNED, killing_at(1, []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("besa_exp.recovery.tuning.downhill", None)
        model, report = tuned(small, searched, tmp_path, LEARNED)
    assert report.factor == 100
    assert report.before == expected.before
    assert report.after == pytest.approx(expected.after, rel=1e-4)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, given.get_parameter(name), rtol=1e-3, atol=1e-4)


class Remembered:
    """A method and its tuner: changes nothing, and remembers seeds, windows and step sizes."""

    parameters, keep = {}, {}

    def __init__(self):
        self.seeds, self.windows, self.scales = [], [], []

    def begin(self, model, keep, seed):
        self.seeds.append(seed)
        return self

    def step(self, objective, windows, number, scale):
        self.windows.append(windows)
        self.scales.append(scale)
        return Taken(1.0)

    def ready(self):
        return nullcontext()

    def state(self):
        return {}

    def load(self, state):
        """There is nothing."""


def test_each_size_is_tried_with_the_whole_schedule_in_a_few_steps():
    (model, keep), method, schedule = pruned_llama(), Remembered(), Schedule(12, warm_up=4)
    plan = Plan(schedule, batch_size=3, judge_every=6, seed=7, trial=6)
    tune(model, keep, method, NextToken(model), Parts(LEARNED, HELD_OUT), plan)
    short = replace(schedule, steps=6, warm_up=2)
    tried = [factor * short.scale(step) for factor in (1.0, 3.0, 0.3) for step in range(6)]
    assert method.scales == tried + [schedule.scale(step) for step in range(12)]
    batches = [LEARNED[batch_at(step, 8, 3, 7)] for step in (*range(6), *range(6), *range(6), *range(12))]
    assert all(torch.equal(found, batch) for found, batch in zip(method.windows, batches, strict=True))
    assert method.seeds == [7] * 4


class Scaled(Remembered):
    """After each step the head is the pruned model's times a number, the nearer to 0, the smaller the loss; and the
    mask is another."""

    def begin(self, model, keep, seed):
        self.parameters, self.head = {"lm_head.weight": model.lm_head.weight}, model.lm_head.weight.clone()
        return self

    def mask(self, number):
        return self.head > 0.01 * number

    def step(self, objective, windows, number, scale):
        self.parameters["lm_head.weight"].copy_(self.head * (0.9, 0.8, 0.95, 0.85)[number])
        self.keep = {"lm_head.weight": KeepBits.of(self.mask(number))}
        return Taken(1.0)


@pytest.mark.parametrize("in_files", [False, True])
def test_the_best_state_is_kept_with_its_mask_where_those_after_it_are_a_little_worse(tmp_path, in_files):
    (model, keep), method, plan = pruned_llama(), Scaled(), Plan(Schedule(4), judge_every=1)
    states = SavedStates(tmp_path, {}) if in_files else None
    report, kept = tune(model, keep, method, NextToken(model), Parts(LEARNED, HELD_OUT), plan, states)
    assert (report.best_step, report.after) == (2, min(point.held_out or math.inf for point in report.points))
    assert torch.equal(model.lm_head.weight, method.head * 0.8)
    assert torch.equal(kept["lm_head.weight"].mask(), method.mask(1))


class Ruining(Scaled):
    """The larger the steps, the smaller the loss, were those from 0.3 times their size on not what ruins it: they have
    no finite loss themselves, or leave a model that has none."""

    def __init__(self, itself):
        super().__init__()
        self.itself = itself

    def step(self, objective, windows, number, scale):
        ruins = scale >= 0.3
        self.parameters["lm_head.weight"].copy_(self.head * (1 - scale / 200))
        if ruins and not self.itself:
            self.parameters["lm_head.weight"].fill_(math.nan)
        return Taken(math.nan if ruins and self.itself else 1.0)


@pytest.mark.parametrize("itself", [True, False])
def test_the_greatest_size_that_ends_in_a_loss_is_taken(itself):
    (model, keep), method = pruned_llama(), Ruining(itself)
    plan = Plan(Schedule(2, shape="constant"), trial=1)
    report, _ = tune(model, keep, method, NextToken(model), Parts(LEARNED, HELD_OUT), plan)
    assert (report.factor, report.stopped) == (0.1, None)
    assert report.before == mean_loss(pruned_llama()[0], HELD_OUT, 8)


def test_sizes_that_ruin_the_model_are_not_taken():
    _, report = tuned(Full(Adam(lr=1.0)), replace(PLAN, trial=3), held_out=LEARNED)
    assert report.factor < 1
    assert report.after < report.before


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, caplog):
    with pytest.raises(Killed):
        tuned(FULL, folder=tmp_path, held_out=LEARNED, on_point=killing_at(4, []))
    newest = max(tmp_path.glob("state-*.json"), key=lambda file: json.loads(file.read_text())["number"])
    weights = newest.with_suffix(".safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    model, _ = tuned(FULL, folder=tmp_path, held_out=LEARNED)
    assert "is damaged" in caplog.text
    assert_same_bits(model, whole_course(FULL)[0])


def test_files_are_two_states_and_the_best_weights_that_they_name(tmp_path):
    tuned(FULL, folder=tmp_path, held_out=LEARNED)
    names = {file.name for file in tmp_path.iterdir()}
    assert {name for name in names if name.startswith("state")} == {
        f"state-{slot}.{ending}" for slot in "ab" for ending in ("json", "safetensors")
    }
    named = {json.loads((tmp_path / f"state-{slot}.json").read_text())["best"] for slot in "ab"}
    assert {name for name in names if name.startswith("best")} == named


def test_the_state_of_another_run_is_refused_with_what_differs(tmp_path):
    tuned(FULL, folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"lr 0\.01, now 0\.02"):
        tuned(FULL, folder=tmp_path, identity={"lr": 0.02})


@dataclass(frozen=True)
class Odd:
    """A method whose tuner is odd."""

    what: str
    lr: float = 1e-3

    def begin(self, model, keep, seed):
        if self.what in ("none", "empty"):
            return None if self.what == "none" else Descent(model, {}, Adam(lr=1e-3), keep)
        tuner = Norms().begin(model, keep, seed)
        odd = {"step": lambda *given: None} if self.what == "step" else {"state": lambda: {"count": 3}}
        vars(tuner).update(odd)
        return tuner


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("none", r"recovery\.method=Odd: begin gave NoneType, no tuner; give a Descent"),
        ("empty", "this recovery finds nothing to tune in the model"),
        ("step", r"the tuner's step gave NoneType, not a Taken"),
        ("state", "the tuner's state holds count, which is no tensor"),
    ],
)
def test_what_a_method_of_ones_own_wrongly_gives_is_told(tmp_path, what, told):
    with pytest.raises(RunError, match=told):
        tuned(Odd(what), folder=tmp_path)


def test_a_full_disk_is_told_and_the_state_before_is_kept(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        tuned(FULL, folder=tmp_path, held_out=LEARNED, on_point=killing_at(3, []))

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("besa_exp.recovery.saved_states.save_file", no_room)
        with pytest.raises(
            RunError, match=r"No space left on device.*free disk space, then run the same command again"
        ):
            tuned(FULL, folder=tmp_path, held_out=LEARNED)
    model, _ = tuned(FULL, folder=tmp_path, held_out=LEARNED)
    assert_same_bits(model, whole_course(FULL)[0])


def test_a_loss_that_is_not_finite_ends_the_course_with_the_best_weights(tmp_path):
    plan, points, again = Plan(Schedule(9, shape="constant"), batch_size=8, judge_every=4), [], []
    model, report = tuned(Full(Adam(lr=1e30, clip=None)), plan, folder=tmp_path, on_point=points.append)
    assert report.stopped is not None
    assert "at step 0" in report.stopped or "at step 1" in report.stopped
    assert "recovery.lr" in report.stopped
    assert_same_bits(model, pruned_llama()[0])
    _, same = tuned(Full(Adam(lr=1e30, clip=None)), plan, folder=tmp_path, on_point=again.append)
    assert (same.stopped, same.after) == (report.stopped, report.after)
    assert [point.seconds for point in again] == [point.seconds for point in points]  # reported, not computed


def test_every_window_is_used_once_before_any_comes_again_and_order_is_a_function_of_the_seed():
    numbers = torch.cat([batch_at(step, 7, 3, seed=1) for step in range(7)]).view(3, 7)
    for epoch in numbers:
        assert sorted(epoch.tolist()) == list(range(7))
    assert len({tuple(epoch.tolist()) for epoch in numbers}) == 3
    assert torch.equal(batch_at(4, 7, 3, seed=1), numbers.flatten()[12:15])
    assert not torch.equal(torch.cat([batch_at(step, 7, 3, seed=2) for step in range(7)]), numbers.flatten())
    assert len({key_of("a", 1, "b"), key_of("a", 1, "c"), key_of("a1", "b")}) == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])],
)
def test_the_step_size_rises_then_falls(shape, expected):
    schedule = Schedule(4, warm_up=2, shape=shape)
    assert [schedule.scale(step) for step in range(4)] == pytest.approx(expected)
