"""What was removed whole and what was tuned afterwards, in a line each, from a results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa_exp.blocks.reports import Narrowed, RecoveryReport, Removed, StructureReport

SAVED_AS = {
    None: "",
    "padded": "; saved with zeros up to the widest block",
    "custom_code": "; saved with a modelling file (trust_remote_code=True)",
}


def stage_lines(results: Mapping[str, Any]) -> dict[str, str]:
    """{what: how} of the stages beside the block loop that the run had; {} where it had none."""
    lines = {}
    if values := results.get("structure"):
        lines["Removed whole"] = _structure(StructureReport.from_dict(values, results["parameters"]))
    if values := results.get("recovery"):
        lines["Recovery"] = _recovery(RecoveryReport.from_dict(values))
    return lines


def _structure(report: StructureReport) -> str:
    """`1 of 4 blocks (index 1), 2 channels in 1 blocks by shortgpt; 880 of 1,000 parameters left (88.0%)`."""
    removed = [str(change.index) for change in report.changes if isinstance(change, Removed)]
    parts = [f"{len(removed)} of {report.num_blocks} blocks (index {', '.join(removed)})"] if removed else []
    narrowed = [change for change in report.changes if isinstance(change, Narrowed)]
    for name, sizes in (
        ("groups of heads", [change.groups for change in narrowed]),
        ("channels", [change.channels for change in narrowed]),
    ):
        if gone := sum(size.dense - size.left for size in sizes):
            parts.append(f"{gone:,} {name} in {sum(size.left < size.dense for size in sizes)} blocks")
    size = report.parameters
    left = f"{size.left:,} of {size.dense:,} parameters left ({size.left / size.dense:.1%})"
    return f"{', '.join(parts) or 'nothing'} by {report.method}; {left}{SAVED_AS[report.saved_as]}"


def _recovery(report: RecoveryReport) -> str:
    """`full, 100 steps of size 0.003 on 4,096 tokens, the weights after step 50 kept; held-out loss 3.5000 before,
    3.2500 after`."""
    size = "" if report.lr is None else f" of size {report.lr:.2g}"
    course = f"{report.steps} steps{size} on {report.tokens:,} tokens, the weights after step {report.best_step} kept"
    loss = f"held-out loss {report.loss_before:.4f} before, {report.loss_after:.4f} after{report.task_said}"
    return f"{report.method}, {course}; {loss}" + (f"; stopped early: {report.stopped}" if report.stopped else "")
