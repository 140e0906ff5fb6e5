"""The published way of learning one block's allocation, written for comparison from its description.

What the authors' code does for each block, at its defaults: every linear accumulates its own statistic (q, k and v see
one input three times), the dense block also runs on dense inputs, for the log; each row is sorted once and its int64
sort indices are kept; each forward pass, in training and in the validation pass that follows, builds a hard and a soft
fp32 mask of the weight's size by two scatters, joins them straight through and multiplies the weight. Autograd carries
the gradient back through all of it, Prodigy takes the steps, and one more mask prunes the block for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import Block
from besa_exp.tensors.losses import channel_loss

STEP, PENALTY, TARGET, D_COEF = 0.01, 5.0, 0.5, 5.0


class Allocation:
    """One linear's logits over candidate sparsities, its sort indices, and the masks they give."""

    def __init__(self, weight: Tensor, squared_norm: Tensor) -> None:
        rows, self.columns = weight.shape
        self.weight = weight
        self.indices = (weight.abs() * squared_norm.sqrt()).sort(dim=1, stable=True)[1]
        self.candidates = torch.arange(1.0, -STEP, -STEP, device=weight.device)
        self.candidates[-1] = 0.0
        self.theta = nn.Parameter(torch.zeros(rows, len(self.candidates), device=weight.device))
        cuts = (self.columns * self.candidates).long()
        self.below = (torch.arange(self.columns, device=weight.device) < cuts[:, None]).float()

    def masked(self) -> tuple[Tensor, Tensor]:
        """The masked weight and the linear's expected sparsity."""
        beta = self.theta.sigmoid().softmax(dim=1)
        sparsity = beta @ self.candidates
        pruned = (sparsity.detach() * self.columns).long()
        kept = (torch.arange(self.columns, device=pruned.device) >= pruned[:, None]).float()
        hard = torch.ones_like(self.weight, dtype=torch.float32).scatter_(1, self.indices, kept)
        soft = torch.zeros_like(hard).scatter(1, self.indices, 1 - beta @ self.below)
        return self.weight * (hard.detach() - soft.detach() + soft).to(self.weight.dtype), sparsity.mean()


def statistics(block: Block, inputs: Tensor, add: Callable[[str, Tensor], None]) -> Tensor:
    """One pass over the samples that hands every linear's inputs to `add`; returns the outputs."""
    hooks = [
        linear.module.register_forward_pre_hook(partial(lambda name, module, args: add(name, args[0]), name))
        for name, linear in block.linears.items()
    ]
    outputs = block.outputs(inputs, 1)
    for hook in hooks:
        hook.remove()
    return outputs


def learn_block(block: Block, inputs: Tensor) -> list[float]:
    """All of one block: statistics, one epoch at batch 1, the validation pass. The moments at which steps ended."""
    norms = {name: torch.zeros(linear.weight.shape[1], device=inputs.device) for name, linear in block.linears.items()}

    def add(name: str, features: Tensor) -> None:
        norms[name] += features.float().flatten(0, -2).norm(dim=0).square() / len(inputs)

    targets = statistics(block, inputs, add)
    block.outputs(inputs, 1)  # the dense block on dense inputs, for a loss that is logged
    allocations = {name: Allocation(linear.weight.detach(), norms[name]) for name, linear in block.linears.items()}
    total = sum(allocation.weight.numel() for allocation in allocations.values())
    thetas = [allocation.theta for allocation in allocations.values()]
    optimizer = their_optimizer(thetas)
    moments = []
    for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
        masked, sparsity = masked_weights(allocations, total)
        loss = channel_loss(block(sample, masked), target) + PENALTY * ((sparsity - TARGET) / TARGET) ** 2
        loss.item()  # logged at every step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moments.append(time.perf_counter())
    with torch.no_grad():
        for sample in inputs.split(1):
            block(sample, masked_weights(allocations, total)[0])
        masked_weights(allocations, total)  # for good
    return moments


def their_optimizer(thetas: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Prodigy, or where it is not installed AdamW, which their code has too and which costs less."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        return torch.optim.AdamW(thetas, lr=0.01, weight_decay=0)
    return Prodigy(thetas, lr=1.0, weight_decay=0, d_coef=D_COEF)


def masked_weights(allocations: dict[str, Allocation], total: int) -> tuple[dict[str, Tensor], Tensor]:
    masked, sparsity = {}, torch.zeros(())
    for name, allocation in allocations.items():
        masked[name], linear_sparsity = allocation.masked()
        sparsity = sparsity.to(linear_sparsity.device) + linear_sparsity * (allocation.weight.numel() / total)
    return masked, sparsity


def add_to_hessian(hessian: Tensor, features: Tensor, samples: int) -> None:
    """One more sample of `samples`."""
    tokens = features.float().flatten(0, -2).t() * (2 / samples) ** 0.5
    hessian += tokens @ tokens.t()


def factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse."""
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def sparsegpt_block(block: Block, inputs: Tensor) -> None:
    """A Hessian and a factor for each linear, even where linears share their input; the column loop; the outputs."""
    hessians = {
        name: torch.zeros(linear.weight.shape[1], linear.weight.shape[1], device=inputs.device)
        for name, linear in block.linears.items()
    }
    statistics(block, inputs, lambda name, features: add_to_hessian(hessians[name], features, len(inputs)))
    for name, linear in block.linears.items():
        sparsegpt_columns(linear.weight.detach(), factor(hessians[name]))
    block.outputs(inputs, 1)


def sparsegpt_columns(weight: Tensor, factor: Tensor, group: int = 128) -> Tensor:
    """The column loop as published: whole columns of a row-major weight, the mask chosen group by group."""
    weight = weight.float().clone()
    columns = weight.shape[1]
    for start in range(0, columns, group):
        end = min(start + group, columns)
        here, factor_here = weight[:, start:end].clone(), factor[start:end, start:end]
        kept, errors = torch.zeros_like(here), torch.zeros_like(here)
        score = here**2 / factor_here.diagonal() ** 2
        prune = score <= score.flatten().sort()[0][int(score.numel() * TARGET)]
        for j in range(end - start):
            column = here[:, j]
            quantised = column.clone()
            quantised[prune[:, j]] = 0
            kept[:, j] = quantised
            error = (column - quantised) / factor_here[j, j]
            here[:, j:] -= error.unsqueeze(1) @ factor_here[j, j:].unsqueeze(0)
            errors[:, j] = error
        weight[:, start:end] = kept
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight
