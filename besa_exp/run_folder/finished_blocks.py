"""The blocks that a run has finished. Each is on the disk before the next is finished too, so that a crash costs one
finished block at most.

`blocks/` in the run folder holds for block i `00000i.safetensors` (all its tensors, pruned, by their names in the
model), `00000i.masks.safetensors` and, written last, `00000i.json`: the report, the hashes of the two files and that of
the block's dense weights. A block is finished when its json is there and the hashes agree. `identity.json` says what
the blocks were pruned from; blocks of another request are never gone on with. `budget_search.json` says how far the
search for a budget has come.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from besa_exp.blocks.reports import BlockReport
from besa_exp.checkpoints.files import save_masks
from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic
from besa_exp.machine.device import on_host
from besa_exp.methods.budgets.progress import Progress
from besa_exp.run_folder.identity import IDENTITY, as_plain, check_identity
from besa_exp.texts.sources import file_sha256

SEARCH = "budget_search.json"
REFINED = "model"  # the folder of the blocks as a search over the whole model leaves them
OUTSIDE = "outside.safetensors"
RECOVERED = "recovered"  # and as a recovery leaves them
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedBlocks:
    """The folder `blocks/` of one run; `identity`: what its blocks are pruned from. `keep_spent` is called before each
    block, or step of a search, is kept."""

    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    keep_spent: Callable[[], None] = lambda: None

    @property
    def search(self) -> Progress:
        """That of the search for a budget, if there is one."""
        return Progress(self.folder / SEARCH, self.keep_spent)

    @property
    def refined(self) -> FinishedBlocks:
        """The blocks after a search over the whole model, which begins with these."""
        return replace(self, folder=self.folder / REFINED)

    @property
    def recovered(self) -> FinishedBlocks:
        """The blocks after a recovery that began with these."""
        return replace(self, folder=self.folder / RECOVERED)

    def begin(self, ends: Collection[int] | None = None) -> list[BlockReport]:
        """The reports of the blocks that are finished, from block 0 on without a gap; later and damaged ones go, and
        where blocks are pruned together, those after the last of `ends`, the numbers at which none is cut off.

        ConfigurationError: what is there was pruned from something else; the differences are shown."""
        check_identity(self.folder, self.identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self.folder / IDENTITY, json.dumps(as_plain(self.identity), indent=2, sort_keys=True) + "\n")
        reports = []
        while report := self._read_report(len(reports)):
            reports.append(report)
        while ends is not None and len(reports) not in ends:
            reports.pop()
        whole = {file.name for index in range(len(reports)) for file in self._files(index)}
        for file in self.folder.iterdir():
            if file.name not in (*whole, IDENTITY, SEARCH, REFINED, RECOVERED):
                atomic.remove(file)
        return reports

    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        keep_masks: Mapping[str, Tensor],
        dense_sha256: str,
        weights_updated: bool = False,
        permutations: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep one block for good. RunError: the disk is full or cannot be written to."""
        weights, masks, record = self._files(report.index)
        remedy = "the blocks before it are kept: free disk space, then run the same command again"
        with atomic.writing(f"block index {report.index} could not be written to {self.folder}", remedy):
            with atomic.replaced_file(weights) as partial:
                save_file(on_host(tensors), partial, {"format": "pt"})
            save_masks(keep_masks, masks, dense_sha256, weights_updated, permutations)
            content = {
                "report": report.to_dict(steps=True),
                "sha256": {file.name: file_sha256(file) for file in (weights, masks)},
                "dense_sha256": dense_sha256,
            }
            self.keep_spent()
            atomic.write_text(record, json.dumps(content) + "\n")

    @property
    def outside(self) -> Path:
        """The file of tensors that are in no block, where a recovery moved such."""
        return self.folder / OUTSIDE

    def write_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep them by their names in the model. RunError: the disk is full or cannot be written to."""
        told = atomic.writing(f"{self.outside} could not be written", "free disk space, then start again")
        with told, atomic.replaced_file(self.outside) as partial:
            save_file(on_host(tensors), partial)

    def tensors(self, index: int, dense_sha256: str | None = None) -> dict[str, Tensor]:
        """A finished block's tensors by full name. ConfigurationError: they were pruned from dense weights of another
        hash than this; None: it is not compared."""
        weights, _, record = self._files(index)
        if dense_sha256 not in (None, json.loads(record.read_text(encoding="utf-8"))["dense_sha256"]):
            raise ConfigurationError(
                f"{self.folder}: block index {index} was pruned from other dense weights than the model has now; put "
                "the model back, or start again with overwrite=true"
            )
        return load_file(weights)

    def mask_file(self, index: int) -> Path:
        return self._files(index)[1]

    def mask_files(self, num_blocks: int) -> list[Path]:
        return [self.mask_file(index) for index in range(num_blocks)]

    def weight_files(self, num_blocks: int) -> list[Path]:
        return [self._files(index)[0] for index in range(num_blocks)]

    def _files(self, index: int) -> tuple[Path, Path, Path]:
        stem = f"{index:06d}"
        names = (f"{stem}.safetensors", f"{stem}.masks.safetensors", f"{stem}.json")
        weights, masks, record = (self.folder / name for name in names)
        return weights, masks, record

    def _read_report(self, index: int) -> BlockReport | None:
        record = self._files(index)[2]
        if not record.is_file():
            return None
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            hashes = content["sha256"].items()
            wrong = [name for name, expected in hashes if file_sha256(self.folder / name) != expected]
            if not wrong:
                return BlockReport.from_dict(content["report"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong = [f"{record.name} ({error})"]
        logger.warning("block %d is pruned again: %s is damaged", index, ", ".join(wrong))
        return None


def block_tensors(module: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """What a block's module would be saved as, by full name; tensors are not copied."""
    return {f"{name}.{key}": value.detach() for key, value in module.state_dict().items()}


def load_block_tensors(module: torch.nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """The opposite of `block_tensors`, in place."""
    module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in tensors.items()})
