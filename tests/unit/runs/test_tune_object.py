"""`besa_exp.tune`: a model object is tuned in place under its own zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from letters import Letters
from tiny_llama import tiny_llama
from torch import nn

import besa_exp
from besa_exp.blocks.reports import RecoveryReport
from besa_exp.errors import ConfigurationError
from besa_exp.recovery.descent import Adam, Descent
from besa_exp.recovery.full import Kept
from besa_exp.recovery.recipe import method_of
from besa_exp.recovery.tuning import FACTORS
from besa_exp.tensors.keep_bits import KeepBits

RULE = torch.arange(60 * 16).view(60, 16) % 7
ASKED = replace(besa_exp.preset("recovery", "full"), steps=6, batch_size=4, held_out=4, checks=3, lr=0.01, seq_len=16)


def pruned():
    model = tiny_llama(context=32)
    besa_exp.prune(model, None, RULE, pruner="magnitude", sparsity=0.5)
    return model


def test_zeros_stay_and_the_held_out_loss_falls() -> None:
    model, points = pruned(), []
    zeros = {name: weight == 0 for name, weight in model.state_dict().items()}
    report = besa_exp.tune(model, None, RULE, recovery=ASKED, on_step=points.append)
    assert report.loss_after < report.loss_before
    assert (report.method, report.steps, report.tokens, len(points)) == ("full", 6, 6 * 4 * 16, 6)
    after = model.state_dict()
    assert all(torch.equal(after[name] == 0, mask) for name, mask in zeros.items())
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_two_calls_give_the_same_bits() -> None:
    one, other = pruned(), pruned()
    besa_exp.tune(one, None, RULE, recovery=ASKED)
    with torch.inference_mode():
        besa_exp.tune(other, None, RULE, recovery=ASKED)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


@dataclass(frozen=True)
class HeadAlone:
    """A method of one's own: the head, under a step size that is found."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-2))

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        head = {name: Kept.of(value, None) for name, value in model.named_parameters() if name == "lm_head.weight"}
        return Descent(model, head, self.adam, keep)


def test_a_method_of_ones_own_tunes_with_the_step_size_that_is_asked_for_or_found() -> None:
    model = pruned()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asked = replace(ASKED, name="head", method=HeadAlone(), embeddings=None, lr=None, steps=10)
    report = besa_exp.tune(model, None, RULE, recovery=asked)
    assert report.loss_after < report.loss_before
    assert report.lr in [pytest.approx(1e-2 * factor) for factor in FACTORS]
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert (report.method, changed) == ("head", ["lm_head.weight"])
    made = method_of(replace(asked, lr=0.5, clip=None, decay=0.1))
    assert made == HeadAlone(Adam(lr=0.5, decay=0.1, clip=None))


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="dense=True"):
        besa_exp.tune(tiny_llama(context=32), None, RULE, recovery=ASKED)
    with pytest.raises(ConfigurationError, match="of this model would stay"):
        besa_exp.tune(pruned(), None, RULE, recovery=replace(ASKED, name="sparsegrad"))
    with pytest.raises(ConfigurationError, match="LlamaModel is no causal language model"):
        besa_exp.tune(pruned().model, None, RULE, recovery=ASKED)
    with pytest.raises(ConfigurationError, match="number 0 is ndarray, not text"):
        besa_exp.tune(pruned(), None, RULE.numpy(), recovery=ASKED)
    with pytest.raises(ConfigurationError, match=r"recovery\.method=Letters: a recovery method has begin, adam or lr"):
        besa_exp.tune(pruned(), None, RULE, recovery=replace(ASKED, name="mine", method=Letters()))
    with pytest.raises(ConfigurationError, match=r"recovery\.name=full: is a method of the package; give HeadAlone a"):
        besa_exp.tune(pruned(), None, RULE, recovery=replace(ASKED, method=HeadAlone()))
    with pytest.raises(ConfigurationError, match="given exactly where one is followed"):
        besa_exp.tune(pruned(), None, RULE, recovery=replace(ASKED, distill="logits"))
    with pytest.raises(ConfigurationError, match="teacher=str: give the dense model as an object"):
        besa_exp.tune(pruned(), None, RULE, recovery=replace(ASKED, distill="logits"), teacher="dense")  # type: ignore[arg-type]
    for distill, others, told in (
        ("logits", {"vocab_size": 300}, "dense model has 300 tokens in its vocabulary, the one that follows it 258"),
        ("squarehead", {"hidden_size": 32}, "dense model has 32 hidden units, the one that follows it 64"),
    ):
        other, asked = tiny_llama(context=32, **others), replace(ASKED, distill=distill)
        with pytest.raises(ConfigurationError, match=told):
            besa_exp.tune(pruned(), None, RULE, recovery=asked, teacher=other)


def test_the_dense_model_can_be_followed() -> None:
    asked = replace(ASKED, distill="logits", steps=2, lr=1e-3)
    assert besa_exp.tune(pruned(), None, RULE, recovery=asked, teacher=tiny_llama(context=32)).steps == 2


@pytest.mark.parametrize(("name", "task_loss", "lr"), [("full", "options", 1e-2), ("mezo", "accuracy", 1e-3)])
def test_a_task_is_learned_and_its_accuracy_on_other_examples_told(tmp_path, name, task_loss, lr) -> None:
    """The prompts' first words say what is right."""
    rows = [{"sentence": f"{('bad', 'good')[n % 2]} {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = replace(
        besa_exp.preset("recovery", name), task="sst2", path=str(tmp_path / "rows.jsonl"), task_loss=task_loss, lr=lr,
        seq_len=32, steps=12, batch_size=8, shots=8, tested=20, held_out=8, checks=3,
    )  # fmt: skip
    report = besa_exp.tune(pruned(), Letters(), recovery=asked)  # type: ignore[arg-type]
    assert report.task is not None
    assert (report.task["name"], report.task["examples"]) == ("sst2", 20)
    assert 12 * 8 * 2 * 15 < report.tokens < 12 * 8 * 2 * 32  # of both options, not of what fills rows up
    accuracy = report.task["accuracy"]
    assert accuracy["before"] < 0.8
    if name == "full":
        assert accuracy["after"] == 1
    assert report.loss_after <= report.loss_before
    assert RecoveryReport.from_dict(report.to_dict()) == report
