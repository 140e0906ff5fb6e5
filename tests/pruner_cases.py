"""Every pruner, one row each, and a tiny model pruned by it. A new pruner adds a row to PRUNERS."""

from __future__ import annotations

import copy
from functools import cache

import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_joint import BesaJoint
from besa_exp.methods.pruners.besa_paper import BesaPaper
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.dense import Dense
from besa_exp.methods.pruners.quantised import Quantised
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.tuning import Tuning
from besa_exp.methods.updates.admm import Admm
from besa_exp.methods.updates.barber import Barber
from besa_exp.methods.updates.dsnot import Dsnot
from besa_exp.methods.updates.obs import Obs
from besa_exp.methods.updates.reconstruct import Reconstruct
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import Goal

ROUNDED_TO_ZERO = 0.02  # what some kept weights do: zeros beyond the budget
PRUNERS = {  # name: (pruner, how far from a 50 % target its measured sparsity may be, takes N:M)
    "dense": (Dense(), 0.5, True),
    "magnitude": (Uniform("magnitude", "linear"), 0.0005, True),
    "wanda": (Uniform(), 0.0005, True),
    "sparsegpt": (SparseGPT(group_size=32), 0.0005, True),
    "besa_paper": (BesaPaper(), 0.02, False),
    "besa": (Besa(checks=2), 0.0005, False),
    "besa_linear": (Besa(granularity="linear", checks=2), 0.0005, False),
    "besa_reconstruct": (BesaReconstruct(Tuning(epochs=1, batch_size=4, lr=0.01), group_size=32), 0.0005, True),
    "besa+reconstruct": (Updated(Besa(checks=2), Reconstruct(Tuning(epochs=1))), 0.0005, False),
    "wanda+obs": (Updated(Uniform(), Obs()), 0.0005, True),
    "wanda+admm": (Updated(Uniform(), Admm()), 0.0005, True),
    "wanda+dsnot": (Updated(Uniform(), Dsnot()), 0.0005, True),
    "wanda+barber": (Updated(Uniform(), Barber()), 0.0005, True),
    "ria": (Uniform("ria"), 0.0005, True),
    "wanda_plus": (Uniform("wanda_plus"), 0.0005, True),
    "besa by magnitude": (Besa(importance="magnitude"), 0.0005, False),
    "besa_joint": (BesaJoint(), ROUNDED_TO_ZERO, False),
    "wanda_then_quantise": (Quantised(Uniform(), "prune"), ROUNDED_TO_ZERO, True),
    "quantise_then_wanda": (Quantised(Uniform(), "quantise"), 0.0005, True),
    "sparsegpt_then_quantise": (Quantised(SparseGPT(group_size=32), "prune"), ROUNDED_TO_ZERO, True),
    "quantise_then_sparsegpt": (Quantised(SparseGPT(group_size=32), "quantise"), ROUNDED_TO_ZERO, True),
    "besa_then_quantise": (Quantised(Besa(), "prune"), ROUNDED_TO_ZERO, False),
    "quantise_then_besa": (Quantised(Besa(), "quantise"), 0.0005, False),
}
MOVES_WEIGHTS = {"sparsegpt", "besa_reconstruct", "besa+reconstruct", "wanda+obs", "wanda+admm"}
LEARNS = (Besa(checks=2), BesaPaper())
QUANTISED = [name for name, (pruner, *_) in PRUNERS.items() if pruner.traits.quantiser]
INPUT_IDS = torch.randint(0, 258, (10, 32), generator=torch.Generator().manual_seed(1))
DENSE = tiny_llama(context=32).requires_grad_(False)


def pattern_of(pruner, sparsity=0.5):
    """The first of unstructured and 2:4 that the pruner takes."""
    return next(pattern for pattern in ("unstructured", "2:4") if not pruner.check(sparsity, pattern))


@cache
def prune_tiny(pruner, sparsity=0.5, pattern=None, dtype=torch.float32, batch_size=4):
    pattern = pattern or pattern_of(pruner, sparsity)
    model = torch.nn.Module.to(copy.deepcopy(DENSE), dtype)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, batch_size)
    return model, list(prune_blocks(blocks, inputs, pruner, Goal.parse(sparsity, pattern), batch_size))


def weight_of(model, report, linear) -> torch.Tensor:
    return model.get_parameter(f"model.layers.{report.index}.{linear}.weight")


def measured(results):
    linears = [linear for report, _ in results for linear in report.linears]
    return sum(linear.pruned for linear in linears) / sum(linear.weights for linear in linears)
