"""A step keeps the host waiting for what it computed as often however many micro-batches and tensors it has: a GPU that
is waited for has nothing to do until the host has asked for more."""

from __future__ import annotations

import pytest
from host_waits import HostWaits
from pruned_llama import WINDOWS, pruned_llama

from besa_exp.recovery.full import Full, Norms
from besa_exp.recovery.lora import Lora
from besa_exp.recovery.mezo import Mezo
from besa_exp.recovery.objective import NextToken, mean_loss
from besa_exp.recovery.reconstruction import Blocks, Reconstruction
from besa_exp.recovery.sketch import Sketch
from besa_exp.recovery.spiel import Spiel

OF_A_PASS = "__bool__"  # transformers' own, in each forward pass of a model
METHODS = {
    "full": Full(), "lora": Lora(), "norms": Norms(), "sketch": Sketch(), "spiel": Spiel(100, density=0.05),
    "mezo": Mezo(together=1), "blocks": Blocks(),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_its_loss_and_the_norm_of_its_gradient_once(name):
    model, keep = pruned_llama()
    tuner, objective = METHODS[name].begin(model, keep, 0), NextToken(model)
    if name == "blocks":
        objective = Reconstruction.of(model, pruned_llama(seed=1)[0], "block", 1, WINDOWS.shape[1])
    tuner.step(objective, WINDOWS[:4], 0, 1.0)  # captures what blocks are called with
    with HostWaits() as waits:
        tuner.step(objective, WINDOWS[:4], 1, 1.0)
    reads = [read for read in waits.reads if read != OF_A_PASS]
    assert reads == (["tolist"] if name == "mezo" else ["cpu", "__float__", "__float__"])
    assert waits.sends == 0


def test_a_held_out_loss_is_read_once():
    model, _ = pruned_llama()
    with HostWaits() as waits:
        mean_loss(model, WINDOWS, 2)
    assert [read for read in waits.reads if read != OF_A_PASS] == ["cpu", "__float__"]
    assert waits.sends == 0
