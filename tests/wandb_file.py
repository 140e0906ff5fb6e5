"""Reads the file that W&B writes offline: records in LevelDB's log format after a header of seven bytes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER_BYTES = 7
CHUNK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind: whole, first, middle, last
ENDS_RECORD = (1, 4)
WRITING_SECONDS = 300  # at most


def records(folder: Path) -> list[Any]:
    """The records of the one finished offline run in `folder`/wandb, whose last ones may still be on their way."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + WRITING_SECONDS
    while time.monotonic() < deadline:
        found = list(_records(path.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{path} has no end")


def _records(data: bytes) -> Iterator[Any]:
    position, record = HEADER_BYTES, b""
    while position < len(data):
        left = CHUNK_BYTES - position % CHUNK_BYTES
        if left < CHUNK_HEADER.size:  # too little for another chunk: padding
            position += left
            continue
        if position + CHUNK_HEADER.size > len(data):
            return
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        if position + length > len(data):
            return
        record += data[position : position + length]
        position += length
        if kind in ENDS_RECORD:
            yield wandb_internal_pb2.Record.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
            record = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary a call, without W&B's own `_` keys."""
    lines = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = ((_name(item), json.loads(item.value_json)) for item in record.history.item)
            lines.append({name: value for name, value in items if not name.startswith("_")})
    return lines


def summary(folder: Path) -> dict[str, Any]:
    """The last value of each summary key."""
    updates = (record.summary.update for record in records(folder) if record.WhichOneof("record_type") == "summary")
    return {_name(item): json.loads(item.value_json) for update in updates for item in update}


def one(folder: Path, kind: str) -> Any:
    """The first record of its kind: `run` or `exit`."""
    return next(getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind)


def step_metrics(folder: Path) -> dict[str, str]:
    """Glob of metrics to the metric they are drawn over."""
    metrics = [record.metric for record in records(folder) if record.WhichOneof("record_type") == "metric"]
    return {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}


def _name(item: Any) -> str:
    return item.key or "|".join(item.nested_key)
