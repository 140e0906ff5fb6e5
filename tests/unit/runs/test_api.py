"""`besa_exp.prune` and what it stands on: presets without Hydra, given texts and tokens, a request's identity."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import besa_exp
from besa_exp.blocks.pruner import pruned_by_masks
from besa_exp.cli.configuration import CONF_DIR, as_values, method_name, read_settings
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.methods.pruners.wanda import Wanda
from besa_exp.presets import METHOD_GROUPS, preset, presets
from besa_exp.run_folder.identity import config_of, request_identity
from besa_exp.runs.prune import prune as prune_into
from besa_exp.settings import EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings
from besa_exp.tensors.masks import keep_per_row
from besa_exp.texts.tokens import write_token_file

TOKENS = torch.randint(0, 258, (10, 32), generator=torch.Generator().manual_seed(1))
BERT = BertConfig(vocab_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
METHODS = [(group, name) for group in METHOD_GROUPS for name in presets(group)]


def tiny():
    return tiny_llama(context=32)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(("group", "name"), [*METHODS, *(("evaluator", name) for name in presets("evaluator"))])
def test_a_preset_is_the_object_that_hydra_composes(group: str, name: str) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", [f"{group}={name}", "seed=7"], return_hydra_config=True)
    composed = read_settings(config, method_name(config.hydra.runtime.choices))
    assert preset(group, name, seed=7) == getattr(composed, group)


@pytest.mark.parametrize(
    "asked",
    [{"pruner": "besa"}, {"pruner": "best"}, {"pruner": "wanda", "update": "obs", "budget": "owl"}],
    ids=lambda asked: "+".join(asked.values()),
)
def test_a_model_object_gets_the_weights_and_masks_of_a_run(asked: dict[str, str], tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "dense")
    in_place = besa_exp.prune(model, None, TOKENS, batch_size=4, **asked)
    in_run = besa_exp.prune(tmp_path / "dense", None, TOKENS, batch_size=4, out=tmp_path / "run", **asked)
    saved = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    assert all(torch.equal(weight, saved[name]) for name, weight in weights_of(model).items())
    assert all(torch.equal(mask, in_run.keep_masks[name]) for name, mask in in_place.keep_masks.items())
    assert in_place.losses == in_run.losses
    assert in_place.sparsity == in_run.sparsity == pytest.approx(0.5, abs=0.01)
    assert in_place.tokens_sha256 == in_run.tokens_sha256
    assert besa_exp.load_run(tmp_path / "run").sparsity == in_run.sparsity


def test_the_report_counts_what_the_model_holds() -> None:
    model = tiny()
    table = besa_exp.prune(model, None, TOKENS, pruner="magnitude", sparsity=0.3).to_pandas()
    names = [f"model.layers.{row.block}.{row.linear}.weight" for row in table.itertuples()]
    assert table.pruned.tolist() == [int((model.get_parameter(name) == 0).sum()) for name in names]
    assert set(table.columns) >= {"weights", "sparsity", "allocated", "loss_before", "loss_after"}


def test_mode_gradients_and_random_numbers_are_put_back() -> None:
    model = tiny().train()
    model.get_input_embeddings().requires_grad_(False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    besa_exp.prune(model, None, TOKENS, pruner="wanda")
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert not torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class FailsAtBlock:
    """Wanda's masks, until a block at which it raises."""

    index: int
    statistic = None
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, block, inputs, targets, statistics, target, on_step):
        if block.index == self.index:
            raise RunError("as asked")
        return pruned_by_masks({n: keep_per_row(lin.weight.abs(), target) for n, lin in block.linears.items()})


def test_a_pruner_of_ones_own_prunes() -> None:
    report = besa_exp.prune(tiny(), None, TOKENS, pruner=FailsAtBlock(99), sparsity=0.25)
    assert report.sparsity == 0.25


def test_blocks_of_another_request_are_refused_without_a_config(tmp_path: Path) -> None:
    """A run at 0.3 went on at 0.7 where no configuration was given."""
    tiny().save_pretrained(tmp_path / "dense")
    ask = {"out": tmp_path / "run", "pruner": FailsAtBlock(1)}
    with pytest.raises(RunError, match="as asked"):
        besa_exp.prune(tmp_path / "dense", None, TOKENS, sparsity=0.3, **ask)
    assert (tmp_path / "run" / "blocks" / "000000.json").is_file()
    with pytest.raises(ConfigurationError, match=r"sparsity: 0\.3 before, 0\.7 now"):
        besa_exp.prune(tmp_path / "dense", None, TOKENS, sparsity=0.7, **ask)
    with pytest.raises(ConfigurationError, match="calibration_tokens_sha256"):
        besa_exp.prune(tmp_path / "dense", None, TOKENS.flip(0), sparsity=0.3, **ask)


