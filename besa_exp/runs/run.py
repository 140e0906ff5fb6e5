"""A run under way: what its stages are given, and the value that they hand on.

A stage is a function `(Run, Work) -> Work`: it takes the model as the stages before have left it, and returns it with
what it adds. It keeps on the disk what it has finished, and asked again in the same folder it takes that from there, so
that each stage goes on by itself; the ones before it are then done at once. `runs.prune` lists the stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import discover_linears
from besa_exp.blocks.reports import BlockReport, RecoveryReport, Size, StructureReport
from besa_exp.checkpoints.load import LoadedModel, load_model, model_context, vocabulary_size
from besa_exp.display.console import RunConsole
from besa_exp.display.tracker import Tracker, start_tracker
from besa_exp.evaluation.score import Scores
from besa_exp.machine import distributed
from besa_exp.machine.device import peak_memory, prepared_device
from besa_exp.machine.environment import environment
from besa_exp.machine.process import imports_are_done
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.run_folder.folder import RunFolder
from besa_exp.run_folder.identity import check_identity, request_identity
from besa_exp.run_folder.inputs import fingerprint, write_inputs
from besa_exp.run_folder.spent import Spent
from besa_exp.runs.cpu_units import in_a_fast_dtype
from besa_exp.settings import CalibrationSettings, EvaluationSettings, RunSettings, TrackerSettings
from besa_exp.texts.calibration import Calibration, load_calibration


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and what it has taken so far. `config`: what it
    was asked as, in plain values."""

    settings: RunSettings
    config: Mapping[str, Any]
    device: torch.device
    folder: RunFolder
    console: RunConsole
    spent: Spent
    tracker: Tracker = field(default_factory=Tracker)


@dataclass(frozen=True)
class Work:
    """What the stages hand on. `loaded`: the model as it is now (streamed: it reads the newest files). `parameters`: of
    the dense model, and what is left of them; zeros are left. `finished` holds the pruned blocks and `reports`
    describes them, both by their numbers in the pruned model. `dense_cost`: of the dense model where parts of it went
    whole. `scores_before`: of the model that a recovery tunes. `saved`: what is scored, read again where it was saved.
    From then on `loaded` holds no weights, and `token_loss` is what it had on a few tokens. `reloaded`: what a fresh
    process saw of `saved`, as in results.json."""

    loaded: LoadedModel
    calibration: Calibration
    parameters: Size
    finished: FinishedBlocks
    dense_scores: Scores | None = None
    structure: StructureReport | None = None
    dense_cost: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[BlockReport, ...] = ()
    scores_before: Scores | None = None
    recovery: RecoveryReport | None = None
    saved: LoadedModel | None = None
    token_loss: float | None = None
    scores: Scores | None = None
    reloaded: Mapping[str, Any] = field(default_factory=dict)

    def numbered(self, reports: Sequence[BlockReport]) -> list[BlockReport]:
        """The reports under the blocks' numbers in the dense model, as files, console and W&B have them."""
        return [report.numbered(self.number(report.index)) for report in reports]

    def number(self, index: int) -> int:
        """In the dense model, of a block of the pruned one."""
        return self.structure.kept[index] if self.structure else index


