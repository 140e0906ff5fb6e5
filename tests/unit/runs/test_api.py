"""`besa_exp.prune` and what it stands on: given texts and tokens, a request's identity."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hydra import compose, initialize_config_dir
from reloaded_here import reload_here
from tiny_llama import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import besa_exp
from besa_exp.blocks.pruner import Traits, pruned_by_masks
from besa_exp.cli.configuration import as_values, method_name, read_settings
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.presets import CONF_DIR, METHOD_GROUPS, preset
from besa_exp.run_folder.identity import as_plain, config_of, request_identity
from besa_exp.run_folder.status import read_status
from besa_exp.runs.prune import prune as prune_into
from besa_exp.settings import EvaluatorSettings, ModelSettings, RunSettings, SaveSettings, TrackerSettings
from besa_exp.tensors.masks import keep_per_row
from besa_exp.texts.tokens import write_token_file

TOKENS = torch.randint(0, 258, (10, 32), generator=torch.Generator().manual_seed(1))
BERT = BertConfig(vocab_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)


def tiny():
    return tiny_llama(context=32)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder with the tiny model."""
    tiny().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def settings_of(dense: Path, **asked: str) -> RunSettings:
    """Of a run on TOKENS, which are written beside the model."""
    write_token_file(TOKENS, dense / "tokens.safetensors")
    return RunSettings(
        model=ModelSettings("dense", str(dense)),
        calibration=replace(preset("calibration", "c4"), path=str(dense / "tokens.safetensors"), batch_size=4),
        evaluator=EvaluatorSettings("none"),
        tracker=TrackerSettings("none"),
        pruner_name="+".join(asked[group] for group in METHOD_GROUPS if group in asked),
        save=SaveSettings(verify=False),
        **{group: preset(group, name) for group, name in asked.items()},  # type: ignore[arg-type]
    )


def test_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nowhere/at/all: there is no such folder, and it is no hub id"):
        besa_exp.load_model("nowhere/at/all")
    with pytest.raises(ConfigurationError, match="device=gpu: must be auto, cpu, cuda or cuda:N"):
        besa_exp.load_model(device="gpu")


