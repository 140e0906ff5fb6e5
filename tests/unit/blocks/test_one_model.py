"""A folder is one model, loaded whole, streamed, or by transformers alone; or it is refused however it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

from besa_exp.checkpoints.load import LoadedModel, load_model
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.streamed import streamed_perplexity
from besa_exp.runs.evaluate import counted_blocks
from besa_exp.settings import ModelSettings

INPUT_IDS = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")
Q_PROJ, EMBEDDING, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Folder:
    """A saved model whose weights and config a case changes."""

    def __init__(self, path: Path, tied: bool) -> None:
        self.path = path
        tiny_llama(tie_word_embeddings=tied).save_pretrained(path)
        self.weights = load_file(path / "model.safetensors")

    def write(self, weights: dict[str, torch.Tensor] | None = None, file: str = "model.safetensors") -> None:
        save_file(self.weights if weights is None else weights, self.path / file, {"format": "pt"})

    def config(self, drop: str = "", **changes: Any) -> None:
        path = self.path / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if key != drop}))

    def shard(self, weights: dict[str, torch.Tensor], **index: Any) -> None:
        names = sorted(weights)
        parts = {file: {name: weights[name] for name in names[place::2]} for place, file in enumerate(SHARDS)}
        for file, part in parts.items():
            self.write(part, file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
        (self.path / "model.safetensors.index.json").write_text(json.dumps(content))

    def remove(self, file: str = "model.safetensors") -> None:
        (self.path / file).unlink()


def another_head(folder: Folder) -> None:
    folder.write(folder.weights | {HEAD: folder.weights[EMBEDDING].flip(0)})


def head_alone(folder: Folder) -> None:
    kept = {name: tensor for name, tensor in folder.weights.items() if name != EMBEDDING}
    folder.write(kept | {HEAD: folder.weights[EMBEDDING]})


def sharded(folder: Folder) -> None:
    folder.remove()
    folder.shard(folder.weights)
    folder.write({name: tensor * 0 for name, tensor in folder.weights.items()}, "consolidated.safetensors")


def sharded_with_a_short_map(folder: Folder) -> None:
    sharded(folder)
    path = folder.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][Q_PROJ]
    path.write_text(json.dumps(index))


def no_dtype_in_the_config(folder: Folder) -> None:
    folder.write({name: tensor.bfloat16() for name, tensor in folder.weights.items()})
    folder.config(drop="dtype")


def norms_in_fp32(folder: Folder) -> None:
    folder.write({name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in folder.weights.items()})
    folder.config(dtype="bfloat16")


def two_sets(folder: Folder) -> None:
    folder.shard({name: tensor * 0.5 for name, tensor in folder.weights.items()})


def two_sets_of_which_one_is_named(folder: Folder) -> None:
    two_sets(folder)
    folder.remove()
    folder.write(file="mine.safetensors")
    folder.config(transformers_weights="mine.safetensors")


def held_by_two_files(folder: Folder) -> None:
    sharded(folder)
    second = load_file(folder.path / SHARDS[1])
    first = load_file(folder.path / SHARDS[0])
    folder.write(second | {name: tensor * 2 for name, tensor in first.items()}, SHARDS[1])


def index_of_the_whole_file(folder: Folder) -> None:
    content = {"metadata": {}, "weight_map": dict.fromkeys(folder.weights, "model.safetensors")}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(content))


def index_without_metadata(folder: Folder) -> None:
    sharded(folder)
    path = folder.path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))


def a_stale_index(folder: Folder) -> None:
    two_sets(folder)
    for file in SHARDS:
        folder.remove(file)


ONE_MODEL: dict[str, tuple[bool, Callable[[Folder], None], str | None]] = {  # name: tied, change, part of its note
    "as it was saved": (False, lambda folder: None, None),
    "tied": (True, lambda folder: None, None),
    "tied, saved twice": (True, lambda f: f.write(f.weights | {HEAD: f.weights[EMBEDDING].clone()}), None),
    "tied, with a head of its own": (True, another_head, "ties lm_head.weight to model.embed_tokens.weight, its files"),
    "tied, the head alone": (True, head_alone, None),
    "sharded, beside other files": (False, sharded, None),
    "sharded, a tensor left out of the map": (False, sharded_with_a_short_map, None),
    "an index of the whole file": (False, index_of_the_whole_file, None),
    "an index whose files are gone": (False, a_stale_index, None),
    "a file that the config names": (False, two_sets_of_which_one_is_named, None),
    "no dtype in the config": (False, no_dtype_in_the_config, None),
    "another dtype in the config": (False, lambda folder: folder.config(dtype="bfloat16"), None),
    "norms in fp32": (False, norms_in_fp32, None),
    "old buffers": (
        False,
        lambda f: f.write(f.weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        None,
    ),
    "text_config null": (False, lambda folder: folder.config(text_config=None), None),
    "other heads": (
        False,
        lambda folder: folder.config(num_attention_heads=2, num_key_value_heads=1, head_dim=32),
        None,
    ),
}


def scored(loaded: LoadedModel) -> float:
    if loaded.weights is None:
        return perplexity(loaded.model, INPUT_IDS, 32, 2).value
    return streamed_perplexity(loaded.model, loaded.weights, INPUT_IDS, 2).value


def loaded_from(path: Path, load: Any) -> LoadedModel:
    return load_model(ModelSettings(name="odd", path=str(path), load=load), CPU, offline=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_MODEL)
def test_whole_streamed_and_transformers_own_are_one_model(name, tmp_path):
    tied, change, note = ONE_MODEL[name]
    change(folder := Folder(tmp_path, tied))
    own = AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto", use_safetensors=True).eval()
    expected = perplexity(own, INPUT_IDS, 32, 2).value
    for load in ("whole", "streamed"):
        loaded = loaded_from(folder.path, load)
        assert loaded.model.dtype == own.dtype
        assert scored(loaded) == pytest.approx(expected, rel=1e-5), load
        assert [note in told for told in loaded.notes] == ([True] if note else []) if note else loaded.notes == ()
    found = counted_blocks(folder.path)
    assert sum(linear["weights"] for block in found for linear in block["linears"].values()) == sum(
        tensor.numel() for name, tensor in own.state_dict().items() if "proj" in name
    )


REFUSED: dict[str, tuple[bool, Callable[[Folder], None], str]] = {
    "two sets of weights": (False, two_sets, "holds two sets of weights, model.safetensors and model-00001"),
    "a tensor in two files": (False, held_by_two_files, "is held by model-00002-of-00002.safetensors and by another"),
    "an index without metadata": (False, index_without_metadata, 'has no "metadata", without which'),
    "untied, no head": (True, lambda folder: folder.config(tie_word_embeddings=False), "lack lm_head.weight"),
    "fewer blocks in the config": (
        False,
        lambda folder: folder.config(num_hidden_layers=1),
        "also hold model.layers.1",
    ),
    "more blocks in the config": (False, lambda folder: folder.config(num_hidden_layers=3), "lack model.layers.2"),
    "other key heads": (False, lambda folder: folder.config(num_key_value_heads=1), "shape|cannot be loaded"),
    "a tensor of no use": (
        False,
        lambda f: f.write(f.weights | {"v_head.weight": torch.ones(3)}),
        "also hold v_head.w",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("load", ["whole", "streamed"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_one_model_is_refused_however_it_is_loaded(name, load, tmp_path):
    tied, change, reason = REFUSED[name]
    change(folder := Folder(tmp_path, tied))
    with pytest.raises(ConfigurationError, match=reason):
        loaded_from(folder.path, load)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_attention_of_another_package_is_replaced_with_a_note(load, key, tmp_path):
    folder = Folder(tmp_path, False)
    expected = scored(loaded_from(folder.path, load))
    folder.config(**{key: "flash_attention_2"}, return_dict=False)
    loaded = loaded_from(folder.path, load)
    (note,) = loaded.notes
    assert "asks for flash_attention_2" in note
    assert scored(loaded) == pytest.approx(expected, rel=1e-6)