def parameters(loaded: LoadedModel) -> int:
    """Of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in loaded.model.parameters())


def weights_in_linears(loaded: LoadedModel) -> int:
    """In the blocks; the weights themselves may be in files."""
    modules = discover_blocks(loaded.model)[1]
    return sum(linear.weight.numel() for module in modules for linear in discover_linears(module).values())


def num_blocks(loaded: LoadedModel) -> int:
    return len(discover_blocks(loaded.model)[1])


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """What the plan shows of a model besides the settings."""
    facts = {
        "weights": f"{parameters(loaded):,}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(next(loaded.model.parameters()).device),
    }
    return facts | ({"in memory": "one block at a time"} if loaded.weights else {})


def slow_work(
    device: str, dtype: torch.dtype, compute_dtype: str, num_ranks: int = 1, batch_size: int | None = None
) -> dict[str, str]:
    """What the plan shows of work that could be faster: products of a GPU in fp32, and steps of a search that have
    fewer samples than there are ranks."""
    facts = {}
    if device == "cuda" and dtype == torch.float32 and compute_dtype == "auto":
        facts["products"] = (
            "fp32, which has no tensor cores: 67 TFLOP/s at most on an H100 or H200 against 989 with "
            "compute_dtype=bfloat16, which rounds states and weights to 8 bits in products (TF32, to 11 bits: 494)"
        )
    if batch_size is not None and batch_size < num_ranks:
        facts["ranks"] = f"{num_ranks}: a step of pruner.batch_size={batch_size} keeps {batch_size} of them busy"
    return facts


@contextmanager
def opened(path: Path, overwrite: bool, resume: Mapping[str, Any] | None) -> Iterator[RunFolder]:
    """The run folder. Of several ranks the first alone locks and writes it; the others have its paths, to read."""
    first = distributed.is_first()
    folder = RunFolder.open(path, overwrite, resume) if first else nullcontext(RunFolder(path, writes=False))
    with folder as opened, distributed.failing_together(opened.give_up):
        yield opened


@contextmanager
def started(settings: RunSettings, path: Path, config: Mapping[str, Any]) -> Iterator[Run]:
    """The run in its folder, its request and machine written there; an unfinished one of the same request goes on."""
    imports_are_done()
    device = prepared_device(settings)
    resume = request_identity(config) if settings.resume else None
    with (
        distributed.joined(device),
        opened(path, settings.overwrite, resume) as folder,
        RunConsole(verbose=settings.verbose) as console,
    ):
        folder.write_config(config)
        folder.write_environment(environment(device))
        if distributed.is_first():
            write_inputs(path, fingerprint(settings))
        yield Run(settings, config, device, folder, console, Spent(folder.spent, partial(peak_memory, device)))


def load(run: Run, name: str) -> LoadedModel:
    """The model that is asked for, shown under its `name` and timed."""
    settings = run.settings
    run.console.stage(f"loading {name}")
    with run.spent.timed("load"):
        whole_for = "skipping" if settings.skipping else ""
        loaded = load_model(settings.model, run.device, settings.offline, whole_for)
        return in_a_fast_dtype(loaded, settings.model.dtype)


def begin_blocks(run: Run, calibration: Calibration) -> FinishedBlocks:
    """Where finished blocks lie. ConfigurationError: those of another request do."""
    identity = request_identity(run.config, calibration.tokens_sha256)
    distributed.from_first(lambda: check_identity(run.folder.blocks, identity))
    return FinishedBlocks(run.folder.blocks, identity, run.spent.keep)


@contextmanager
def tracked(
    settings: TrackerSettings, folder: Path, config: Mapping[str, Any], name: str, pruner: str
) -> Iterator[Tracker]:
    """The first rank's tracker, finished with what it was given, however the work ends."""
    own = settings if distributed.is_first() else TrackerSettings("none")
    tracker = start_tracker(own, folder, config, name, pruner)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(failed)


@contextmanager
def tracking(run: Run) -> Iterator[Tracker]:
    """The tracker of a run, which is told in the end what the run took."""
    path = run.folder.path
    with tracked(run.settings.tracker, path, run.config, path.name, run.settings.pruner_name) as tracker:
        yield tracker
        seconds, memory = run.spent.seconds(), run.spent.peak_memory()
        tracker.log_summary({f"seconds/{stage}": value for stage, value in seconds.items() if value is not None})
        tracker.log_summary({f"peak_memory_bytes/{where}": value for where, value in memory.items() if value})


def calibration_of(settings: CalibrationSettings, offline: bool, loaded: LoadedModel) -> Calibration:
    """The calibration tokens for a model: its tokenizer's, within its context and vocabulary."""
    vocabulary, context = vocabulary_size(loaded.model), model_context(loaded.model)
    return load_calibration(settings, loaded.tokenizer, context, offline, vocabulary=vocabulary)


def tokens_of(settings: RunSettings | EvaluationSettings, loaded: LoadedModel) -> Int[Tensor, "sample seq"]:
    """What a skipping policy is decided on, read by the first rank."""
    calibration = settings.calibration
    assert calibration is not None
    return distributed.from_first(lambda: calibration_of(calibration, settings.offline, loaded).input_ids)