def test_a_preset_takes_a_seed_and_no_values_that_would_be_dropped() -> None:
    assert preset("pruner", "besa", seed=5).seed == 5
    with pytest.raises(TypeError, match="epochs"):
        preset("pruner", "besa", epochs=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "asked",
    [{"pruner": "best"}, {"pruner": "wanda", "update": "obs", "budget": "owl"}],
    ids=lambda asked: "+".join(asked.values()),
)
def test_a_model_object_gets_the_weights_and_masks_of_a_run(asked: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    model = tiny()
    report = besa_exp.prune(model, None, TOKENS, batch_size=4, **asked)
    results = prune_into(settings_of(dense, **asked), tmp_path / "run")
    run = besa_exp.load_run(tmp_path / "run")
    saved, masks = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")), run.masks()
    assert all(torch.equal(weight, saved[name]) for name, weight in weights_of(model).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in report.keep_masks.items())
    assert len(report.keep_masks) == results["linears"]
    assert report.losses == [block.loss_after for block in run.blocks]
    assert report.tokens_sha256 == results["calibration"]["tokens_sha256"]
    assert report.sparsity == run.sparsity


def test_a_path_is_pruned_into_a_run_folder(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reload_here(monkeypatch)
    model, seen = tiny(), []
    in_place = besa_exp.prune(model, None, TOKENS, pruner="besa", sparsity=0.4)
    in_run = besa_exp.prune(
        dense, None, TOKENS, pruner="besa", sparsity=0.4, out=tmp_path / "run", on_block=seen.append
    )
    assert in_run.folder == tmp_path / "run"
    assert besa_exp.load_run(tmp_path / "run").results["reloaded"]["token_loss"] > 0
    assert in_run.losses == in_place.losses == [block.loss_after for block in seen]
    assert in_run.sparsity == in_place.sparsity == pytest.approx(0.4, abs=0.001)
    assert all(torch.equal(mask, in_place.keep_masks[name]) for name, mask in in_run.keep_masks.items())
    with pytest.raises(ConfigurationError, match="holds a finished run"):
        besa_exp.prune(dense, None, TOKENS, pruner="besa", sparsity=0.3, out=tmp_path / "run")


def test_the_same_call_reports_the_finished_run_and_leaves_the_program_as_it_was(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload_here(monkeypatch)
    write_token_file(TOKENS, tmp_path / "tokens.safetensors")
    asked = partial(besa_exp.prune, dense, None, str(tmp_path / "tokens.safetensors"), pruner="magnitude")
    torch.use_deterministic_algorithms(False)
    before = torch.get_rng_state()
    report = asked(out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (read_status(tmp_path / "run") or {})["command"] is None  # that of pytest is none of ours
    assert "## Command" not in (tmp_path / "run" / "model" / "README.md").read_text()
    (tmp_path / "run" / "run.log").unlink()
    assert asked(out=tmp_path / "run").losses == report.losses
    assert not (tmp_path / "run" / "run.log").exists()
    with pytest.raises(ConfigurationError, match=r"another request \(sparsity: 0.5 before, 0.3 now\)"):
        asked(sparsity=0.3, out=tmp_path / "run")


def test_the_report_counts_what_the_model_holds() -> None:
    model = tiny()
    table = besa_exp.prune(model, None, TOKENS, pruner="magnitude", sparsity=0.3).to_pandas()
    names = [f"model.layers.{row.block}.{row.linear}.weight" for row in table.itertuples()]
    assert table.pruned.tolist() == [int((model.get_parameter(name) == 0).sum()) for name in names]
    assert set(table.columns) >= {"weights", "sparsity", "allocated", "loss_before", "loss_after"}


@pytest.mark.parametrize("update", ["obs", "admm", "reconstruct"])
def test_weights_of_dead_inputs_that_the_mask_keeps_stay_under_an_update(update: str) -> None:
    model = tiny()
    model.get_parameter("model.layers.1.post_attention_layernorm.weight").detach().zero_()
    report = besa_exp.prune(model, None, TOKENS, pruner="wanda", update=update)
    assert report.sparsity == 0.5
    assert all(bool(model.get_parameter(name)[mask].all()) for name, mask in report.keep_masks.items())


def test_mode_gradients_and_random_numbers_are_put_back() -> None:
    torch.use_deterministic_algorithms(False)
    model = tiny().train()
    model.get_submodule("model.layers.0").eval()
    model.get_input_embeddings().requires_grad_(False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    besa_exp.prune(model, None, TOKENS, pruner="wanda")
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not any(module.training for module in model.get_submodule("model.layers.0").modules())
    assert model.get_submodule("model.layers.1.mlp").training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert not torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class FailsAtBlock:
    """Wanda's masks, until a block at which it raises."""

    index: int
    traits = Traits()

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, task):
        if task.block.index == self.index:
            raise RunError("as asked")
        return pruned_by_masks({n: keep_per_row(weight.abs(), task.goal) for n, weight in task.weights.items()})


def test_a_pruner_of_ones_own_prunes() -> None:
    report = besa_exp.prune(tiny(), None, TOKENS, pruner=FailsAtBlock(99), sparsity=0.25)
    assert report.sparsity == 0.25


def test_blocks_of_another_request_are_refused_without_a_config(dense: Path, tmp_path: Path) -> None:
    """A run at 0.3 went on at 0.7 where no configuration was given."""
    ask = {"out": tmp_path / "run", "pruner": FailsAtBlock(1)}
    with pytest.raises(RunError, match="as asked"):
        besa_exp.prune(dense, None, TOKENS, sparsity=0.3, **ask)
    assert (tmp_path / "run" / "blocks" / "000000.json").is_file()
    with pytest.raises(ConfigurationError, match=r"sparsity: 0\.3 before, 0\.7 now"):
        besa_exp.prune(dense, None, TOKENS, sparsity=0.7, **ask)
    with pytest.raises(ConfigurationError, match="calibration_tokens_sha256"):
        besa_exp.prune(dense, None, TOKENS.flip(0), sparsity=0.3, **ask)


def test_a_path_that_is_refused_leaves_no_run_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no/such/folder"):
        besa_exp.prune("no/such/folder", out=tmp_path / "runs" / "mine")
    assert not [*tmp_path.iterdir()]


def test_settings_alone_say_what_a_configuration_says() -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", ["pruner=best", "budget=owl", "update=dsnot"], return_hydra_config=True)
    settings = read_settings(config, method_name(config.hydra.runtime.choices))
    asked = as_plain(request_identity({"method": settings.pruner_name, **as_values(config)}))
    said = as_plain(request_identity(config_of(settings)))
    assert {key for key in asked if key not in said} <= {"model._target_", "calibration._target_"}
    assert {key: said[key] for key in asked.keys() & said.keys()} == {key: asked[key] for key in asked.keys() & said}


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"pruner": "wandaa"}, "did you mean wanda"),
        ({"budget": "owll"}, "did you mean owl"),
        ({"sparsity": 50}, r"must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must be in \[0, 1\)"),
        ({"pattern": "2:4"}, "use pattern=N:4"),
        ({"pattern": "2:5", "pruner": "wanda"}, "must be divisible by 5"),
        ({"pattern": "N:64"}, r"divisible by 64, not as those of model.layers.0.mlp.down_proj \(96\)"),  # of 64 rows
        ({"pattern": "four"}, "must be 'unstructured' or 'N:M'"),
        ({"pruner": "magnitude", "update": "obs", "pattern": "N:8"}, "does not choose N"),
        ({"pruner": object()}, "a pruner has .*prune_block"),
        ({"pruner": type(preset("pruner", "wanda"))}, "is a class; give an object of it"),
        ({"sparsity": float("nan")}, "^sparsity=nan: must be a finite number"),
        ({"num_samples": 0}, "^num_samples=0: must be at least 1"),
        ({"seq_len": 0.5}, "^seq_len=0.5: must be a whole number"),
        ({"seed": True}, "^seed=true: must be a whole number"),
        ({"seed": -1}, r"^seed=-1: must be in \[0, 4294967295\]"),
        ({"compute_dtype": "float16"}, "^compute_dtype=float16: must be one of auto, bfloat16"),
        ({"pattern": 2}, "^pattern=2: must be a text"),
        ({"evaluator": 1}, "^evaluator=1: must be EvaluatorSettings, or the name of a preset"),
        ({"evaluator": EvaluatorSettings("mine", limit=-1)}, "^evaluator.limit=-1: must be at least 1"),
        ({"sparsity": "0.5"}, "^sparsity='0.5': must be a finite number"),
        ({"batch_size": 0}, "^batch_size=0: must be at least 1"),
        ({"num_samples": 4}, "num_samples=4: is of windows that are drawn from texts"),
        ({"ignore": "9.*"}, r"ignore=9\.\*: matches no linear"),
        ({"seed": 1.5}, "^seed=1.5: must be a whole number"),
        ({"out": "somewhere"}, "are for a path"),
        ({"model_or_path": torch.nn.Linear(2, 2)}, "no causal language model"),
        ({"model_or_path": BertForMaskedLM(BERT)}, "no causal language model"),
        ({"model_or_path": torch.nn.Module.to(tiny(), "meta")}, r"model\.embed_tokens\.weight is not in memory"),
        ({"model_or_path": torch.nn.DataParallel(tiny())}, r"give what it wraps, its \.module"),
        ({"model_or_path": "embedded"}, "is a path: give out=FOLDER"),
        ({"model_or_path": "embedded", "out": ""}, "is a path: give out=FOLDER"),
        ({"texts_or_tokens": ["a text"], "tokenizer": "gpt2"}, "tokenizer: str is none; give what AutoTokenizer"),
        ({"texts_or_tokens": ["a text"]}, "need a tokenizer"),
        ({"texts_or_tokens": ["a text", None], "tokenizer": byte_tokenizer()}, "number 1 is NoneType, not text"),
        ({"texts_or_tokens": TOKENS.numpy()}, "token ids as a tensor"),
        ({"texts_or_tokens": {"input_ids": TOKENS}}, "dict is no list of texts"),
        ({"texts_or_tokens": torch.rand(2, 4)}, r"must be whole numbers \[sample, seq\]"),
        ({"texts_or_tokens": TOKENS > 9}, "torch.bool are no token ids, but a mask"),
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


def pruned_by_torch(model: Any) -> Any:
    torch.nn.utils.prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.3)
    return model


def parametrized(model: Any) -> Any:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def quantised(model: Any) -> Any:
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    return model


def shared(model: Any) -> Any:
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def adapted(model: Any) -> Any:
    """As peft wraps a linear."""
    attention = model.model.layers[1].self_attn
    inner, attention.q_proj = attention.q_proj, torch.nn.Module()
    attention.q_proj.base_layer, attention.q_proj.lora_A = inner, torch.nn.Linear(64, 4)
    return model


def made_to_infer(model: Any) -> Any:
    with torch.inference_mode():
        return copy.deepcopy(model)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (pruned_by_torch, "layers.1.mlp.up_proj is computed from other tensors in each pass; make it a parameter"),
        (parametrized, "layers.1.mlp.up_proj is computed from other tensors"),
        (quantised, r"layers.1.mlp.up_proj.weight is quantised \(torch.int8\)"),
        (shared, r"layers.0.mlp.gate_proj.weight is model.layers.1.mlp.gate_proj.weight too"),
        (adapted, r"layers.1.self_attn.q_proj holds an adapter; merge it first"),
        (made_to_infer, "embed_tokens.weight was made within torch.inference_mode"),
    ],
)
@pytest.mark.parametrize("call", [besa_exp.prune, besa_exp.tune])
def test_a_model_whose_weights_cannot_be_written_is_refused(call, made, told) -> None:
    """What was written was lost, was packed integers, an adapter's, or stood at a second place too."""
    with pytest.raises(ConfigurationError, match=told):
        call(made(tiny()), None, TOKENS)


