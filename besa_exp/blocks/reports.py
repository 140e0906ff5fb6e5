"""What pruning reports: frozen values that the block loop yields and every consumer (files, W&B, console) reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One optimisation step of one block (BESA, Section 3.3, Eq. 5): loss = reconstruction + penalty."""

    block: int
    step: int
    loss: float
    reconstruction: float
    penalty: float
    expected_sparsity: float


@dataclass(frozen=True)
class ModelStep:
    """One step of a search over the whole model: `divergence` from the dense model, mean KL a token in nats, of the
    step's samples, and the least that the probe samples had so far."""

    step: int
    divergence: float
    probe_divergence: float


@dataclass(frozen=True)
class LinearReport:
    """How many of one linear's weights are zero; `allocated` is the sparsity the allocation asked of it."""

    name: str  # path inside the block, such as self_attn.q_proj
    weights: int
    pruned: int
    allocated: float

    @property
    def sparsity(self) -> float:
        """Measured fraction of zeros in [0, 1]."""
        return self.pruned / self.weights


@dataclass(frozen=True)
class BlockReport:
    """One pruned block. The losses are the reconstruction loss (each token's squared error relative to its own size;
    `besa_exp.tensors.losses`) on the probe samples: `loss_before` with the starting mask, nothing learned or updated,
    `loss_after` with the weights as written."""

    index: int
    linears: tuple[LinearReport, ...]
    loss_before: float
    loss_after: float
    seconds: float
    steps: tuple[Step, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the block's linears, weighted by weights."""
        return sum(linear.pruned for linear in self.linears) / sum(linear.weights for linear in self.linears)
