"""A massive token (arXiv 2402.17762) must not blind the search to all others.

The model is the embedded one, with the embedding of `<|begin|>` made a thousand times as long and the head untied from
it. Every window begins with that token, so its state is massive in all blocks, as the first token's is in large models.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import divergence
from besa_exp.blocks.loop import prune_blocks
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.masks import Goal
from besa_exp.texts.embedded.text import MODEL_DIR, calibration_documents

LENGTH, MASSIVE, BEGIN = 64, 1000, 0


def model_with_a_massive_token() -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).requires_grad_(False)
    embedding = model.get_input_embeddings()
    model.lm_head.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
    embedding.weight[BEGIN] *= MASSIVE
    return model


@cache
def windows():
    """16 to calibrate on and 8 held out, each `<|begin|>` and then text."""
    text = "\n".join(calibration_documents().documents[:40])
    ids = AutoTokenizer.from_pretrained(MODEL_DIR)(text, add_special_tokens=False).input_ids
    body = torch.tensor(ids[: 24 * (LENGTH - 1)]).view(24, LENGTH - 1)
    drawn = torch.cat([torch.full((24, 1), BEGIN), body], dim=1)
    return drawn[:16], drawn[16:]


@cache
def harm(pruner):
    """How far the ordinary tokens' predictions are from the dense model's, in nats."""
    calibration, held_out = windows()
    model = model_with_a_massive_token()
    expected = model(held_out).logits
    blocks = capture_blocks(model, calibration)
    list(prune_blocks(blocks, embed(model, blocks, calibration, 8), pruner, Goal(0.5), 8))
    return float(divergence(expected, model(held_out).logits)[:, 1:].mean())


def test_the_token_is_massive_in_every_block():
    states = model_with_a_massive_token()(windows()[1], output_hidden_states=True).hidden_states[1:-1]
    for state in states:
        sizes = state.norm(dim=-1)
        assert sizes[:, 0].min() > 20 * sizes[:, 1:].median()


def test_a_search_on_the_channels_loss_harms_ordinary_tokens_and_the_default_does_not():
    assert harm(Besa(loss="channel")) > 1.1 * harm(Uniform())
    assert harm(Besa()) < 0.8 * harm(Uniform())


def test_a_block_that_loses_the_token_is_named_once(caplog):
    class Overwriting(Uniform):
        """Uniform but for block 2, whose weights are replaced by large ones."""

        def prune_block(self, task):
            found = super().prune_block(task)
            if task.block.index != 2:
                return found
            return replace(found, weights={name: weight * 300 for name, weight in task.weights.items()})

    calibration, _ = windows()
    for pruner, named in ((Uniform(), []), (Overwriting(), ["model.layers.2: 2 of 2 massive tokens"])):
        model = model_with_a_massive_token()
        blocks = capture_blocks(model, calibration)
        caplog.clear()
        list(prune_blocks(blocks, embed(model, blocks, calibration, 8), pruner, Goal(0.5), 8))
        said = [record.getMessage() for record in caplog.records if "massive" in record.getMessage()]
        assert len(said) == len(named)
        assert all(start in message for start, message in zip(named, said, strict=True))
