"""What is summed over the samples and models that are tried is read by the host when all of it has been asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_waits import HostWaits
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks
from besa_exp.blocks.head import TOKENS, head_of, summed_divergences, summed_entropies
from besa_exp.blocks.whole_model import Whole
from besa_exp.methods.structure.shortgpt import passage

DRAWS = torch.Generator().manual_seed(0)
STATES = [torch.randn(3, TOKENS, 4, generator=DRAWS) for _ in range(3)]  # each sample passes the head by itself
IDS = torch.randint(7, (3, TOKENS), generator=DRAWS)
TO_LOGITS = torch.randn(4, 7, generator=DRAWS)


def head(hidden):
    return hidden @ TO_LOGITS


def test_divergences_of_tried_models_are_read_once():
    with HostWaits() as waits:
        found = summed_divergences(head, STATES[0], STATES)
    assert waits.reads == ["cpu"]
    p, *others = (head(states).double().log_softmax(-1) for states in STATES)
    expected = [0.0, *(float((p.exp() * (p - q)).sum()) for q in others)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_entropies_of_tried_models_are_read_once_and_no_token_keeps_the_host():
    with HostWaits() as waits:
        found = summed_entropies(head, IDS, STATES)
    assert (waits.reads, waits.sends) == (["cpu"], 0)
    expected = [
        -float(head(states).double().log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None]).sum()) for states in STATES
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_of_a_whole_model_is_read_once():
    room: Any = print  # is not asked: nothing is held of all blocks
    whole = Whole(lambda backwards: [], STATES[0], STATES[1], head, 1, room)
    with HostWaits() as waits:
        found = whole.divergence(torch.arange(3), lambda number, block: {})
    assert waits.reads == ["cpu", "__float__"]
    assert found == pytest.approx(float(summed_divergences(head, STATES[1], STATES[:1])) / IDS.numel())


def test_influences_are_read_once_a_block():
    blocks: Any = iter([lambda hidden: hidden + 1, lambda hidden: 2 * hidden])
    with HostWaits() as waits:
        passage(blocks, STATES[0].clone(), 1)
    assert waits.reads == ["cpu"] * (1 + 2 * 2)  # and the states at the last token, before and after each block


def test_a_head_has_its_tokens_where_the_model_is():
    model = tiny_llama()
    head = head_of(model, capture_blocks(model, IDS[:, :8]), IDS[:, :8])
    with HostWaits() as waits, torch.no_grad():
        head(torch.zeros(1, 8, 64))
    assert waits.sends == 0
