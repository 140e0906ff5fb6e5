"""How the tensors of a model folder become those of the model: as they are, under another name, or several made one.

transformers has a conversion mapping for each family: what it renames, stacks or splits when it loads (GPT-NeoX's
head, the experts of a mixture) and undoes when it saves. Its own transforms are applied here to one tensor of the model
at a time, so that a block is read or written without the others. They are first tried without data: their results must
be exactly the model's tensors, by name and shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from besa_exp.checkpoints.inspect import read_header, weight_files
from besa_exp.errors import first_line

NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers that older checkpoints still hold


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What one tensor of the model is made of, or several that one stored tensor holds. `name` is the first of them;
    `patterns` are those of `conversion` that the stored tensors match."""

    model: PreTrainedModel
    name: str
    stored: tuple[Stored, ...]
    conversion: WeightConverter | None = None
    patterns: tuple[str, ...] = ()

    def converted(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name, of the stored ones in order. Holds both, and steps between them, for a while."""
        if self.conversion is None:
            return {self.name: tensors[0]}
        conversion: Any = deepcopy(self.conversion)  # it collects what it is given
        for stored, pattern, tensor in zip(self.stored, self.patterns, tensors, strict=True):
            conversion.add_tensor(self.name, stored.name, pattern, tensor)
        made = conversion.convert(self.name, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What would be made, without data. ValueError: transformers' conversion cannot be followed."""
        try:
            made = self.converted([torch.empty(stored.shape, device="meta") for stored in self.stored])
        except Exception as error:
            raise ValueError(f"transformers' conversion to {self.name} fails ({first_line(error)})") from error
        return {name: tuple(tensor.shape) for name, tensor in made.items()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder's safetensors files by the names they have there. ValueError: what is wrong with
    these files."""
    files, problems = weight_files(folder)
    if problems:
        raise ValueError(problems[0])
    return {
        name: Stored(file, name, tuple(tensor["shape"]))
        for file in files
        for name, tensor in read_header(file)[0].items()
    }


def tensors_of_file(path: Path, model: PreTrainedModel) -> dict[str, Source]:
    """Sources of a file that holds tensors under the model's own names."""
    return {
        name: Source(model, name, (Stored(path, name, tuple(tensor["shape"])),))
        for name, tensor in read_header(path)[0].items()
    }


def tensor_sources(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """The source of each tensor of `model`, whose weights may be absent (meta), by name. A tied tensor has a source
    only if the files hold it; the tensor that others are tied to takes whichever of them the files hold. The model
    remembers what was converted, as after `from_pretrained`.

    ValueError: the files do not make up the model's tensors."""
    wanted = model.state_dict()
    conversions: Any = get_model_conversion_mapping(model)
    sources: dict[str, Source] = {}
    left = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern, conversion = _target(model, name, conversions, wanted)
        if target not in wanted:
            left.append(name)
            continue
        known = sources.get(target, Source(model, target, (), conversion))
        patterns = (*known.patterns, pattern) if conversion else ()
        sources[target] = Source(model, target, (*known.stored, stored[name]), conversion, patterns)
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in sources and source not in sources and sources[tied].conversion is None:
            sources[source] = replace(sources.pop(tied), name=source)
    made = {name: (source, shape) for source in sources.values() for name, shape in source.shapes().items()}
    _check(model, {name: shape for name, (_, shape) in made.items()}, wanted, left)
    used: Any = [conversion for conversion in conversions if conversion.was_used()]
    model._weight_conversions = used
    return {name: source for name, (source, _) in made.items()}


def _target(
    model: PreTrainedModel, name: str, conversions: Sequence[Any], wanted: dict[str, Tensor]
) -> tuple[str, str, WeightConverter | None]:
    """The tensor of the model that a stored one becomes (part of), and by which pattern of which conversion."""
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    prefix = model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
    if target not in wanted and name in wanted:  # saved under the model's own names
        target, pattern = name, None
    if pattern is None:
        return target, "", None
    return target, pattern, next(converter for converter in converters if pattern in converter.source_patterns)


def _check(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor], left: Sequence[str]
) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(wanted.keys() - shapes.keys() - tied)
    left = without_ignored(model, [*left, *(shapes.keys() - wanted.keys())])
    other = sorted(name for name in shapes.keys() & wanted.keys() if shapes[name] != tuple(wanted[name].shape))
    for names, verb in ((missing, "lack"), (left, "also hold"), (other, "hold in another shape")):
        if names:
            raise ValueError(
                f"the files {verb} {', '.join(names[:2])}: the checkpoint does not match {type(model).__name__}, "
                "renamed, stacked or split as transformers does it"
            )


def without_ignored(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Tensors in the files for which the model has no place, except those that transformers ignores for its class and
    those known from older checkpoints."""
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(found)
    return sorted(name for name in found.unexpected_keys if not name.endswith(NOT_WEIGHTS))


def read_tensors(sources: Iterable[Source], dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors that `sources` make, on the CPU, by name. A file is opened once for all that it holds as it
    is, and once more for each tensor that is converted, so that no more of it stays in memory."""
    made: dict[str, Tensor] = {}
    distinct = {source.name: source for source in sources}.values()
    as_they_are = [source for source in distinct if source.conversion is None]
    tensors = _read([source.stored[0] for source in as_they_are], dtype)
    made |= {source.name: tensor for source, tensor in zip(as_they_are, tensors, strict=True)}
    for source in distinct:
        if source.conversion is not None:
            made |= source.converted(_read(source.stored, dtype))
    return made


def _read(stored: Sequence[Stored], dtype: torch.dtype) -> list[Tensor]:
    tensors: dict[Stored, Tensor] = {}
    for path in dict.fromkeys(one.file for one in stored):
        with safe_open(path, framework="pt") as file:
            for one in (one for one in stored if one.file == path):
                tensor = file.get_tensor(one.name)
                tensors[one] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return [tensors.pop(one) for one in stored]


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model, or of some of its blocks, under the names and in the shapes that `save_pretrained` gives
    them: those that were loaded."""
    if getattr(model, "_weight_conversions", None) == []:
        return dict(tensors)
    return revert_weight_conversion(model, dict(tensors))
