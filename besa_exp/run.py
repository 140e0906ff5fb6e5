"""A run, from the request to the results. This file reads like the flow; every step lives in a module of its own.

Load -> score dense if asked -> calibration tokens -> block loop -> save, reload, recount -> score -> results.json.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.blocks import capture_blocks, check_replay, embed
from besa_exp.calibration import Calibration, load_calibration, save_tokens
from besa_exp.checkpoint import count_zeros, save_masks, save_model, write_card
from besa_exp.console import RunConsole
from besa_exp.environment import environment
from besa_exp.errors import RunError
from besa_exp.evaluation.scores import Scores, evaluate
from besa_exp.masks import Target
from besa_exp.model_card import model_card
from besa_exp.models import load_model, model_context, model_path
from besa_exp.pruning import prune_blocks
from besa_exp.reports import BlockReport, Step
from besa_exp.results import results_of, score_values
from besa_exp.run_folder import RunFolder
from besa_exp.settings import RunSettings
from besa_exp.tracking import Tracker, start_tracker


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and the seconds spent on each part."""

    settings: RunSettings
    device: torch.device
    folder: RunFolder
    console: RunConsole
    seconds: dict[str, float]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def prune(settings: RunSettings, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one prune in the folder `path`, `config` being what it was asked as, and return its results.json.

    ConfigurationError: the request cannot be carried out; RunError: it failed on the way. What was measured stays."""
    started = time.perf_counter()
    device = _prepare(settings)
    with RunFolder.open(path, settings.overwrite) as folder, RunConsole() as console:
        run = Run(settings, device, folder, console, {})
        folder.write_config(config)
        folder.write_environment(environment(device))
        console.stage(f"loading {settings.model.path}")
        with run.timed("load"):
            model, tokenizer = load_model(settings.model, device, settings.offline)
        with run.timed("calibrate"):
            calibration = _calibrate(run, model, tokenizer)
        console.plan(settings, _facts(model, calibration))
        reports: list[BlockReport] = []
        with _tracking(run, config, reports) as tracker:
            dense = _score(run, "dense", model, tokenizer) if settings.evaluator.dense else None
            keep_masks = _prune_model(run, model, calibration, tracker, reports)
            results = results_of(settings, calibration, reports, environment(device))
            model = _save(run, model, tokenizer, keep_masks, results)
            scores = _score(run, "pruned", model, tokenizer)
            tracker.log_scores(scores, dense)
        results |= score_values(scores) | {"provenance": scores.provenance}
        results |= {"dense": score_values(dense)} if dense else {}
        run.seconds["total"] = time.perf_counter() - started
        results |= {"seconds": run.seconds, "peak_memory_bytes": _peak_memory(device)}
        _write(run, results)
    return results


def _prepare(settings: RunSettings) -> torch.device:
    """Seeds and determinism, and the device: auto is a GPU where there is one."""
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if settings.device == "auto" else settings.device)


def _calibrate(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Calibration:
    settings = run.settings
    run.console.stage(f"calibration tokens from {settings.calibration.path or settings.calibration.name}")
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    calibration = load_calibration(
        settings.calibration, tokenizer, model_context(model), settings.offline, vocabulary=vocabulary
    )
    if settings.calibration.save_tokens:
        save_tokens(calibration, run.folder.tokens)
    return calibration


def _facts(model: PreTrainedModel, calibration: Calibration) -> dict[str, Any]:
    """What the plan shows besides the settings."""
    samples, length = calibration.input_ids.shape
    return {
        "weights": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "calibration tokens": f"{samples} x {length}, sha256 {calibration.tokens_sha256[:12]}",
    }


@contextmanager
def _tracking(run: Run, config: Mapping[str, Any], reports: Sequence[BlockReport]) -> Iterator[Tracker]:
    """The tracker, finished with what was reported however the run ends."""
    path = run.folder.path
    tracker = start_tracker(run.settings.tracker, path, config, path.name, run.settings.pruner_name)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(reports, failed)


def _score(run: Run, which: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Scores:
    """Scores of the dense or the pruned model, recorded in metrics.jsonl as soon as they are known."""
    evaluator = run.settings.evaluator

    def on_progress(text: str) -> None:
        run.console.stage(f"{which} model: {text}")

    with run.timed("evaluate"):
        scores = evaluate(model, tokenizer, evaluator, run.settings.offline, run.settings.seed, on_progress)
    run.folder.log_scores(which, scores)
    return scores


def _prune_model(
    run: Run, model: PreTrainedModel, calibration: Calibration, tracker: Tracker, reports: list[BlockReport]
) -> dict[str, Tensor]:
    """The block loop: each report goes to the run folder, the tracker and the console. The keep masks by full name."""
    settings, keep_masks = run.settings, {}
    batch_size = settings.calibration.batch_size
    with run.timed("prune"):
        blocks = capture_blocks(model, calibration.input_ids)
        check_replay(model, blocks, calibration.input_ids[: min(2, batch_size)])
        inputs = embed(model, blocks, calibration.input_ids, batch_size)
        with run.console.pruning(len(blocks)) as progress:

            def on_step(step: Step) -> None:
                run.folder.log_step(step)
                tracker.log_step(step)
                progress.step(step)

            target = Target.parse(settings.sparsity, settings.pattern)
            for report, pruned in prune_blocks(blocks, inputs, settings.pruner, target, batch_size, on_step):
                run.folder.log_block(report)
                tracker.log_block(report)
                progress.block(report)
                reports.append(report)
                for name, keep_mask in pruned.keep_masks.items():
                    keep_masks[f"{blocks[report.index].name}.{name}.weight"] = keep_mask.cpu()
    return keep_masks


def _save(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    keep_masks: Mapping[str, Tensor],
    results: Mapping[str, Any],
) -> PreTrainedModel:
    """Save what is to be kept; then the model that was saved, loaded anew, its zeros counted again in the file."""
    settings, folder = run.settings, run.folder
    with run.timed("save"):
        if settings.save.masks:
            save_masks(keep_masks, folder.masks)
        if not settings.save.model:
            return model
        run.console.stage("saving the pruned model and loading it anew")
        sources = Path(model_path(settings.model))
        card = _card(run, results)
        save_model(model, tokenizer, folder.model, card, sources if sources.is_dir() else None)
        zeros = sum(pruned for _, pruned in count_zeros(folder.model, keep_masks).values())
        reported = sum(linear["pruned"] for block in results["blocks"] for linear in block["linears"].values())
        if zeros != reported:
            raise RunError(f"{folder.model}: the saved weights hold {zeros} zeros, {reported} were reported")
        saved = replace(settings.model, path=str(folder.model), revision=None, dtype="auto")
        return load_model(saved, run.device, offline=True)[0]


def _card(run: Run, results: Mapping[str, Any]) -> str:
    """The model card; a model that is neither embedded nor a folder is named by its hub id."""
    model = run.settings.model
    local = Path(model_path(model)).is_dir()
    return model_card(results, sys.argv, None if local else model.path, model.revision)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes held so far by this process on the host, and by torch on the device."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


def _write(run: Run, results: Mapping[str, Any]) -> None:
    """results.json, the model card with the scores, and the tables."""
    run.folder.write_results(results)
    if run.settings.save.model:
        write_card(run.folder.model, _card(run, results))
    run.console.summary(results, run.folder.path)
