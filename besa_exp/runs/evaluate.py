"""`besa evaluate`, from the request to the results: load -> recount -> score what is not scored -> results.json.

The scores of a run's own model join that run's results.json; those of any other checkpoint stand in a results.json of
their own, which later scores of the same checkpoint join.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from besa_exp.checkpoints.files import count_zeros, write_card
from besa_exp.checkpoints.gguf_file import dequantised
from besa_exp.checkpoints.inspect import BLOCK_AND_LINEAR, inspect_model_folder
from besa_exp.checkpoints.load import LoadedModel, load_model, model_context
from besa_exp.display.console import RunConsole
from besa_exp.display.model_card import renewed_card
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.kept_scores import FinishedScores, files_of
from besa_exp.evaluation.merging import merged, remaining
from besa_exp.evaluation.policies import skipping_of
from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.scores import evaluate
from besa_exp.machine import atomic, distributed
from besa_exp.machine.device import peak_memory, prepared_device
from besa_exp.machine.environment import environment
from besa_exp.machine.process import imports_are_done
from besa_exp.run_folder.folder import RunFolder, earlier_results
from besa_exp.run_folder.inputs import fingerprint, write_inputs
from besa_exp.run_folder.lock import locked
from besa_exp.run_folder.log import logging_to
from besa_exp.run_folder.lookup import read_group, run_and_model
from besa_exp.run_folder.spent import Spent
from besa_exp.run_folder.status import read_status
from besa_exp.runs.cpu_units import in_a_fast_dtype
from besa_exp.runs.results import compared_with_published
from besa_exp.runs.run import tokens_of, tracked
from besa_exp.settings import EvaluationSettings

DENSE = 0.001  # a smaller share of zeros is a dense model's own
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Evaluation:
    """One under way."""

    settings: EvaluationSettings
    folder: RunFolder
    console: RunConsole
    device: torch.device
    spent: Spent


def evaluate_checkpoint(settings: EvaluationSettings, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Score a checkpoint, add what is measured to the results.json in `path`, and return it.

    Each finished set and task is on the disk before the next begins: the same command goes on there.
    ConfigurationError: the folder holds scores of another model, or under other conditions."""
    imports_are_done()
    device = prepared_device(settings)
    with distributed.joined(device), opened(path) as folder, RunConsole() as console:
        if settings.overwrite and distributed.is_first():
            atomic.remove(folder.spent)
        spent = Spent(folder.spent, partial(peak_memory, device))
        evaluation = _Evaluation(settings, folder, console, device, spent)
        console.stage(f"loading {settings.checkpoint}")
        loaded = load_model(settings.model, device, settings.offline, "skipping" if settings.skipping else "")
        loaded = in_a_fast_dtype(loaded, settings.model.dtype)
        results = _scored(evaluation, loaded, config)
        console.tables(results)
        logger.info("%s: %.1f s", path / "results.json", spent.seconds()["total"])
    return results


@contextmanager
def opened(path: Path) -> Iterator[RunFolder]:
    """The folder, which of several ranks the first alone locks and writes. Its status stays that of the run whose
    folder it is: why an evaluation failed stands in run.log."""
    with ExitStack() as held:
        if distributed.is_first():
            held.enter_context(locked(path))
            held.enter_context(logging_to(path / "run.log"))
        held.enter_context(distributed.failing_together(lambda error: logger.error("the evaluation failed: %s", error)))
        yield RunFolder(path, writes=distributed.is_first())


