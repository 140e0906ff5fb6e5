"""What a folder says, before any weight is read, of what may go from its model: sizes by config.json and the headers of
the safetensors files. No torch but in `costs_of`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.checkpoints.inspect import read_header, weight_files
from besa_exp.checkpoints.narrowed_config import block_problems, dimensions_of, uneven_problems, width_problems
from besa_exp.checkpoints.narrowed_tensors import costs_of
from besa_exp.checkpoints.structure import Costs, Dimensions

NOT_STREAMED = "structure.shape=uneven: a model that is streamed has blocks of even widths; set model.load=whole"
IN_A_BLOCK = re.compile(r"^(.+?)\.\d+\.")


@dataclass(frozen=True)
class NarrowedFacts:
    """The config, what it says there is, and what each part costs."""

    config: Mapping[str, Any]
    dimensions: Dimensions
    costs: Costs


def facts_of(folder: Path) -> NarrowedFacts:
    """Of a folder of safetensors. ValueError: its config does not say its blocks, or its files hold none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    headers = [read_header(file)[0] for file in weight_files(folder)[0]]
    shapes = {name: tensor["shape"] for header in headers for name, tensor in header.items()}
    paths = Counter(found[1] for name in shapes if (found := IN_A_BLOCK.match(name)))
    if not paths:
        raise ValueError(f"structure: {folder} holds no tensors of blocks")
    dimensions = dimensions_of(config)
    return NarrowedFacts(config, dimensions, costs_of(shapes, dimensions, paths.most_common(1)[0][0]))


def family_problems(config: Mapping[str, Any], narrows: bool, uneven: bool = False) -> list[str]:
    """Why widths (`narrows`; `uneven`: others in each block), or blocks, of this model cannot go, in sentences."""
    if not narrows:
        return block_problems(config)
    return width_problems(config, groups=True, channels=True) or (uneven_problems(config) if uneven else [])
