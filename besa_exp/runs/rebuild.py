"""A pruned checkpoint rebuilt from dense weights and a run's masks: one bit a weight instead of a model for each run.

W * keep_mask is what a method that decides masks alone has written, so that the result is the run's own model, bytes
included: the same loading, the same helper that writes a block, the same layout of files. A method that also updates
the kept weights cannot be rebuilt and is refused. Every block's dense weights are compared by hash with those that
were pruned. What is saved block by block is rebuilt so, one block and one file in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.loop import write_weights
from besa_exp.blocks.pruner import PrunedBlock
from besa_exp.blocks.reports import LinearReport, share_of_zeros
from besa_exp.checkpoints.files import SHARD_SIZE, read_masks, save_beside_weights, weights_sha256
from besa_exp.checkpoints.load import LoadedModel, hub_id, load_model
from besa_exp.checkpoints.shards import streamed_layout, write_index, write_shards
from besa_exp.checkpoints.tensor_sources import as_saved
from besa_exp.display.model_card import base_licence, model_card
from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic
from besa_exp.run_folder.finished_blocks import block_tensors
from besa_exp.runs.save import outside_blocks
from besa_exp.settings import ModelSettings


@dataclass(frozen=True)
class Masks:
    """A run's masks file and what it says of itself (`checkpoint.masks_description`)."""

    path: Path
    description: Mapping[str, Any]

    def of(self, block: Block) -> dict[str, Tensor]:
        """The keep_masks of a block's linears by their path."""
        names = {path: f"{block.name}.{path}.weight" for path in block.linears}
        names = {path: name for path, name in names.items() if name in self.shapes}  # the others stayed dense
        masks = read_masks(self.path, {name: self.shapes[name] for name in names.values()})
        return {path: masks[name] for path, name in names.items()}

    @property
    def shapes(self) -> Mapping[str, list[int]]:
        """[out, in] by the linear's full name."""
        return self.description["shapes"]

    @property
    def model(self) -> str:
        return self.description["model"]

    def check(self, part: str, found: str, expected: str) -> None:
        """ConfigurationError: the hash of the dense weights is not the one the masks were made from."""
        if found != expected:
            raise ConfigurationError(
                f"{self.path}: {part} of the model holds other dense weights than those that were pruned "
                f"({self.model}, loaded as {self.description['dtype']}); give that very model, in the same revision"
            )


def rebuild(
    masks: Masks, model: ModelSettings, out: Path, command: Sequence[str], shard_size: str = SHARD_SIZE
) -> tuple[int, int]:
    """Writes the pruned model to `out`, whole or not at all; the weights under masks and the zeros among them.

    ConfigurationError: the model cannot be loaded or is not the one that was pruned; RunError: it cannot be written."""
    said = masks.description
    loaded = load_model(replace(model, dtype=said["dtype"], load=said["layout"]), torch.device("cpu"), offline=False)
    masks.check("what is outside the blocks", weights_sha256(outside_blocks(loaded)), said["outside_sha256"])
    blocks = loaded.blocks()
    if len(blocks) != (expected := len(said["dense_sha256"])):
        raise ConfigurationError(
            f"{masks.path}: masks of {expected} blocks, the model has {len(blocks)}; give {masks.model}"
        )
    counts: dict[int, list[LinearReport]] = {}
    pruned = _pruned(loaded, blocks, masks, counts)
    told = atomic.writing(f"{out} could not be written", "free disk space or give another --out")
    with told, atomic.replaced_folder(out) as partial:
        if loaded.weights is None:
            for _ in pruned:  # each is in its place then
                continue
            loaded.model.save_pretrained(partial, max_shard_size=shard_size)
        else:
            _write_streamed(loaded, blocks, pruned, partial)
        card = _card(loaded.folder, hub_id(model), masks, counts, command)
        save_beside_weights(loaded.model, loaded.tokenizer, partial, card, loaded.folder)
    linears = [linear for block in counts.values() for linear in block]
    return sum(linear.weights for linear in linears), sum(linear.pruned for linear in linears)


def _pruned(
    loaded: LoadedModel, blocks: Sequence[Block], masks: Masks, counts: dict[int, list[LinearReport]]
) -> Iterator[dict[str, Tensor]]:
    """Each block's tensors under its masks, by full name; `counts` receives those of its linears."""
    hashes = masks.description["dense_sha256"]
    for block in loaded.resident(blocks):
        masks.check(
            f"block index {block.index}", weights_sha256(block_tensors(block.module, block.name)), hashes[block.index]
        )
        keep_masks = masks.of(block)
        masked = replace(block, linears={name: block.linears[name] for name in keep_masks})
        write_weights(masked, PrunedBlock(keep_masks, allocated={}))
        counts[block.index] = [LinearReport.counted(name, keep_mask, 0.0) for name, keep_mask in keep_masks.items()]
        yield block_tensors(block.module, block.name)


def _write_streamed(
    loaded: LoadedModel, blocks: Sequence[Block], pruned: Iterator[dict[str, Tensor]], folder: Path
) -> None:
    """One file for what is outside the blocks, and one for each block."""
    assert loaded.weights is not None
    model = loaded.model
    outside = as_saved(model, loaded.weights.read_outside(f"{blocks[0].name.rpartition('.')[0]}."))
    bare = [block_tensors(block.module, block.name) for block in blocks]
    files = streamed_layout(outside, [list(as_saved(model, tensors)) for tensors in bare])
    write_shards(folder, files, chain([outside], (as_saved(model, tensors) for tensors in pruned)))
    write_index(folder, list(files), model.num_parameters())


def _card(
    folder: Path, base: str | None, masks: Masks, counts: Mapping[int, Sequence[LinearReport]], command: Sequence[str]
) -> str:
    """What a model card can say from the masks alone: without calibration and scores."""
    said, linears = masks.description, [linear for block in counts.values() for linear in block]
    results = {
        "model": masks.model,
        "pruner": said["method"],
        "pattern": said["pattern"],
        "seed": said["seed"],
        "target_sparsity": said["sparsity"],
        "measured_sparsity": share_of_zeros(linears),
        "blocks": [
            {"index": index, "linears": {linear.name: linear.to_dict() for linear in block}}
            for index, block in counts.items()
        ],
    }
    return model_card(results, command, base, licence=base_licence(folder))
