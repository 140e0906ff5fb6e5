"""GGUF files: what `model.convert=true` unpacks them into, and which are refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs gguf: pip install '.[gguf]'", allow_module_level=True)

from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from tiny_gguf import CHAT_TEMPLATE, tied_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.checkpoints.gguf_file import dequantised
from besa_exp.checkpoints.gguf_weights import converted_gguf
from besa_exp.checkpoints.load import load_model
from besa_exp.cli.main import main
from besa_exp.cli.preflight import check_model
from besa_exp.errors import ConfigurationError
from besa_exp.settings import ModelSettings

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems_of(path: Path, convert: bool = True) -> list[str]:
    return check_model(ModelSettings("tiny", str(path), convert=convert))[1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("packed", "packing"),
    [(Type.Q4_1, {"Q4_1": 61440, "Q8_0": 16640, "F32": 320}), (Type.Q8_0, {"Q8_0": 78080, "F32": 320})],
)
def test_the_folder_computes_what_transformers_own_loading_of_the_file_does(packed, packing, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", packed)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    folder = converted_gguf(file)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = own(TOKENS).logits
    assert float((found(TOKENS).logits - logits).norm() / logits.norm()) < 5e-3  # ten roundings
    rounded = {name: tensor.half().float() for name, tensor in own.state_dict().items()}  # by 1 in 2048 at most
    own.load_state_dict(rounded)
    assert torch.equal(found(TOKENS).logits, own(TOKENS).logits)
    assert dequantised(folder)["dequantised"]["packing"] == packing


def test_a_file_of_fp32_gives_the_very_model_that_it_was_made_from(tmp_path):
    folder = converted_gguf(write_gguf(tmp_path / "tiny.gguf"))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.float32
    assert torch.equal(found(TOKENS).logits, tied_llama()(TOKENS).logits)


def test_the_folder_is_an_ordinary_one_with_config_tied_head_tokenizer_template_and_licence(tmp_path):
    folder = converted_gguf(write_gguf(tmp_path / "tiny.gguf", Type.Q4_1))
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # in fp32 it is 9.999999747378752e-06
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float16"
    assert not {"quantization_config", "gguf_file"} & set(config)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the other").input_ids) == "the other"
    assert 259 in tokenizer("the other").input_ids  # `the`: its merges are there
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert 'license: "apache-2.0"' in (folder / "README.md").read_text()


def test_a_file_is_unpacked_once_and_anew_when_it_changes(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", Type.Q8_0)
    first = converted_gguf(file)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert converted_gguf(file) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    write_gguf(file, Type.Q4_1)
    assert converted_gguf(file) != first
    assert len(list((tmp_path / "outputs" / "converted").iterdir())) == 2


def test_without_convert_it_is_refused_with_the_remedy_and_nothing_is_written(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    (problem,) = problems_of(file, convert=False)
    assert problem.startswith(f"model.path={file}: a GGUF file")
    assert "model.convert=true" in problem
    with pytest.raises(ConfigurationError) as refused:
        load_model(ModelSettings("tiny", str(file)), CPU, offline=True)
    assert refused.value.problems == (problem,)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda path: path, "there is no such file"),
        (lambda path: path.write_bytes(b""), "cannot be read as GGUF"),
        (lambda path: path.write_bytes(b"not a GGUF file at all"), "cannot be read as GGUF"),
        (lambda path: path.write_bytes(write_gguf(path).read_bytes()[:-5000]), "cannot be read as GGUF"),
        (lambda path: path.write_bytes(write_gguf(path).read_bytes()[:900]), "cannot be read as GGUF"),
        (lambda path: write_gguf(path, architecture="rwkv6"), "of the architecture rwkv6"),
        (lambda path: write_gguf(path, architecture="t5"), "of the architecture t5"),
        (lambda path: write_gguf(path, extra="rope_freqs.weight"), "scaled by rope_freqs.weight"),
    ],
    ids=["absent", "empty", "other", "cut off", "cut in its header", "unknown", "encoder-decoder", "scaled positions"],
)
def test_a_file_that_cannot_be_unpacked_is_refused_before_anything_is_loaded(made, told, tmp_path):
    made(tmp_path / "tiny.gguf")
    (problem,) = problems_of(tmp_path / "tiny.gguf")
    assert problem.startswith(f"model.path={tmp_path / 'tiny.gguf'}: ")
    assert told in problem


def test_without_the_package_its_command_is_told(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in problems_of(file)[0]


@pytest.mark.parametrize("config", [False, True])
def test_a_folder_that_holds_gguf_files_alone_says_to_name_one(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_gguf(folder / "tiny.gguf")
    if config:
        tied_llama().config.save_pretrained(folder)
    (problem,) = problems_of(folder)
    assert f"name one of them, as in {file}, with model.convert=true" in problem


def test_a_run_tells_in_results_and_card_what_its_dense_weights_are(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", Type.Q4_1)
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    given = [f"model.path={file}", "model.convert=true", f"calibration.path={tmp_path / 'tokens.safetensors'}"]
    chosen = ["pruner=magnitude", "evaluator=none", "tracker=none", "device=cpu", "save.verify=false"]
    assert main(["prune", *given, *chosen, "dry_run=true"]) == 0
    assert main(["prune", *given, *chosen, "hydra.run.dir=run"]) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["dequantised"]["file"] == "tiny.gguf"
    card = Path("run/model/README.md").read_text()
    assert "unpacked from tiny.gguf (61,440 Q4_1, 16,640 Q8_0, 320 F32) and stored as float16" in card
    assert 'license: "apache-2.0"' in card
