"""Saved models load like the dense one with their zeros in place; masks take one bit a weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_llama import tiny_llama
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from besa_exp.blocks.reports import BlockReport, LinearReport
from besa_exp.checkpoints.files import (
    count_zeros,
    load_masks,
    masks_description,
    save_masks,
    save_model,
    weights_sha256,
    write_card,
)
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.runs.save import check_saved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = torch.arange(24).view(2, 12)


def pruned_model(dtype: str = "float32", tied: bool = False) -> LlamaForCausalLM:
    """A random Llama of two blocks, half of each linear's weights zero."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    model = tiny_llama(tie_word_embeddings=tied, dtype=dtype, **sizes)
    generator = torch.Generator().manual_seed(0)
    for weight in linears(model).values():
        weight.data[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return model


def linears(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"word{number}": number for number in range(63)} | {"<unk>": 63}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_loads_as_any_other_and_computes_the_same(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = pruned_model(dtype, tied)
    save_model(model, tokenizer(), tmp_path / "model", "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == DTYPES[dtype]
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in model.named_parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_saved_once(tmp_path: Path, tied: bool) -> None:
    save_model(pruned_model(tied=tied), None, tmp_path / "model", "card")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) == (not tied)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_saved_config_has_the_weights_dtype_and_no_sparse_format(tmp_path: Path, dtype: str) -> None:
    model = pruned_model(dtype)
    model.config.sparsity_config = {"format": "sparse-24-bitmask"}
    model.config.quantization_config = {"quant_method": "compressed-tensors", "sparsity_config": {}}
    save_model(model, None, tmp_path / "model", "card")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert not {"sparsity_config", "quantization_config"} & set(config)


def test_tokenizer_generation_config_and_card_lie_beside_the_weights(tmp_path: Path) -> None:
    save_model(pruned_model(), tokenizer(), tmp_path / "model", "# A card\n")
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert words.convert_tokens_to_ids(["word5", "word7"]) == [5, 7]
    assert (tmp_path / "model" / "generation_config.json").exists()
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"
    write_card(tmp_path / "model", "# With scores\n")
    assert (tmp_path / "model" / "README.md").read_text() == "# With scores\n"


def test_tokenizer_and_licence_files_come_from_the_dense_folder_where_nothing_else_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "LICENSE.txt", "pytorch_model.bin", "config.json"):
        (tmp_path / "dense" / name).write_text("the dense model's")
    save_model(pruned_model(), tokenizer(), tmp_path / "model", "card", sources=tmp_path / "dense")
    copied = {name for name, content in contents(tmp_path / "model").items() if content == b"the dense model's"}
    assert copied == {"tokenizer.model", "LICENSE.txt"}
    save_model(pruned_model(), None, tmp_path / "model", "card", sources=tmp_path / "dense")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "the dense model's"


def test_a_published_generation_config_that_is_invalid_does_not_stop_the_saving(tmp_path: Path) -> None:
    save_model(pruned_model(), None, tmp_path / "dense", "card")
    published = tmp_path / "dense" / "generation_config.json"
    published.write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    save_model(dense, None, tmp_path / "model", "card")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6


def test_the_same_model_is_saved_as_the_same_bytes_that_name_no_folder(tmp_path: Path) -> None:
    save_model(pruned_model(), tokenizer(), tmp_path / "first", "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    save_model(loaded, AutoTokenizer.from_pretrained(tmp_path / "first"), tmp_path / "second", "card")
    save_model(loaded, AutoTokenizer.from_pretrained(tmp_path / "first"), tmp_path / "third", "card")
    assert contents(tmp_path / "second") == contents(tmp_path / "third")
    assert contents(tmp_path / "first")["model.safetensors"] == contents(tmp_path / "second")["model.safetensors"]
    assert not any(str(tmp_path).encode() in content for content in contents(tmp_path / "second").values())


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_zeros_of_the_saved_model_must_be_those_reported(tmp_path: Path, shard_size: str) -> None:
    model, folder = pruned_model("bfloat16"), tmp_path / "model"
    save_model(model, None, folder, "card", shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_size == "5GB" else 2)
    linears_of: list[list[LinearReport]] = [[], []]
    for name, weight in linears(model).items():
        _, _, block, path = name.removesuffix(".weight").split(".", 3)
        linears_of[int(block)].append(LinearReport(path, weight.numel(), int((weight == 0).sum()), 0.5))
    numbers = (4, 7)  # in the dense model: the order alone counts
    reports = [BlockReport(numbers[i], tuple(found), 0.0, 0.0, 0.0) for i, found in enumerate(linears_of)]
    saved = LoadedModel(AutoModelForCausalLM.from_pretrained(folder), None, None, folder)
    check_saved(saved, reports)
    (wrong,) = (linear for linear in linears_of[1] if linear.name == "mlp.up_proj")
    others = tuple(replace(one, pruned=one.pruned + 1) if one == wrong else one for one in linears_of[1])
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj holds \d+ zeros"):
        check_saved(saved, [reports[0], replace(reports[1], linears=others)])
    with pytest.raises(RunError, match="2 blocks as saved, not the 1"):
        check_saved(saved, reports[:1])


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_zeros_are_counted_from_the_saved_shards(tmp_path: Path, shard_size: str) -> None:
    model = pruned_model("bfloat16")
    save_model(model, None, tmp_path / "model", "card", shard_size=shard_size)
    expected = {name: (weight.numel(), int((weight == 0).sum())) for name, weight in linears(model).items()}
    assert count_zeros(tmp_path / "model", expected) == expected
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == (1 if shard_size == "5GB" else 2)


def test_a_model_that_cannot_be_written_names_place_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file/model could not be written .*save\.model=false"):
        save_model(pruned_model(), None, tmp_path / "file" / "model", "card")


@pytest.mark.parametrize("shape", [(8, 16), (3, 5), (1, 1), (7, 9)])
def test_masks_come_back_as_they_were_saved(tmp_path: Path, shape: tuple[int, int]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    save_masks({"a.weight": keep, "b.weight": ~keep}, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert set(loaded) == {"a.weight", "b.weight"}
    assert loaded["a.weight"].dtype == torch.bool
    assert torch.equal(loaded["a.weight"], keep)
    assert torch.equal(loaded["b.weight"], ~keep)


def test_masks_take_one_bit_a_weight_and_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    keep = {name: torch.arange(64 * 1000).view(64, 1000) % number == 0 for number, name in ((3, "c"), (2, "a"))}
    save_masks(keep, tmp_path / "first", dense_sha256="abc")
    save_masks(dict(reversed(keep.items())), tmp_path / "second", dense_sha256="abc")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert 2 * 64 * 1000 / 8 < (tmp_path / "first").stat().st_size < 2 * 64 * 1000 / 8 + 1000
    described = {"format_version": 2, "shapes": {"a": [64, 1000], "c": [64, 1000]}, "dense_sha256": "abc"}
    assert masks_description(tmp_path / "first") == described | {"weights_updated": False}


def test_the_first_weight_of_a_row_is_the_highest_bit_and_one_is_kept(tmp_path: Path) -> None:
    save_masks({"a": torch.tensor([[True, False, False, False], [False, False, True, True]])}, tmp_path / "masks")
    with safe_open(tmp_path / "masks", framework="pt") as file:
        assert file.get_tensor("a").tolist() == [0b10000011]


def test_a_file_that_holds_no_masks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("masks")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    for name in ("text", "weights.safetensors", "absent"):
        with pytest.raises(ConfigurationError, match=rf"{name}.*masks\.safetensors"):
            load_masks(tmp_path / name)


def test_the_hash_of_weights_depends_on_every_weight_and_not_on_their_order() -> None:
    weights = linears(pruned_model("bfloat16"))
    first = weights_sha256(weights)
    assert weights_sha256(dict(reversed(weights.items()))) == first
    assert weights_sha256({name: weight.float() for name, weight in weights.items()}) != first
    weights["model.layers.1.mlp.up_proj.weight"].data[3, 7] += 0.5
    assert weights_sha256(weights) != first
    scalars = [weights_sha256({"alpha": torch.tensor(value)}) for value in (0.5, 0.25)]  # Apertus has such
    assert scalars[0] != scalars[1]
