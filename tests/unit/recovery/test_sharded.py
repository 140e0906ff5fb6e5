"""A model that is dealt out (FSDP2): here to one process, whose rows are all; two are tried in test_torchrun."""

from __future__ import annotations

import pytest
import torch
from pruned_llama import WINDOWS, as_bytes, assert_zeros_exact, pruned_llama, weights_of
from torch import distributed as dist

from besa_exp.recovery.descent import Adam
from besa_exp.recovery.full import Full
from besa_exp.recovery.objective import NextToken
from besa_exp.recovery.saved_states import SavedStates
from besa_exp.recovery.schedule import Schedule
from besa_exp.recovery.sharded import sharded, take_back
from besa_exp.recovery.tuning import Parts, Plan, tune

PLAN = Plan(Schedule(6, warm_up=2), batch_size=4, judge_every=2, trial=2)


@pytest.fixture
def alone(tmp_path_factory):
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('ranks') / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_tuned_to_the_bits_of_one_that_is_whole_also_when_killed(alone, tmp_path, tied):
    def run(dealt_out, until=None):
        model, keep = pruned_llama(tie_word_embeddings=tied)
        before, twin = weights_of(model), sharded(model) if dealt_out else model
        states = SavedStates(tmp_path, {}) if dealt_out else None

        def on_point(point):
            if point.step == until:
                raise KeyboardInterrupt

        objective = NextToken(twin, micro_batch=2, checkpointing=dealt_out)
        parts = Parts(WINDOWS[:8], WINDOWS[:8])
        course, _ = tune(twin, keep, Full(Adam(lr=1e-3)), objective, parts, PLAN, states, on_point)
        if dealt_out:
            assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
            take_back(model, twin)
        assert_zeros_exact(model, keep)
        return weights_of(model), [point.gradient_norm for point in course.points]

    whole, norms = run(False)
    with pytest.raises(KeyboardInterrupt):
        run(True, until=4)
    found, again = run(True)
    assert again == pytest.approx(norms, rel=1e-6)  # AdamW forgives any factor
    for name, value in found.items():
        assert torch.equal(as_bytes(value), as_bytes(whole[name])), name
