"""Everything that a dry run tells of one run.

Sizes come from the model's config: it is built without weights. Texts are read and cut into tokens as the run would do
it (`inputs.py`). One block of random weights is then pruned on the device (`block_probe.py`), a batch goes through it
and the head (`evaluation_probe.py`), and a file is written beside the run folder and removed again (`disk_probe.py`).
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import psutil
import torch
from transformers import PreTrainedModel

from besa_exp.blocks.activations import activation_bytes, allocator
from besa_exp.blocks.block import discover_blocks, discover_linears
from besa_exp.blocks.units import blocks_together, refinements, takes_apart
from besa_exp.checkpoints.load import is_large, weight_bytes
from besa_exp.checkpoints.streaming import cannot_stream, give_back_memory, saves_blocks_anew
from besa_exp.checkpoints.tensor_sources import stored_tensors
from besa_exp.dry_run.block_probe import BlockCost, BlockProbe, cut_down
from besa_exp.dry_run.disk_probe import disk_speed, existing_place
from besa_exp.dry_run.evaluation_probe import EvaluationCost, evaluation_cost
from besa_exp.dry_run.inputs import Texts, local_folder, model_without_weights, read_texts
from besa_exp.dry_run.meters import seconds_of
from besa_exp.dry_run.needs import Need, kept_bytes, needs, needs_of_scoring
from besa_exp.dry_run.plan import ModelSize, Place, Plan, Working
from besa_exp.dry_run.search_probe import dealing, search_seconds
from besa_exp.dry_run.seconds import scored_only, seconds
from besa_exp.errors import ConfigurationError, RunError, first_line
from besa_exp.machine.device import compute_dtype, prepared_device
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.trial import Search
from besa_exp.methods.updates.updated import with_update
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Target

LEAST_WORK = 3  # blocks that a probe on a CPU needs at least
UNKNOWN = "are not estimated"


@dataclass(frozen=True)
class Estimate:
    """Of one run: its parts, the bytes it keeps, seconds by part (None: not estimated), what is free at each place,
    remarks, and whether a finished run is there."""

    settings: RunSettings
    folder: Path
    device: torch.device
    parts: list[Need]
    kept: int
    blocks: int
    seconds: dict[str, float | None]
    free: dict[str, int]
    notes: list[str]
    finished: bool = False

    @property
    def total(self) -> float | None:
        """Seconds of the whole run."""
        return self.seconds["total"]


def estimate(settings: RunSettings, folder: Path, tell: Callable[[str], None] = lambda text: None) -> Estimate:
    """What the run in `folder` would need. `tell` is told what is done next. ConfigurationError: the run would be
    refused."""
    device = prepared_device(settings)
    tell("building the model without weights, reading the texts")
    models: list[PreTrainedModel] = []
    build = seconds_of(device, lambda: models.append(model_without_weights(settings.model, settings.offline)))
    size = model_size(models[0])
    streamed, notes = _is_streamed(settings, models[0], size, device)
    texts = read_texts(settings, models[0])
    free = {"host": free_memory(), "disk": shutil.disk_usage(existing_place(folder)).free}
    free |= {"device": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    tell("writing a file and reading it again")
    disk = disk_speed(folder)
    tell(f"pruning one block of random weights on {device}")
    probed = _probe(settings, models[0], size, texts, folder, device)
    plan = replace(
        _plan(settings, size, texts, streamed, device, probed),
        links_blocks=streamed and not saves_blocks_anew(models[0]),
    )
    scored = 2 if settings.evaluator.dense and not settings.is_dense else 1
    parts, taken = (
        needs(plan),
        seconds(plan, texts, build, disk, probed.block, probed.evaluation, scored, probed.search),
    )
    if settings.is_dense:
        parts, taken = needs_of_scoring(parts), scored_only(taken)
    return Estimate(
        settings=settings,
        folder=folder,
        device=device,
        parts=parts,
        kept=kept_bytes(plan),
        blocks=len(size.blocks),
        seconds=taken,
        free=free,
        notes=[*notes, *texts.notes, *probed.notes, *_not_estimated(settings)],
    )


def _not_estimated(settings: RunSettings) -> list[str]:
    if not refinements(settings.pruner, settings.pattern):
        return []
    return ["time and memory of the search over the whole model, which follows the block loop, are not estimated"]


@dataclass(frozen=True)
class Probed:
    """What was measured on the device; None: it was not. `libraries`: bytes of this process before it."""

    libraries: int
    activations_at: str
    block: BlockCost | None
    evaluation: EvaluationCost | None
    notes: list[str]
    search: float = 0.0  # seconds that the budget's search takes


def _probe(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, texts: Texts, folder: Path, device: torch.device
) -> Probed:
    pruner, evaluator = with_update(settings.pruner, settings.update), settings.evaluator
    _import_what_a_run_imports(settings)
    needed = activation_bytes(texts.samples, texts.seq_len, size.hidden, size.itemsize, pruner.dense_targets)
    place, allocate = allocator(settings.activations, device, existing_place(folder), needed)
    give_back_memory()
    libraries = psutil.Process().memory_info().rss
    together = blocks_together(pruner)
    least = LEAST_WORK * together * size.largest_block_bytes + size.outside_bytes
    if device.type == "cpu" and least > free_memory():
        return Probed(libraries, place, None, None, [f"time and working memory {UNKNOWN}: one block needs more memory"])
    target = Target.parse(settings.sparsity, settings.pattern)
    window = max((length for _, length in texts.windows), default=min(512, texts.seq_len))
    evaluates = evaluator.perplexity_sets or evaluator.tasks
    try:
        cut, batch_size = cut_down(model, device, together), settings.calibration.batch_size
        dtype = compute_dtype(settings)
        probe = BlockProbe(cut, device, pruner, target, batch_size, allocate, settings.budget, dtype)
        block = probe.cost(texts.samples, texts.seq_len)
        evaluation = evaluation_cost(probe, evaluator, window) if evaluates else None
        shape = (len(size.blocks), texts.samples, texts.seq_len)
        search = search_seconds(probe, settings.budget, *shape) if isinstance(settings.budget, Search) else 0.0
        return Probed(libraries, place, block, evaluation, [], search)
    except torch.OutOfMemoryError:
        return Probed(libraries, place, None, None, [f"time and working memory {UNKNOWN}: one block did not fit"])
    except RunError:
        raise
    except RuntimeError as error:  # as of a block that takes no other one's arguments
        return Probed(libraries, place, None, None, [f"time and working memory {UNKNOWN}: {first_line(error)}"])


def _plan(
    settings: RunSettings, size: ModelSize, texts: Texts, streamed: bool, device: torch.device, probed: Probed
) -> Plan:
    block, evaluation, tracker = probed.block, probed.evaluation, settings.tracker
    on_cuda, pruner = device.type == "cuda", with_update(settings.pruner, settings.update)
    return Plan(
        size=size,
        on_cuda=on_cuda,
        streamed=streamed,
        samples=texts.samples,
        seq_len=texts.seq_len,
        dense_targets=pruner.dense_targets,
        own_targets=takes_apart(pruner),
        together=min(blocks_together(pruner), len(size.blocks)),
        dealing=dealing(settings.budget, len(size.blocks), texts.samples, texts.seq_len, settings.sparsity),
        activations_at=cast(Place, probed.activations_at if on_cuda or probed.activations_at == "disk" else "host"),
        save_model=settings.keeps_model,
        save_masks=settings.save.masks and not settings.is_dense,
        verified=settings.keeps_model and settings.save.verify,
        evaluates=bool(settings.evaluator.perplexity_sets or settings.evaluator.tasks),
        windows_tokens=max((count * length for count, length in texts.windows), default=0),
        steps=round(block.steps * len(size.blocks)) if block else 0,
        wandb=tracker.name == "wandb" and tracker.mode != "disabled",
        libraries=probed.libraries,
        working=Working(
            statistics=block.statistics if block else None,
            forward=block.forward if block else None,
            pruner=block.pruner if block else None,
            evaluation=evaluation.held if evaluation else None,
        ),
    )


def _is_streamed(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, device: torch.device
) -> tuple[bool, list[str]]:
    """Whether the blocks will be read one at a time, as `models.load_model` decides it, and what is to be said."""
    wanted, folder = settings.model.load, local_folder(settings.model)
    there = weight_bytes(folder) if folder else 0
    notes = [] if there else ["the weights are not on this machine: the run fetches them first, which is not counted"]
    if wanted == "whole" or (wanted == "auto" and not is_large(there or size.total_bytes, device)):
        return False, notes
    reason = cannot_stream(model, stored_tensors(folder)) if folder and there else None
    if reason is None:
        return True, notes
    if wanted == "streamed":
        raise ConfigurationError(
            f"model.load=streamed: {settings.model.path} cannot be streamed ({reason}); set model.load=whole"
        )
    return False, [*notes, f"large, but loaded whole: {reason}"]


def _import_what_a_run_imports(settings: RunSettings) -> None:
    """So that this process holds the libraries which a run holds."""
    if settings.tracker.name == "wandb":
        importlib.import_module("wandb")
    if settings.evaluator.tasks:
        importlib.import_module("lm_eval.models.huggingface")


def model_size(model: PreTrainedModel) -> ModelSize:
    """Counts of a model without weights, as it will be computed with and saved."""
    modules = discover_blocks(model)[1]
    blocks = tuple(sum(value.numel() for value in module.state_dict().values()) for module in modules)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    linears = [linear.weight.numel() for module in modules for linear in discover_linears(module).values()]
    config = model.config.get_text_config()
    return ModelSize(
        blocks=blocks,
        outside=sum(count for key, count in unique.items() if key not in inside),
        masks=sum(-(-count // 8) for count in linears),
        linears=len(linears),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=model.dtype.itemsize,
    )
