"""`besa masks apply`: masks and dense weights give the very bytes that the run saved, or a refusal with its reason. End
to end because the bytes are those that whole runs save."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from besa_exp.checkpoints.files import masks_description, save_model
from besa_exp.checkpoints.fresh_process import reloaded
from besa_exp.cli.main import main
from besa_exp.runs.rebuild import Masks, rebuild
from besa_exp.settings import ModelSettings

RUNS = {  # what decides about the bytes: the method, where the weights lay, what they were loaded as, tied embeddings
    "magnitude, whole": ("magnitude", ["model.load=whole"], False),
    "wanda, streamed": ("wanda", ["model.load=streamed"], False),
    "besa, whole, in another dtype, tied": ("besa", ["model.load=whole", "model.dtype=bfloat16"], True),
    "besa_paper, streamed, tied": ("besa_paper", ["model.load=streamed"], True),
    "wanda with edited masks": ("wanda", ["update=dsnot"], False),
    "ria with groups of its own": ("ria", ["pattern=2:4", "pruner.permute=true"], False),
}


@pytest.fixture
def dense(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "dense"))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def pruned(given: list[str], model: Path, pruner: str, *keys: str) -> Path:
    """The folder of a run on this model."""
    own = {key.split("=")[0] for key in keys} | {"model.path", "pruner"}
    lines = [line for line in given if line.split("=")[0] not in own]
    folder = Path("run")
    assert main(["prune", *lines, f"model.path={model}", f"pruner={pruner}", f"hydra.run.dir={folder}", *keys]) == 0
    return folder


def apply(run: Path, model: Path | str, out: Path | str = "out") -> int:
    return main(["masks", "apply", str(run / "masks.safetensors"), "--model", str(model), "--out", str(out)])


def contents(folder: Path) -> dict[str, bytes]:
    """All but the card, which cannot tell scores."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("name", RUNS)
def test_masks_and_dense_weights_give_the_files_that_the_run_saved(name, given, dense, tied):
    pruner, keys, is_tied = RUNS[name]
    model = tied if is_tied else dense
    run = pruned(given, model, pruner, *keys)
    assert apply(run, model) == 0
    assert contents(Path("out")) == contents(run / "model")
    assert f"by {pruner}" in (Path("out") / "README.md").read_text()


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_the_saved_weights_are_two_of_four_in_the_order_that_the_masks_file_tells(load, given, dense):
    run = pruned(given, dense, "ria", "pattern=2:4", "pruner.permute=true", f"model.load={load}")
    told = load_file(run / "masks.safetensors")
    weights = {k: v for file in (run / "model").glob("*.safetensors") for k, v in load_file(file).items()}
    in_order = [name for name in masks_description(run / "masks.safetensors")["shapes"] if "_proj" in name]
    assert len(in_order) == 14
    for name in in_order:
        kept = weights[name][:, told[f"{name}.permutation"].long()].ne(0).view(-1, 4).sum(dim=1)
        assert kept.eq(2).all(), name
    assert any(weights[name].ne(0).view(-1, 4).sum(dim=1).ne(2).any() for name in in_order)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_whole_model_of_several_files_is_rebuilt_file_by_file_as_transformers_deals_them_out(family, given, tmp_path):
    dense = tmp_path / "dense"
    tiny(family).save_pretrained(dense)
    run = pruned(given, dense, "wanda", "model.load=whole")
    save_model(AutoModelForCausalLM.from_pretrained(run / "model"), None, Path("saved"), "card", shard_size="4KB")
    masks = Masks(run / "masks.safetensors", masks_description(run / "masks.safetensors"))
    rebuild(masks, ModelSettings("dense", str(dense)), Path("out"), ["besa"], shard_size="4KB")
    assert len(list(Path("saved").glob("*.safetensors"))) > 3
    assert contents(Path("out")) == contents(Path("saved"))


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_tensors_that_transformers_renames_or_stacks_are_saved_as_they_were_and_rebuilt(family, load, given, tmp_path):
    tiny(family).save_pretrained(tmp_path / family)
    run = pruned(given, tmp_path / family, "magnitude", f"model.load={load}")
    request = {"folder": str(run / "model"), "input_ids": [[1, 2]], "trust_remote_code": False}
    loaded = reloaded(request)
    assert loaded["lacking"] == loaded["left"] == []
    files = (run / "model").glob("*.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    dense = load_file(tmp_path / family / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in dense.items()}
    assert all(torch.equal(tensor[tensor != 0], dense[name][tensor != 0]) for name, tensor in found.items())
    assert apply(run, tmp_path / family) == 0
    assert contents(Path("out")) == contents(run / "model")


def test_a_model_that_cannot_be_streamed_is_rebuilt_whole(given, tmp_path):
    tiny("gpt_oss").half().save_pretrained(tmp_path / "dense")
    run = pruned(given, tmp_path / "dense", "magnitude", "model.load=auto")
    assert apply(run, tmp_path / "dense") == 0
    assert contents(Path("out")) == contents(run / "model")


def test_a_model_whose_files_lack_the_prefix_of_its_base_is_rebuilt(given, tied):
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.model.save_pretrained(tied)  # its names lack `model.`
    (config := tied / "config.json").write_text(config.read_text().replace("LlamaModel", "LlamaForCausalLM"))
    run = pruned(given, tied, "magnitude", "model.load=auto")
    assert apply(run, tied) == 0
    assert contents(Path("out")) == contents(run / "model")


def test_a_method_that_updates_weights_is_refused_with_all_other_problems(given, dense, capsys):
    run = pruned(given, dense, "sparsegpt")
    assert apply(run, "nowhere/at/all", out=run) == 2
    said = capsys.readouterr().err
    assert "3 problems, nothing was done" in said
    assert "sparsegpt updated the weights that it kept" in said
    assert "--model=nowhere/at/all: there is no such folder" in said
    assert f"--out={run}: there is something already" in said


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_another_dense_model_is_refused_and_nothing_is_left_behind(name, given, dense, capsys):
    run = pruned(given, dense, "wanda")
    weights = load_file(dense / "model.safetensors")
    weights[name][3, 5] += 0.5
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    before = set(Path().iterdir())
    assert apply(run, dense) == 2
    assert ("block index 1" if "layers.1" in name else "outside the blocks") in (said := capsys.readouterr().err)
    assert "other dense weights than those that were pruned" in said
    assert set(Path().iterdir()) == before


def test_a_model_with_fewer_blocks_and_a_file_without_masks_are_refused(given, dense, capsys):
    run = pruned(given, dense, "wanda")
    config = dense / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    weights = load_file(dense / "model.safetensors")
    fewer = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    save_file(fewer, dense / "model.safetensors", {"format": "pt"})
    assert apply(run, dense) == 2
    assert "masks of 2 blocks, the model has 1" in capsys.readouterr().err
    (run / "masks.safetensors").write_bytes(b"no masks")
    assert apply(run, dense) == 2
    assert "cannot be read as masks" in capsys.readouterr().err


def test_masks_do_not_depend_on_where_the_weights_lay_but_for_the_layout(given, dense):
    whole = masks_description(pruned(given, dense, "wanda", "model.load=whole") / "masks.safetensors")
    Path("run").rename("first")
    streamed = masks_description(pruned(given, dense, "wanda", "model.load=streamed") / "masks.safetensors")
    assert {key for key in whole if whole[key] != streamed[key]} == {"layout"}
    assert torch.is_tensor(load_file("run/masks.safetensors")["model.layers.0.mlp.up_proj.weight"])
