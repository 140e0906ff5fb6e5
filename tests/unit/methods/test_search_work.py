"""What a search for a structure says that it asks for is what passes through the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import CountedSearch, DenseModel
from besa_exp.methods.structure.policy_gradient import PolicyGradient
from besa_exp.methods.structure.shortgpt import ShortGPT
from besa_exp.methods.structure.sleb import Sleb
from besa_exp.methods.structure.widths import Widths

BATCH, SAMPLES = 2, 8
IDS = torch.randint(0, 64, (SAMPLES, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "method",
    [
        ShortGPT(1),
        Sleb(2, early_barrier=1, latter_barrier=2),
        Sleb(2, early_barrier=0, latter_barrier=0, loss="cross_entropy"),
        Widths(0.2),
        Widths(0.2, "magnitude"),
        PolicyGradient(0.2, steps=7, checks=4),
        PolicyGradient(0.2, steps=3, checks=0, baseline="moving", start="random"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_it_is_counted_in_the_model_itself(method: Any, tmp_path: Path) -> None:
    model: Any = tiny_llama(num_hidden_layers=6).requires_grad_(False)
    blocks, costs = capture_blocks(model, IDS), costs_of_model(model)
    inputs, head = embed(model, blocks, IDS, BATCH), head_of(model, blocks, IDS)
    dense = DenseModel(lambda: blocks, inputs.clone, lambda: head, IDS, costs, dimensions_of_model(model), BATCH)
    passed: list[int] = []
    predicted: list[int] = []
    for block in blocks:
        block.arguments(BATCH)  # how a block is called is found by calling it
        block.module.get_submodule("mlp").register_forward_hook(lambda module, given, out: passed.append(len(given[0])))
    model.lm_head.register_forward_hook(lambda module, given, out: predicted.append(len(given[0])))
    method.choose(dense, Progress(tmp_path / "search.json"), lambda said: None)
    assert isinstance(method, CountedSearch)
    work = method.work(costs, SAMPLES, BATCH)
    assert (work.passes, work.predictions) == (sum(passed), sum(predicted))
    blocks[0](inputs[:BATCH])
    assert sum(passed) == work.passes + BATCH, "what passes is not counted"
