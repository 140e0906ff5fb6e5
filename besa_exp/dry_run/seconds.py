"""How long a run takes, by the parts of results.json's `seconds`: measured costs times how often they are paid."""

from __future__ import annotations

from collections.abc import Mapping

from besa_exp.dry_run.block_probe import BlockCost
from besa_exp.dry_run.disk_probe import DiskSpeed
from besa_exp.dry_run.evaluation_probe import EvaluationCost
from besa_exp.dry_run.inputs import Texts
from besa_exp.dry_run.plan import Plan

REPLAYED = 4  # passes of a sample through the model when a run begins: two samples, twice
FILES_OF_A_BLOCK = 3  # weights, masks, report
FILES_OF_A_MODEL = 5  # configs and tokenizer
FRESH_PROCESS = 2.5  # seconds until Python has imported torch and transformers, as measured on two CPU cores


def seconds(
    plan: Plan,
    texts: Texts,
    build: float,
    disk: DiskSpeed,
    block: BlockCost | None,
    evaluation: EvaluationCost | None,
    models_scored: int,
    search: float = 0.0,
) -> dict[str, float | None]:
    """Seconds by part, with one block's, and the total where all are known; None: not estimated. `build`: of the model
    without weights. `models_scored`: how many models are evaluated. `search`: of the budget's, once a run."""
    load = build + (plan.size.outside_bytes if plan.streamed else plan.size.total_bytes) * disk.read
    a_block = _block_seconds(plan, disk, block) if block else None
    begin = search + _budget_seconds(plan, disk, block) + _replay_seconds(plan, block) if block else 0.0
    pruning = None if a_block is None else a_block * plan.num_blocks + begin
    evaluated = _evaluate_seconds(plan, texts, disk, evaluation, models_scored)
    save = _save_seconds(plan, disk, load) + _verify_seconds(plan, disk, (evaluated or 0.0) / max(models_scored, 1))
    found: dict[str, float | None] = {
        "load": load,
        "calibrate": texts.calibrate,
        "prune": pruning,
        "save": save,
        "evaluate": evaluated,
    }
    known = [value for value in found.values() if value is not None]
    return {**found, "one block": a_block, "total": sum(known) if len(known) == len(found) else None}


def scored_only(found: Mapping[str, float | None]) -> dict[str, float | None]:
    """Of a dense model, which is loaded and scored."""
    parts = {"load": found["load"], "evaluate": found["evaluate"]}
    known = [value for value in parts.values() if value is not None]
    return {**parts, "total": sum(known) if len(known) == len(parts) else None}


def _block_seconds(plan: Plan, disk: DiskSpeed, block: BlockCost) -> float:
    """Pruning, and what makes it last: two hashes of the weights, three files; a streamed block is read first."""
    weights, masks = plan.size.blocks_bytes // plan.num_blocks, plan.size.masks // plan.num_blocks
    keep = disk.written(weights + masks, FILES_OF_A_BLOCK) + (2 * weights + masks) * disk.hash
    return block.seconds + keep + (weights * disk.read if plan.streamed else 0.0)


def _replay_seconds(plan: Plan, block: BlockCost) -> float:
    """The check at the start, through all blocks, or the first one where they are streamed."""
    return REPLAYED * block.forward_seconds * (1 if plan.streamed else plan.num_blocks)


def _budget_seconds(plan: Plan, disk: DiskSpeed, block: BlockCost) -> float:
    """Of a budget over depth: its passes, what it does besides with each block, and the blocks read for it."""
    if plan.dealing is None:
        return 0.0
    read = plan.dealing.reads * plan.size.blocks_bytes * disk.read if plan.streamed else 0.0
    return plan.dealing.passes * block.forward_seconds + plan.num_blocks * block.budget_seconds + read


def _save_seconds(plan: Plan, disk: DiskSpeed, load: float) -> float:
    """Masks in one file; the model written, its zeros counted, and loaded anew."""
    masks = disk.written(plan.size.masks) + plan.size.masks * disk.read if plan.save_masks else 0.0
    if not plan.save_model:
        return masks
    return masks + disk.written(plan.saved_anew, FILES_OF_A_MODEL) + 2 * plan.size.blocks_bytes * disk.read + load


def _verify_seconds(plan: Plan, disk: DiskSpeed, scoring: float) -> float:
    """What is waited for the fresh process that loads the saved model when scoring it has ended."""
    return max(0.0, FRESH_PROCESS + plan.size.total_bytes * disk.read - scoring) if plan.verified else 0.0


def _evaluate_seconds(
    plan: Plan, texts: Texts, disk: DiskSpeed, evaluation: EvaluationCost | None, models: int
) -> float | None:
    if not plan.evaluates:
        return 0.0
    if evaluation is None or texts.read is None:
        return None
    asked = sum(count * length for count, length in texts.requests)
    scored = sum(count * length for count, length in texts.windows)
    found = texts.read + (scored + asked) * (evaluation.in_block * plan.num_blocks + evaluation.outside)
    if plan.streamed:  # the blocks are read once a set, and once a batch of questions
        found += plan.size.blocks_bytes * disk.read * (len(texts.windows) + asked / evaluation.tokens)
    return models * found
