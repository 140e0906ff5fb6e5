"""How far a tuning run has come, on the disk: whole at any moment, in two files that take turns.

A state that was cut short, or whose bytes are not those that were written, is passed over for the one before. The best
weights so far lie in files of their own, which a state names with their hash; one that no state names any more goes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic, distributed
from besa_exp.texts.sources import file_sha256

logger = logging.getLogger(__name__)
Saved = tuple[dict[str, Any], dict[str, Tensor], str]
"""Of a state its record, its tensors and the name of its best weights."""
SLOTS = ("state-a", "state-b")


@dataclass(frozen=True)
class SavedStates:
    """The states in `folder`, all of one `identity`: what determines the course of the run, in plain values."""

    folder: Path
    identity: Mapping[str, Any]

    def write(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor], best: str) -> None:
        """Keep a state in the place of the older of the two. `best`: what `write_best` called the weights that belong
        to it. RunError: the disk is full or cannot be written to."""
        if not distributed.is_first():
            return
        newest = self._newest()
        number, slot = (newest[0]["number"] + 1, 1 - SLOTS.index(newest[1])) if newest else (0, 0)
        weights, description = self._files(SLOTS[slot])
        with self._telling():
            self._save(weights, tensors)
            content = {
                "number": number,
                "sha256": {file.name: file_sha256(file) for file in (weights, self.folder / best)},
                "best": best,
                "identity": dict(self.identity),
                "record": dict(record),
            }
            atomic.write_text(description, json.dumps(content) + "\n")
        self._drop_unnamed()

    def write_best(self, step: int, tensors: Mapping[str, Tensor]) -> str:
        """Keep the weights after `step` steps; the name to give to `write`. RunError: as there."""
        name = f"best-{step:08d}.safetensors"
        if distributed.is_first():
            with self._telling():
                self._save(self.folder / name, tensors)
        return name

    def read(self) -> Saved | None:
        """The newest whole state; None: there is none. ConfigurationError: another run's are there."""
        distributed.barrier()  # rank 0 has written them
        newest = self._newest()
        if newest is None:
            return None
        content, slot = newest
        if content["identity"] != json.loads(json.dumps(dict(self.identity))):
            raise ConfigurationError(
                f"{self.folder} holds a tuning run of other settings "
                f"({_differences(content['identity'], self.identity)}); use the same settings to resume, or name "
                "another folder"
            )
        return content["record"], load_file(self._files(slot)[0]), content["best"]

    def read_best(self, name: str) -> dict[str, Tensor]:
        """The weights that `write_best` kept."""
        distributed.barrier()  # rank 0 has written them
        return load_file(self.folder / name)

    def _newest(self) -> tuple[dict[str, Any], str] | None:
        whole = [(content, slot) for slot in SLOTS if (content := self._whole(slot)) is not None]
        return max(whole, key=lambda found: found[0]["number"], default=None)

    def _whole(self, slot: str) -> dict[str, Any] | None:
        """What is reported of a state whose files hold what was written."""
        description = self._files(slot)[1]
        if not description.is_file():
            return None
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            wrong = [name for name, found in content["sha256"].items() if file_sha256(self.folder / name) != found]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            wrong = [f"{description.name} ({error})"]
        if wrong:
            logger.warning("resuming from the state before: %s is damaged", ", ".join(wrong))
            return None
        return content

    def _files(self, slot: str) -> tuple[Path, Path]:
        return self.folder / f"{slot}.safetensors", self.folder / f"{slot}.json"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic.replaced_file(path) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)

    def _drop_unnamed(self) -> None:
        named = {content["best"] for slot in SLOTS if (content := self._whole(slot)) is not None}
        for file in self.folder.glob("best-*.safetensors"):
            if file.name not in named:
                file.unlink()

    def _telling(self) -> AbstractContextManager[None]:
        remedy = "the one before is kept: free disk space, then run the same command again"
        return atomic.writing(f"the state of the tuning could not be written to {self.folder}", remedy)


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
    return ", ".join(f"{name} {there.get(name)!r}, now {wanted.get(name)!r}" for name in names[:3])
