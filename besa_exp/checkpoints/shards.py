"""Which safetensors file of a model folder holds which tensor, and their writing without the whole model in memory.

Two layouts: that of transformers' `save_pretrained`, files up to a size in the order of the state dict; and that of a
streamed run, one file for what is outside the blocks and one for each block. A safetensors file's bytes depend on its
tensors and metadata alone, so that equal layouts of equal tensors are equal files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from besa_exp.checkpoints.inspect import INDEX, read_header

METADATA = {"format": "pt"}
ITEMSIZES = {"U8": 1, "I32": 4}  # of the tensors of masks files


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that are saved, by their names in the model: those that are tied to others are not."""
    left_out = {*(getattr(model, "all_tied_weights_keys", None) or ()), *(model._keys_to_ignore_on_save or ())}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def streamed_layout(outside: Iterable[str], blocks: Sequence[Iterable[str]]) -> dict[str, list[str]]:
    """File name to tensors: those outside the blocks, then each block's."""
    return dict(zip(shard_names(len(blocks) + 1), map(list, [outside, *blocks]), strict=True))


def shard_names(count: int) -> list[str]:
    """`model-00001-of-00003.safetensors` and so on."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(folder: Path, layout: Mapping[str, Sequence[str]], parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Writes the files of `layout` in order, each as soon as `parts` have given all that belongs into it."""
    held: dict[str, Tensor] = {}
    coming = iter(parts)
    for file, names in layout.items():
        while not held.keys() >= set(names):
            held |= next(coming)
        save_file({name: held.pop(name).cpu().contiguous() for name in names}, folder / file, METADATA)


def write_joined(files: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file that holds what several do, copied tensor by tensor: none is read as a whole. Wider numbers
    come first, so that each lies at a multiple of its size, as the format's own library has it."""
    parts = []
    for file in files:
        header, problem = read_header(file)
        assert problem is None, problem
        start = file.stat().st_size - max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        parts += [(file, start + tensor["data_offsets"][0], name, tensor) for name, tensor in header.items()]
    parts.sort(key=lambda part: -ITEMSIZES[part[3]["dtype"]])
    joined: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for _, _, name, tensor in parts:
        begin, end = end, end + _size(tensor)
        joined[name] = tensor | {"data_offsets": [begin, end]}
    text = json.dumps(joined).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for file, start, _, tensor in parts:
            with file.open("rb") as source:
                source.seek(start)
                stream.write(source.read(_size(tensor)))


def _size(tensor: Mapping[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return end - begin


def write_index(folder: Path, files: Iterable[str], num_parameters: int) -> None:
    """model.safetensors.index.json from the headers of the written files, as transformers writes it."""
    headers = {file: read_header(folder / file)[0] for file in files}
    sizes = [end - start for header in headers.values() for start, end in (t["data_offsets"] for t in header.values())]
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": sum(sizes)},
        "weight_map": {name: file for file, header in headers.items() for name in header},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
