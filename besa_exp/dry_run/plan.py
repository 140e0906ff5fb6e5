"""What of a run decides about bytes and seconds: sizes, settings and what the probes measured. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class ModelSize:
    """Counts of values: of each block all its tensors, `outside` them what the model holds besides (tied weights once).
    `masks`: bytes of all masks, one bit a weight. `itemsize`: bytes of a value as it is computed with and saved."""

    blocks: tuple[int, ...]
    outside: int
    masks: int
    linears: int
    hidden: int
    vocabulary: int
    itemsize: int

    @property
    def total_bytes(self) -> int:
        """All weights."""
        return (sum(self.blocks) + self.outside) * self.itemsize

    @property
    def outside_bytes(self) -> int:
        """Embeddings, final norm, head."""
        return self.outside * self.itemsize

    @property
    def largest_block_bytes(self) -> int:
        """The largest block's weights."""
        return max(self.blocks) * self.itemsize

    @property
    def blocks_bytes(self) -> int:
        """All blocks' weights."""
        return sum(self.blocks) * self.itemsize


@dataclass(frozen=True)
class Working:
    """Bytes beyond weights and activations: the statistics of one block's linears, a batch's forward pass through a
    block, the pruner while it decides, and a batch's way through the head in an evaluation. None: not estimated."""

    statistics: int | None
    forward: int | None
    pruner: int | None
    evaluation: int | None


@dataclass(frozen=True)
class Dealing:
    """What a budget over depth asks for: `passes` of one sample through one block, the samples whose `states` it holds
    beside the inputs, how often it goes through all blocks (`reads`), and the tokens whose logits are compared at once
    where whole models are tried."""

    passes: int
    states: int
    reads: int = 1
    tried_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """What of a run's settings decides about bytes. `samples`, `seq_len` of the calibration; `activations_at`: device,
    host or disk; `windows_tokens`: most tokens of an evaluation's set, whose states a streamed model holds at once;
    `own_targets`: the parts of a block have targets of their own; `together`: blocks pruned under one loss; `dealing`:
    of a budget over depth, None where there is none; `links_blocks`: the saved model's blocks are the finished blocks'
    own files; `verified`: a fresh process loads it while it is scored."""

    size: ModelSize
    on_cuda: bool
    streamed: bool
    samples: int
    seq_len: int
    dense_targets: bool
    own_targets: bool
    together: int
    dealing: Dealing | None
    activations_at: Place
    save_model: bool
    save_masks: bool
    evaluates: bool
    windows_tokens: int
    steps: int
    wandb: bool
    libraries: int
    working: Working
    links_blocks: bool = False
    verified: bool = False

    @property
    def saved_anew(self) -> int:
        """Bytes of the saved model that are written beside the finished blocks."""
        return self.size.outside_bytes if self.links_blocks else self.size.total_bytes

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return len(self.size.blocks)