def test_settings_alone_say_what_a_configuration_says() -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", ["pruner=best", "budget=owl", "update=dsnot"], return_hydra_config=True)
    settings = read_settings(config, method_name(config.hydra.runtime.choices))
    values = as_values(config)
    asked, said = request_identity({"method": settings.pruner_name, **values}), request_identity(config_of(settings))
    asked["calibration"].pop("_target_")
    assert {key: json.loads(json.dumps(said[key])) for key in asked} == asked


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"pruner": "wandaa"}, "did you mean wanda"),
        ({"budget": "owll"}, "did you mean owl"),
        ({"sparsity": 50}, r"must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must be in \[0, 1\)"),
        ({"pattern": "2:4"}, "use pattern=N:4"),
        ({"pattern": "four"}, "must be 'unstructured' or 'N:M'"),
        ({"pruner": "magnitude", "update": "obs", "pattern": "N:8"}, "does not choose N"),
        ({"pruner": object()}, "a pruner has prune_block"),
        ({"num_samples": 0}, "must be 1 or more"),
        ({"seed": -1}, "whole number from 0"),
        ({"out": "somewhere"}, "are for a path"),
        ({"model_or_path": torch.nn.Linear(2, 2)}, "no causal language model"),
        ({"model_or_path": BertForMaskedLM(BERT)}, "no causal language model"),
        ({"model_or_path": "embedded"}, "is a path: give out=FOLDER"),
        ({"texts_or_tokens": ["a text"]}, "need a tokenizer"),
        ({"texts_or_tokens": torch.rand(2, 4)}, r"must be whole numbers \[sample, seq\]"),
        ({"texts_or_tokens": TOKENS + 10_000}, "model's vocabulary of"),
        ({"texts_or_tokens": TOKENS.repeat(1, 2)}, "exceed the model's context of 32"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(asked: dict, answer: str) -> None:
    model = tiny()
    before = weights_of(model)
    asked = {"model_or_path": model, "texts_or_tokens": TOKENS, "pruner": "besa", **asked}
    with pytest.raises(ValueError, match=answer):
        besa_exp.prune(**asked)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_texts_are_cut_into_windows_of_the_context() -> None:
    class Words:
        bos_token_id = eos_token_id = None

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    texts = ["a bb ccc dddd " * 40, "eeeee ff g " * 60]
    one, other = (besa_exp.prune(tiny(), Words(), texts, pruner="wanda", num_samples=6) for _ in range(2))
    assert one.tokens_sha256 == other.tokens_sha256
    assert one.tokens_sha256 != besa_exp.prune(tiny(), Words(), texts, pruner="wanda", num_samples=5).tokens_sha256


def test_importing_the_package_imports_no_library() -> None:
    code = (
        "import sys, besa_exp; from besa_exp import load_runs; "
        "print([name for name in ('torch', 'transformers', 'hydra', 'pandas') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert all(getattr(besa_exp, name) for name in besa_exp.__all__)
    assert {*besa_exp.__all__} <= {*dir(besa_exp)}
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        besa_exp.prun  # noqa: B018


def test_the_settings_of_a_run_may_be_given_alone(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "dense")
    path = str(tmp_path / "dense")
    calibration = replace(preset("calibration", "embedded"), path=str(tmp_path / "tokens.safetensors"))
    write_token_file(TOKENS, tmp_path / "tokens.safetensors")
    none = EvaluatorSettings("none")
    settings = RunSettings(ModelSettings("dense", path), calibration, Wanda(), "wanda", none, TrackerSettings("none"))
    results = prune_into(settings, tmp_path / "run")
    assert results["measured_sparsity"] == 0.5
    assert besa_exp.load_run(tmp_path / "run").config["sparsity"] == 0.5


def test_pruning_twice_from_equal_models_gives_equal_bytes() -> None:
    models = [tiny(), copy.deepcopy(tiny())]
    for model in models:
        besa_exp.prune(model, None, TOKENS, pruner="besa", seed=5)
    first, second = map(weights_of, models)
    assert all(torch.equal(first[name], second[name]) for name in first)
