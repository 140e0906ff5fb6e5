"""What is told about a model folder without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from besa_exp.checkpoints.inspect import inspect_model_folder

DOWN = "model.layers.0.mlp.down_proj.weight"
TENSORS = {
    "model.embed_tokens.weight": torch.zeros(32, 8),
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8),
    DOWN: torch.zeros(8, 12, dtype=torch.bfloat16),
    "model.layers.0.input_layernorm.weight": torch.zeros(8),
    "model.norm.weight": torch.zeros(8),
}


def written(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def problem_of(folder: Path) -> str:
    facts, problems = inspect_model_folder(folder)
    assert facts is None
    (problem,) = problems
    return problem


def test_shapes_sizes_and_context_come_from_the_headers(tmp_path: Path) -> None:
    facts, problems = inspect_model_folder(written(tmp_path))
    assert problems == []
    assert facts is not None
    assert facts.linears == {"model.layers.0.self_attn.q_proj.weight": (8, 8), DOWN: (8, 12)}
    assert facts.context == 64
    assert facts.weights == 32 * 8 + 64 + 96 + 16
    assert facts.saved_bytes == 4 * (32 * 8 + 64 + 16) + 2 * 96


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"text_config": {"max_position_embeddings": 96}}, 96),
        ({"text_config": None, "max_position_embeddings": 96}, 96),
        ({"transformers_weights": 5}, None),
        ({"max_position_embeddings": -1}, None),
    ],
    ids=str,
)
def test_the_context_is_found_in_a_nested_config_too_and_odd_values_say_nothing(
    tmp_path: Path, config: dict, context: int | None
) -> None:
    (written(tmp_path) / "config.json").write_text(json.dumps(config))
    facts, problems = inspect_model_folder(tmp_path)
    assert (problems, facts and facts.context) == ([], context)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    names = list(TENSORS)
    for shard, part in (("a.safetensors", names[:2]), ("b.safetensors", names[2:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
    shard_of = {name: "a.safetensors" if name in names[:2] else "b.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    facts, problems = inspect_model_folder(tmp_path)
    assert problems == []
    assert facts is not None
    assert len(facts.linears) == 2
    (tmp_path / "b.safetensors").unlink()
    assert "b.safetensors missing" in problem_of(tmp_path)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (written(tmp_path) / "config.json").unlink()
    assert "no config.json" in problem_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_config_that_is_not_json_of_keys_is_told(tmp_path: Path, name: str, text: str) -> None:
    (written(tmp_path) / "config.json").unlink()
    (tmp_path / name).write_text(text)
    assert f"/{name}: cannot be read as JSON" in problem_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_no_index_is_told(tmp_path: Path, text: str) -> None:
    (written(tmp_path) / "model.safetensors.index.json").write_text(text)
    assert "cannot be read as an index" in problem_of(tmp_path)
    for name in ("model.safetensors.index.json", "model.safetensors"):
        (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    _, problems = inspect_model_folder(tmp_path, convert=True)
    assert "pytorch_model.bin.index.json: cannot be read as an index" in problems[0]


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    (written(tmp_path) / "model.safetensors").unlink()
    assert "no model.safetensors" in problem_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_was_cut_off_anywhere_is_found(tmp_path: Path, kept: int) -> None:
    file = written(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "cut off" in problem_of(tmp_path)
    assert "copy or download it again" in problem_of(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"x" * 40,
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"shape": [50], "data_offsets": [0, 50]}}',
        b'{"a": {"dtype": "U8", "shape": "50", "data_offsets": [0, 50]}}',
    ],
)
def test_a_file_that_is_no_safetensors_is_told(tmp_path: Path, header: bytes) -> None:
    (written(tmp_path) / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x" * 50)
    assert "no safetensors file" in problem_of(tmp_path)
