"""Runs that sum in different orders (ranks, a restart between them), compared by what rounding can do to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from near_ties import assert_allocations_agree, assert_least_go, scores_when_chosen
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from besa_exp.checkpoints.files import load_masks

GROUP_SIZE = 128  # of SparseGPT


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def weights_and_inputs(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, dense weight [out in] and inputs [sample token in] of every linear of a Llama that a run pruned, in fp64,
    by hooks on plain forward passes. The inputs of a block come out of the blocks before it as the run saved them."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float64).requires_grad_(False)
    pruned = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    input_ids, seen = load_file(config["calibration"]["path"])["input_ids"], {}

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0]

    for index, (block, written) in enumerate(zip(model.model.layers, pruned.model.layers, strict=True)):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        hooks = [module.register_forward_pre_hook(note) for module in linears.values()]
        model.model(input_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            yield f"model.layers.{index}.{name}.weight", module.weight, seen[module]
        block.load_state_dict(written.state_dict())


def assert_weights_of_least_score_went(folder: Path, tolerance: float = 1e-4) -> None:
    """A run's masks are those of its pruner's own scores, computed here in fp64 from what the run saved, but for near
    ties: in every row by Wanda's, in every group of columns by SparseGPT's. In fp32 sums over some thousand tokens are
    off by 1e-6 of their size, and hidden states by some 1e-6 for each block."""
    masks, by_obs = load_masks(folder / "masks.safetensors"), results(folder)["pruner"] == "sparsegpt"
    for name, weight, inputs in weights_and_inputs(folder):
        tokens, keep_mask = inputs.flatten(0, -2), masks[name]
        if not by_obs:
            assert_least_go(keep_mask, weight.abs() * tokens.square().sum(dim=0).sqrt(), tolerance)
            continue
        hessian = 2 / len(inputs) * tokens.T @ tokens
        scores = scores_when_chosen(weight, hessian, keep_mask, GROUP_SIZE)
        for chosen, of_group in zip(keep_mask.split(GROUP_SIZE, 1), scores.split(GROUP_SIZE, 1), strict=True):
            assert_least_go(chosen.reshape(1, -1), of_group.reshape(1, -1), 10 * tolerance)


def assert_same_but_for_rounding(one: Path, two: Path, loss: float = 1e-3) -> None:
    """Two runs pruned equally many weights of every block, nearly as many of every row, and their blocks' losses are
    equal to `loss` (relative).

    An exchange of two weights of like importance adds to the loss about what it takes away: where f of n pruned weights
    were exchanged, whatever for, the loss moves by some sqrt(f) / n of itself, 1e-4 where it is one of 500. Statistics
    or gradients of half the samples move it by a hundredth and more."""
    masks, others = (load_masks(folder / "masks.safetensors") for folder in (one, two))
    assert_allocations_agree(masks, others)
    blocks, other_blocks = (results(folder)["blocks"] for folder in (one, two))
    for block, other in zip(blocks, other_blocks, strict=True):
        for when, value in block["reconstruction_loss"].items():
            assert other["reconstruction_loss"][when] == pytest.approx(value, rel=loss), (block["index"], when)
        zeros, other_zeros = (sum(linear["pruned"] for linear in b["linears"].values()) for b in (block, other))
        weights = sum(linear["weights"] for linear in block["linears"].values())
        assert abs(zeros - other_zeros) <= loss * weights
