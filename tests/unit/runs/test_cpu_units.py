"""16-bit weights on a CPU that is slow in them: computed in fp32, saved as they were, and told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import INPUT_IDS, tiny_llama

from besa_exp.blocks.activations import allocator
from besa_exp.checkpoints.files import weights_sha256
from besa_exp.checkpoints.load import load_model
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.runs.block_loop import BlockLoop
from besa_exp.runs.cpu_units import Rounding, in_a_fast_dtype, multiplies
from besa_exp.runs.save import check_saved, outside_blocks, save_pruned
from besa_exp.settings import ModelSettings
from besa_exp.tensors.masks import Goal

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("line", "dtype", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", torch.bfloat16, True),
        ("flags\t\t: fpu avx2 amx_bf16", torch.bfloat16, True),
        ("flags\t\t: fpu avx2 avx512f", torch.bfloat16, False),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16, True),
        ("Features\t: fp asimd fphp", torch.bfloat16, False),
        ("flags\t\t: fpu avx2 avx512_fp16", torch.float16, False),  # on no CPU
        ("flags\t\t: fpu", torch.float32, True),
        ("model name\t: of which nothing is told", torch.bfloat16, True),
    ],
)
def test_a_cpu_says_by_its_flags_what_it_multiplies(line, dtype, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert multiplies(dtype, tmp_path / "cpuinfo") == has
    assert multiplies(torch.bfloat16, tmp_path / "none")


def loaded_from(folder, load, asked="auto"):
    settings = ModelSettings(name="half", path=str(folder), load=load, dtype=asked)
    return in_a_fast_dtype(load_model(settings, CPU, offline=True), asked)


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_fp16_weights_are_computed_in_fp32_with_their_own_values_and_it_is_told(load, tmp_path):
    model = tiny_llama(dtype=torch.float16)
    model.save_pretrained(tmp_path)
    loaded = loaded_from(tmp_path, load)
    assert (loaded.model.dtype, loaded.stored) == (torch.float32, torch.float16)
    (note,) = loaded.notes
    assert "computed in fp32 and saved in float16" in note
    found = loaded.model.state_dict()
    if loaded.weights:
        for index, module in enumerate(loaded.model.model.layers):
            loaded.weights.load(f"model.layers.{index}", module)
        found = loaded.model.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in model.state_dict().items())
    as_asked = loaded_from(tmp_path, load, "float16")
    assert (as_asked.model.dtype, as_asked.stored, as_asked.notes) == (torch.float16, None, ())


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_what_was_computed_in_fp32_is_saved_in_its_own_dtype_with_the_zeros_that_are_told(load, tmp_path):
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "dense")
    loaded = loaded_from(tmp_path / "dense", load)
    outside = weights_sha256(outside_blocks(loaded))
    finished, reports = FinishedBlocks(tmp_path / "blocks"), []
    finished.begin()
    loop = BlockLoop(loaded, INPUT_IDS, 5, finished, 0, allocator("device", CPU, tmp_path, 0)[1])
    assert loaded.stored is not None
    pruner = Rounding(SparseGPT(group_size=32), loaded.stored)
    loop.run(pruner, Goal(0.5), None, lambda step: None, reports.append)
    in_memory = [parameter for parameter in loaded.model.parameters() if not parameter.is_meta]
    assert all(torch.equal(parameter, parameter.half().float()) for parameter in in_memory)
    save_pruned(loaded, finished, tmp_path / "model", "card")
    if load == "whole":  # the tables of its positions are no weights: the model is called again
        assert loaded.model.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
    saved = {name: t for file in (tmp_path / "model").glob("*.safetensors") for name, t in load_file(file).items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    again = load_model(ModelSettings(name="half", path=str(tmp_path / "model"), load=load), CPU, offline=True)
    check_saved(again, reports)
    dense = load_model(ModelSettings(name="half", path=str(tmp_path / "dense")), CPU, offline=True)
    assert weights_sha256(outside_blocks(dense)) == outside