def test_a_compiled_model_is_pruned_as_it_is() -> None:
    models = [tiny(), tiny()]
    models[0].model.layers[0].compile(backend="eager")
    for model in models:
        besa_exp.prune(model, None, TOKENS, pruner="wanda")
    assert models[0].model.layers[0]._compiled_call_impl is not None
    first, second = map(weights_of, models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def half_by_default() -> Iterator[None]:
    """As programs have it that make models in 16 bits."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.bfloat16
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "surrounding",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
        half_by_default,
        partial(torch.device, "meta"),
    ],
)
def test_the_contexts_of_the_calling_program_do_not_move_the_numbers(surrounding) -> None:
    """A search takes gradients, and its products are those of the weights' dtype."""
    models, of_numpy = [tiny(), tiny()], {"sparsity": np.float32(0.5), "seed": np.int64(0)}
    besa_exp.prune(models[0], None, TOKENS, pruner="besa", update="admm", sparsity=0.5)
    with surrounding():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        besa_exp.prune(models[1], None, TOKENS, pruner="besa", update="admm", **of_numpy)
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert before == after
    assert all(torch.equal(weight, models[1].state_dict()[name]) for name, weight in models[0].state_dict().items())


def test_texts_may_be_read_once(tmp_path: Path) -> None:
    texts, words = ["a bb ccc dddd " * 40, "eeeee ff g " * 60], byte_tokenizer()
    (tmp_path / "text.txt").write_text(texts[0])
    one, other = (besa_exp.prune(tiny(), words, each, pruner="wanda", num_samples=4) for each in (texts, iter(texts)))
    assert one.tokens_sha256 == other.tokens_sha256
    assert besa_exp.prune(tiny(), words, tmp_path / "text.txt", pruner="wanda", num_samples=2, seq_len=16).sparsity


def test_texts_are_cut_into_windows_of_the_context() -> None:
    texts = ["a bb ccc dddd " * 40, "eeeee ff g " * 60]
    words = byte_tokenizer()
    one, other = (besa_exp.prune(tiny(), words, texts, pruner="wanda", num_samples=6) for _ in range(2))
    assert one.tokens_sha256 == other.tokens_sha256
    assert one.tokens_sha256 != besa_exp.prune(tiny(), words, texts, pruner="wanda", num_samples=5).tokens_sha256


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


def test_pruning_twice_from_equal_models_gives_equal_bytes() -> None:
    models = [tiny(), copy.deepcopy(tiny())]
    for model in models:
        besa_exp.prune(model, None, TOKENS, pruner="besa", seed=5)
    first, second = map(weights_of, models)
    assert all(torch.equal(first[name], second[name]) for name in first)
