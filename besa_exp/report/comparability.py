"""Which scores may stand side by side: those measured on the same tokens or tasks, after the same calibration.

A score's facets are {what: which}: weights, their files and dtype of the model, source and size of the calibration set,
evaluation tokens and window, or task version, shots, questions, context and data. Scores of one model and measure with
equal facets are comparable. The most frequent facets are the reference; every other group stands apart with what
differs.

Calibration tokens are drawn by the seed, so runs of different seeds have different tokens and are compared
nevertheless (that is the spread over seeds); two runs of one seed whose tokens differ are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from besa_exp.report.runs import DATA_FREE, Measure, RunRecord, ScoreRecord

RECONSTRUCTION = Measure("reconstruction", "reconstruction loss")
REASONS = 4  # differences that are spelled out


@dataclass(frozen=True)
class Entry:
    """A score of the run number `run` (of the dense model beside it where `dense`), comparable or not.

    `apart` is why it may not stand beside the others of its model and measure; "" where it may."""

    run: int
    measure: Measure
    value: float
    dense: bool = False
    apart: str = ""


@dataclass(frozen=True)
class _Candidate:
    """An entry with its facets; `any_calibration` where they say nothing of the calibration set."""

    entry: Entry
    facets: tuple[tuple[str, str], ...]
    any_calibration: bool


def entries(runs: Sequence[RunRecord]) -> list[Entry]:
    """Every score of every finished run, and the mean reconstruction loss of its blocks, judged."""
    calibrations, models = _calibrations(runs), _model_facets(runs)
    groups: dict[tuple[str, Measure], list[_Candidate]] = {}
    for number, run in enumerate(runs):
        if run.status != "done":
            continue
        data_free = run.method.pruner in DATA_FREE
        for score, of_dense in [
            *((score, False) for score in _with_losses(run)),
            *((s, True) for s in run.dense_scores),
        ]:
            free = data_free or of_dense
            facets = models[number] | dict(score.facets) | ({} if free else calibrations[number])
            candidate = _Candidate(Entry(number, score.measure, score.value, of_dense), tuple(facets.items()), free)
            groups.setdefault((run.model, score.measure), []).append(candidate)
    return [entry for group in groups.values() for entry in _judged(_once_a_seed(group, runs))]


def _with_losses(run: RunRecord) -> list[ScoreRecord]:
    losses = [block.loss_after for block in run.blocks]
    if not losses or not run.prunes or run.config.get("recovery"):  # none was measured of the weights as they are
        return list(run.scores)
    return [*run.scores, ScoreRecord(RECONSTRUCTION, sum(losses) / len(losses), _loss_facets(run))]


def _loss_facets(run: RunRecord) -> dict[str, str]:
    """What a block's loss is relative to and taken over, as the pruner's settings, or the inner one's, say; an update
    that tunes the kept weights aims at the dense model too."""
    pruner = run.config.get("pruner")
    pruner = pruner if isinstance(pruner, Mapping) else {}
    inner = pruner.get("pruner")
    pruner = inner if isinstance(inner, Mapping) else pruner
    tuned = "reconstruct" in run.method.pruner.split("+")
    return {
        "loss against": "the dense model"
        if pruner.get("dense_targets") or tuned
        else "the dense block on pruned inputs",
        "loss over": _loss_over(pruner),
    }


def _loss_over(pruner: Mapping[str, object]) -> str:
    if pruner.get("scope") == "model" or (pruner.get("model") and "scope" not in pruner):  # the latter is best's
        return "one block, then the whole model"
    return "two blocks" if pruner.get("scope") == "pair" else "one block"


def _judged(group: Sequence[_Candidate]) -> list[Entry]:
    """Those with the most frequent facets, as they are; the others with the difference as the reason."""
    counts = Counter(
        candidate.facets for candidate in group if not candidate.any_calibration and not candidate.entry.apart
    )
    counts = counts or Counter(candidate.facets for candidate in group)
    reference = dict(counts.most_common(1)[0][0])
    judged = []
    for candidate in group:
        entry, own = candidate.entry, dict(candidate.facets)
        expected = {what: which for what, which in reference.items() if what in own or not candidate.any_calibration}
        reasons = [
            f"{what}: {own.get(what, 'none')} (the others: {expected.get(what, 'none')})"
            for what in dict.fromkeys([*expected, *own])
            if own.get(what) != expected.get(what)
        ]
        more = [f"and {len(reasons) - REASONS} more differences"] if len(reasons) > REASONS else []
        judged.append(replace(entry, apart=entry.apart or "; ".join([*reasons[:REASONS], *more])))
    return judged


def _once_a_seed(group: Sequence[_Candidate], runs: Sequence[RunRecord]) -> list[_Candidate]:
    """Of runs with equal facets, method, target and seed the one that finished last counts; the others are named."""
    alike: dict[tuple, list[int]] = {}
    keys = []
    for candidate in group:
        run = runs[candidate.entry.run]
        keys.append((candidate.facets, candidate.entry.dense, run.method, run.target, run.seed))
        alike.setdefault(keys[-1], []).append(candidate.entry.run)
    kept = []
    for key, candidate in zip(keys, group, strict=True):
        newest = max(alike[key], key=lambda number: (runs[number].finished, number))
        reason = "" if newest == candidate.entry.run else f"the same run finished later in {runs[newest].folder}"
        kept.append(replace(candidate, entry=replace(candidate.entry, apart=reason)))
    return kept


def _model_facets(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """For each run which model it is of; the files of its weights are named where runs of one name do not agree about
    them, as checkpoint-1000 of two trainings does not."""
    files: dict[str, Counter] = {}
    for run in runs:
        files.setdefault(run.model, Counter()).update([run.weights_read] if run.weights_read else [])
    found = []
    for run in runs:
        model = run.config.get("model")
        chosen = model if isinstance(model, Mapping) else {}
        facets = {
            "weights in the blocks": f"{run.weights:,}",
            "model revision": str(chosen.get("revision") or "the newest"),
            "dtype": str(run.costs.get("dtype") or chosen.get("dtype", "unknown")),  # auto is one of the others
        }
        if len(counts := files[run.model]) > 1:
            facets["weights' files"] = run.weights_read or counts.most_common(1)[0][0]
        found.append(facets)
    return found


def _calibrations(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """For each run what its calibration set is; tokens are named where runs of one seed do not agree about them."""
    sources = [_calibration_source(run) for run in runs]
    tokens: dict[tuple, Counter] = {}
    for run, source in zip(runs, sources, strict=True):
        tokens.setdefault((run.model, *source.values(), run.seed), Counter())[run.calibration.get("tokens_sha256")] += 1
    found = []
    for run, source in zip(runs, sources, strict=True):
        counts = tokens[(run.model, *source.values(), run.seed)]
        own = run.calibration.get("tokens_sha256")
        usual = counts.most_common(1)[0][0]
        found.append(source | {"calibration tokens": "as drawn by the seed" if own == usual else str(own)[:12]})
    return found


def _calibration_source(run: RunRecord) -> dict[str, str]:
    calibration = run.calibration
    provenance = calibration.get("provenance") or {}
    name = str(provenance.get("file") or calibration.get("name", "unknown"))
    text = str(provenance.get("text_sha256") or "")[:12]
    if run.seed is not None:  # a token file for each seed, as calibration-0.safetensors, is one set
        name = re.sub(rf"(?<!\d){run.seed}(?!\d)(?=[^/]*$)", "<seed>", name)
    size = f"{calibration.get('num_samples')} x {calibration.get('seq_len')} tokens" if calibration else "unknown"
    return {"calibration set": f"{name} {text}".strip(), "calibration size": size}
