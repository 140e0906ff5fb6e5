"""The tensors of a model after whole parts of it are gone: other names where blocks went, fewer rows and columns where
heads and channels did.

Rows of q, k, v and of gate and up go with their biases; columns of o and down go, and their biases stay. Families that
store several of these in one tensor (Phi-3) have its rows cut part by part. Each tensor is made by itself, so that a
model is narrowed as it is read. A tensor that should have been cut and is not known here keeps its shape, which the
model of the new config then refuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.checkpoints.tensor_sources import stored_tensors

IN_A_BLOCK = re.compile(r"^(.+?)\.\d+\.")


@dataclass(frozen=True)
class Role:
    """Along `axis` a tensor is made of these parts, in order: `heads` and `groups` of head_dim each, one number a
    head (`numbers`), or `channels`."""

    parts: tuple[str, ...]
    axis: int


ROLES = {
    r"self_attn\.q_proj\.(weight|bias)": Role(("heads",), 0),
    r"self_attn\.[kv]_proj\.(weight|bias)": Role(("groups",), 0),
    r"self_attn\.o_proj\.weight": Role(("heads",), 1),
    r"self_attn\.qkv_proj\.(weight|bias)": Role(("heads", "groups", "groups"), 0),
    r"self_attn\.sinks": Role(("numbers",), 0),
    r"mlp\.(gate|up)_proj\.(weight|bias)": Role(("channels",), 0),
    r"mlp\.gate_up_proj\.(weight|bias)": Role(("channels", "channels"), 0),
    r"mlp\.down_proj\.weight": Role(("channels",), 1),
    r"fc1\.(weight|bias)": Role(("channels",), 0),
    r"fc2\.weight": Role(("channels",), 1),
    r"mlp\.dense_h_to_4h\.(weight|bias)": Role(("channels",), 0),
    r"mlp\.dense_4h_to_h\.weight": Role(("channels",), 1),
    r"mlp\.c_fc\.weight": Role(("channels",), 1),  # transformers' Conv1D holds [in, out]
    r"mlp\.c_fc\.bias": Role(("channels",), 0),
    r"mlp\.c_proj\.weight": Role(("channels",), 0),
}


@dataclass(frozen=True)
class Narrowing:
    """A structure of a model of these dimensions whose blocks are `path`.0, `path`.1 and so on."""

    structure: Structure
    dimensions: Dimensions
    path: str

    def new_name(self, name: str) -> str | None:
        """What a tensor is called in the narrowed model; None: it is gone with its block."""
        if (found := block_and_name(name, self.path)) is None:
            return name
        place = self.structure.by_block.get(found[0])
        return None if place is None else f"{self.path}.{place}.{found[1]}"

    def narrowed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the dense model by name, some or all, as they are in the narrowed one: by new name, those that
        stay as they are the same objects."""
        made = {}
        for name, tensor in tensors.items():
            if (new := self.new_name(name)) is not None:
                cut = self.cut(name)
                made[new] = tensor.index_select(cut[0], cut[1].to(tensor.device)) if cut else tensor
        return made

    def cut(self, name: str) -> tuple[int, Int[Tensor, " row"]] | None:
        """The axis along which a tensor is cut, and the rows of the dense one that stay; None: it keeps its shape."""
        dimensions, structure = self.dimensions, self.structure
        block, inner = block_and_name(name, self.path) or (0, "")
        role = role_of(inner)
        if role is None or (structure.channels if "channels" in role.parts else structure.groups) is None:
            return None
        groups = structure.kept_groups(block, dimensions)
        channels = structure.kept_channels(block, dimensions)
        heads = _units(groups, dimensions.heads_of_group if dimensions.groups else 0)
        rows: list[Tensor] = []
        start = 0
        for part in role.parts:
            found, size = {
                "groups": (_units(groups, dimensions.head_dim), dimensions.groups * dimensions.head_dim),
                "heads": (_units(heads.tolist(), dimensions.head_dim), dimensions.heads * dimensions.head_dim),
                "numbers": (heads, dimensions.heads),
                "channels": (_units(channels, 1), dimensions.channels),
            }[part]
            rows.append(found + start)
            start += size
        return role.axis, torch.cat(rows)


def block_and_name(name: str, path: str) -> tuple[int, str] | None:
    """Of a tensor in `path`.N the number N and its name in there; None: it is in no block."""
    found = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def role_of(inner: str) -> Role | None:
    """Of a tensor by its name inside a block."""
    return next((role for pattern, role in ROLES.items() if re.fullmatch(pattern, inner)), None)


def costs_of(shapes: Mapping[str, Sequence[int]], dimensions: Dimensions, path: str) -> Costs:
    """What each part of a model costs in parameters. `shapes`: of its tensors by name, tied ones once."""
    outside, blocks, groups, channels = 0, [0] * dimensions.blocks, [0] * dimensions.blocks, [0] * dimensions.blocks
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if (found := block_and_name(name, path)) is None:
            outside += size
            continue
        block, role = found[0], role_of(found[1])
        blocks[block] += size
        if role is None:
            continue
        of_channels = "channels" in role.parts
        count = dimensions.channels if of_channels else dimensions.groups
        if count and size % count == 0:
            (channels if of_channels else groups)[block] += size // count
    return Costs(outside, tuple(blocks), tuple(groups), tuple(channels))


def costs_of_folder(folder: Path, dimensions: Dimensions) -> Costs:
    """The same of a folder of safetensors, by their headers. ValueError: they hold no tensors of blocks."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    paths = Counter(found[1] for name in shapes if (found := IN_A_BLOCK.match(name)))
    if not paths:
        raise ValueError(f"structure: {folder} holds no tensors of blocks")
    return costs_of(shapes, dimensions, paths.most_common(1)[0][0])


def _units(numbers: Sequence[int], size: int) -> Int[Tensor, " row"]:
    """The rows of units of `size` rows each."""
    return (torch.tensor([*numbers], dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()