def _scored(evaluation: _Evaluation, loaded: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    settings, folder = evaluation.settings, evaluation.folder
    named = json.dumps(files_of(loaded.folder, "*"))  # names, sizes and times of change of the checkpoint's files
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    results = distributed.from_first(lambda: _base(evaluation, loaded, digest))
    context = model_context(loaded.model)
    left = remaining(settings.evaluator, settings.seed, context, results, settings.overwrite, settings.skipping)
    if left.conflicts:
        raise ConfigurationError(*left.conflicts)
    for line in left.known:
        evaluation.console.stage(line)
    if settings.overwrite and distributed.is_first():
        atomic.remove(folder.scores)
    if distributed.is_first():
        write_inputs(folder.path, fingerprint(replace(settings, evaluator=left.settings)))
    with tracked(settings.tracker, folder.path / "evaluate", config, folder.path.name, "evaluate") as tracker:
        scores = _measured(evaluation, loaded, digest, left.settings)
        tracker.log_scores(scores)
    results, notes = merged(results, scores)
    results |= {"model_notes": [*loaded.notes]} if loaded.notes else {}
    for line in notes:
        logger.warning(line)
    _record(evaluation, results, scores, loaded)
    folder.write_results(results)
    if distributed.is_first():
        _renew_card(folder, results)
        atomic.remove(folder.scores)
        atomic.remove(folder.spent)
    return results


def _renew_card(folder: RunFolder, results: Mapping[str, Any]) -> None:
    """The card of the run's model, with its new scores."""
    command = results.get("command") or (read_status(folder.path) or {}).get("command")
    if "pruner" not in results or not (folder.model / "README.md").is_file():
        return
    revision = read_group(folder.path, "model").get("revision")
    write_card(folder.model, renewed_card(folder.model, results, command or "", revision))


def _measured(evaluation: _Evaluation, loaded: LoadedModel, digest: str, left: Any) -> Scores:
    """The scores that were not known; those of an evaluation that was cut off are taken from it."""
    settings, folder = evaluation.settings, evaluation.folder
    asked = {"dtype": str(loaded.model.dtype)}
    finished = FinishedScores(folder.scores, f"checkpoint {digest}", evaluation.spent.keep, asked)
    skipping = skipping_of(settings.skipping, lambda: tokens_of(settings, loaded))
    console = evaluation.console
    scores = evaluate(loaded, left, settings.offline, settings.seed, console.stage, finished, console.count, skipping)
    if (scores.perplexity or scores.zero_shot) and (folder.path / "metrics.jsonl").is_file():
        folder.log_scores("pruned", scores)
    return scores


def _base(evaluation: _Evaluation, loaded: LoadedModel, digest: str) -> dict[str, Any]:
    """The results that scores join, sparsity counted in the files.

    ConfigurationError: they are those of other files than the checkpoint's."""
    settings, folder = evaluation.settings, evaluation.folder
    evaluation.console.stage("counting the zeros")
    blocks = counted_blocks(loaded.folder)
    results = earlier_results(folder.path)
    if run_and_model(settings.checkpoint)[0] is not None and "blocks" in results and "checkpoint_files" not in results:
        check_same_zeros(folder.path, results["blocks"], blocks)
        return results
    before = results.get("checkpoint_files")
    if results and before != digest:
        if not settings.overwrite:
            raise ConfigurationError(
                f"{folder.path / 'results.json'} holds scores of other files than {settings.checkpoint} has now; "
                "overwrite=true starts again, hydra.run.dir= names another folder"
            )
        logger.warning("the files of %s have changed: its earlier scores are dropped", settings.checkpoint)
        results = {}
    counts = [linear for block in blocks for linear in block["linears"].values()]
    weights = sum(linear["weights"] for linear in counts)
    return results | {
        "model": settings.checkpoint,
        **dequantised(loaded.folder),
        "checkpoint_files": digest,
        "linears": len(counts),
        "measured_sparsity": sum(linear["pruned"] for linear in counts) / weights if weights else 0.0,
        "blocks": blocks,
    }


def counted_blocks(folder: Path) -> list[dict[str, Any]]:
    """[{index, linears: {name: {weights, pruned, sparsity}}}] of the matrices inside the blocks, counted in the
    safetensors files; ConfigurationError where the files cannot be read."""
    facts, problems = inspect_model_folder(folder)
    if facts is None:
        raise ConfigurationError(*problems)
    blocks: dict[int, dict[str, Any]] = {}
    for tensor, (weights, zeros) in count_zeros(folder, facts.linears).items():
        found = BLOCK_AND_LINEAR.search(tensor)
        assert found is not None, tensor
        linear = {"weights": weights, "pruned": zeros, "sparsity": zeros / weights}
        blocks.setdefault(int(found[1]), {})[found[2]] = linear
    return [{"index": index, "linears": linears} for index, linears in sorted(blocks.items())]


def check_same_zeros(run: Path, reported: list[dict[str, Any]], counted: list[dict[str, Any]]) -> None:
    """ConfigurationError: the model is not the one that the run's results.json describes. What is reported has the
    numbers of the dense model, and stands in the order of the saved blocks."""
    by_index = {block["index"]: block["linears"] for block in counted}
    for place, block in enumerate(reported):
        for name, linear in block["linears"].items():
            found = by_index.get(place, {}).get(name)
            padding = found["weights"] - linear["weights"] if found else 0  # of uneven widths
            if found is not None and found["pruned"] - padding != linear["pruned"]:
                raise ConfigurationError(
                    f"{run / 'model'}: block index {place}, {name} holds {found['pruned'] - padding} zeros where "
                    f"results.json says {linear['pruned']}: it is not the model that the run made; name another folder "
                    "with hydra.run.dir="
                )


def _record(evaluation: _Evaluation, results: dict[str, Any], scores: Scores, loaded: LoadedModel) -> None:
    """What was done, where and how: the scores of one results.json may come from several machines."""
    settings = evaluation.settings
    names = [*(name for name, value in scores.perplexity.items() if value is not None), *scores.zero_shot]
    where, seconds = environment(evaluation.device), evaluation.spent.seconds()["total"]
    results.setdefault("environment", where)
    results.setdefault("seconds", {"total": seconds})
    results.setdefault("peak_memory_bytes", evaluation.spent.peak_memory())
    if names:
        entry = {
            "scored": names,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "seconds": seconds,
            "evaluator": asdict(settings.evaluator),
            "environment": where,
        }
        results.setdefault("evaluations", []).append(entry)
    if results["measured_sparsity"] < DENSE:
        compared = compared_with_published(settings.model.published_perplexity, scores)
        if compared:
            results["published"] = results.get("published", {}) | compared
