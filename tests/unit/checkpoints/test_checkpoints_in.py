"""Which checkpoints are taken in, which are refused before a weight is read, and for what reason."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import tiny

from besa_exp.checkpoints import conversion, load
from besa_exp.checkpoints.conversion import converted_folder, converted_once
from besa_exp.checkpoints.fetch import wanted_files
from besa_exp.checkpoints.files import check_savable
from besa_exp.checkpoints.inspect import inspect_model_folder
from besa_exp.checkpoints.load import load_model
from besa_exp.cli.preflight import check_model
from besa_exp.errors import ConfigurationError
from besa_exp.settings import ModelSettings

CPU = torch.device("cpu")
CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "some/where--modeling_own.OwnForCausalLM"}
NO_SUCH = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": CODE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def pickled(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """The folder's weights as .bin files in the place of its safetensors."""
    tensors = dict(tiny("llama").state_dict())
    (folder / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[start::shards]) for start in range(shards)]
    names = [f"pytorch_model-{number}.bin" if shards > 1 else "pytorch_model.bin" for number in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    if shards > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def settings(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings("llama", str(folder), **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised (awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised (bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8"),
        ({"quantization_config": "int8", "auto_map": ["modeling_own.OwnForCausalLM"]}, "quantised (int8"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "quantised (mxfp4"),
        ({"is_encoder_decoder": True, "architectures": ["T5Model"]}, "T5Model is an encoder-decoder"),
        (NO_SUCH, "configuration_own.py (OwnConfig), modeling_own.py (OwnForCausalLM) of some/where"),
    ],
)
def test_what_its_config_speaks_against_is_refused_before_and_while_loading(folder, changes, told):
    change_config(folder, **changes)
    facts, (problem,) = check_model(settings(folder))
    assert facts is None
    assert problem.startswith(f"model.path={folder}: ")
    assert told in problem
    with pytest.raises(ConfigurationError) as refused:
        load_model(settings(folder), CPU, offline=True)
    assert refused.value.problems == (problem,)


def test_a_value_of_its_config_that_transformers_refuses_is_told_with_its_reason(folder):
    change_config(folder, hidden_size="32")
    with pytest.raises(ConfigurationError, match=r"'hidden_size': .*expected int"):
        load_model(settings(folder), CPU, offline=True)


def test_code_of_a_checkpoint_is_allowed_by_its_key_and_not_needed_for_what_transformers_knows(folder, caplog):
    change_config(folder, **NO_SUCH)
    assert check_model(settings(folder, trust_remote_code=True))[1] == []
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert check_model(settings(folder))[1] == []
    assert type(load_model(settings(folder), CPU, offline=True).model).__name__ == "LlamaForCausalLM"
    assert "configuration_own.py (OwnConfig)" in caplog.text
    assert "is not run" in caplog.text


def test_weights_saved_as_integers_are_quantised_even_if_the_config_does_not_say_so(folder):
    tensors = tiny("llama").state_dict()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.uint8)
    conversion.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (problem,) = inspect_model_folder(folder)[1]
    assert "model.layers.0.mlp.up_proj.weight is saved as U8" in problem
    assert "unquantised model" in problem


def test_an_adapter_is_refused_with_its_base_and_the_way_to_merge_it(folder):
    (folder / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (problem,) = check_model(settings(folder))[1]
    assert "holds an adapter (LORA, of org/base) and no model" in problem
    assert "merge_and_unload" in problem


@pytest.mark.parametrize(
    "held", [{}, {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 16)}], ids=["none", "other"]
)
def test_files_that_lack_a_weight_are_refused_instead_of_drawing_it_at_random(folder, held, capfd):
    tensors = tiny("llama").state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    conversion.save_file(tensors | held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM"):
        load_model(settings(folder), CPU, offline=True)
    assert "newly initialized" not in capfd.readouterr().err  # as transformers says before


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_refused_and_converted_when_asked_for(folder, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = pickled(folder, shards)
    (problem,) = check_model(settings(folder))[1]
    assert "only pickled weights (pytorch_model" in problem
    assert "model.convert=true" in problem
    facts, problems = check_model(settings(folder, convert=True))
    assert problems == []
    assert facts is not None
    assert (facts.to_convert, facts.context) == (True, 64)
    loaded = load_model(settings(folder, convert=True), CPU, offline=True)
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert loaded.folder.parent == Path("outputs/converted")
    assert len(list(loaded.folder.glob("*.safetensors"))) == shards
    assert not list(loaded.folder.glob("*.bin"))
    before = loaded.folder.stat().st_mtime_ns
    assert load_model(settings(folder, convert=True), CPU, offline=True).folder.stat().st_mtime_ns == before


def test_a_missing_pickled_shard_is_told_before_loading(folder):
    pickled(folder, shards=3)
    (folder / "pytorch_model-1.bin").unlink()
    (problem,) = check_model(settings(folder, convert=True))[1]
    assert "pytorch_model-1.bin missing" in problem


class Trap:
    def __reduce__(self):
        return (Path.write_text, (Path("sprung"), "code was run"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weight": Trap()}, "holds more than tensors"),
        ({"state": {"weight": torch.zeros(2)}}, "no plain dictionary of tensors"),
        ({"a.weight": torch.zeros(2, 2, device="meta")}, r"a\.weight has no data \(a meta tensor\)"),
    ],
)
def test_a_pickle_of_anything_but_tensors_with_data_is_refused_and_runs_no_code(content, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ConfigurationError, match=told):
        converted_folder(tmp_path)
    assert not (tmp_path / "sprung").exists()
    assert not list((tmp_path / "outputs" / "converted").iterdir())


@pytest.mark.parametrize(
    ("names", "convert", "bin_too"),
    [
        (["model.safetensors", "pytorch_model.bin"], True, False),
        (["pytorch_model.bin"], True, True),
        (["consolidated.safetensors", "pytorch_model.bin"], True, True),  # which is not fetched
        ([], True, True),
        (["model.safetensors", "pytorch_model.bin"], False, False),
        ([], False, False),
    ],
)
def test_pickles_are_fetched_from_the_hub_only_where_there_is_nothing_else_and_they_may_be(
    names, convert, bin_too, folder
):
    assert ("*.bin" in wanted_files(settings(folder, convert=convert), folder, names)) == bin_too


def test_a_model_of_the_hub_is_refused_before_its_weights_are_fetched(folder):
    with pytest.raises(ConfigurationError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        wanted_files(settings(folder), folder, ["config.json", "pytorch_model.bin"])
    change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigurationError, match="gptq"):
        wanted_files(settings(folder), folder, ["model.safetensors"])


def test_outputs_beside_logits_are_not_asked_for_and_the_model_is_saved_again(folder, tmp_path):
    """transformers reads such a config with any attention, and saves it with the slowest alone."""
    change_config(folder, output_attentions=True, output_hidden_states=True)
    model = load_model(settings(folder), CPU, offline=True).model
    outputs = model(torch.zeros(1, 4, dtype=torch.long))
    assert outputs.attentions is outputs.hidden_states is None
    check_savable(model, str(folder))
    model.config._output_attentions = True
    with pytest.raises(ConfigurationError, match=r"cannot be saved again.*output_attentions.*correct config.json"):
        check_savable(model, str(folder))


def test_a_hub_id_and_revision_name_the_cached_snapshot(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--some--tiny"
    for branch, commit in (("main", "a" * 40), ("older", "b" * 40)):
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / branch).write_text(commit)
        shutil.copytree(folder, model / "snapshots" / commit)
    change_config(model / "snapshots" / ("b" * 40), quantization_config={"quant_method": "awq"})
    newest, older = (ModelSettings("tiny", "some/tiny", revision) for revision in (None, "older"))
    assert check_model(newest)[1] == []
    assert load_model(newest, CPU, offline=True).folder.name == "a" * 40
    (problem,) = check_model(older)[1]
    assert "quantised (awq" in problem
    with pytest.raises(ConfigurationError, match="awq"):
        load_model(older, CPU, offline=True)


def test_each_tensor_is_read_straight_to_the_device(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"and 18 more of .* without data"):  # meta: where none has data
        load_model(settings(folder), torch.device("meta"), offline=True)


def test_a_model_that_is_needed_whole_and_would_be_streamed_is_refused_before_a_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "free_memory", lambda: 1000)
    monkeypatch.setattr(load, "open_streamed", None)  # it would read the embeddings
    with pytest.raises(
        ConfigurationError, match=r"model\.load=auto: .* would be streamed, .* and skipping needs it whole"
    ):
        load_model(settings(folder), CPU, True, "skipping")
    assert load_model(settings(folder, load="whole"), CPU, True, "skipping").weights is None


def test_of_two_runs_that_convert_a_model_one_writes_it_and_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waiting, written, found = threading.Event(), [], []
    monkeypatch.setattr(conversion.logger, "info", lambda *_: waiting.set())

    def write(folder):
        written.append(folder)
        assert waiting.wait(20), "nobody waited"
        (folder / "config.json").write_text("{}")

    (tmp_path / "model.bin").write_text("weights")

    def convert():
        found.append(converted_once(tmp_path, [tmp_path / "model.bin"], write))

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert found[0] == found[1]
    assert [file.name for file in found[0].iterdir()] == ["config.json"]
