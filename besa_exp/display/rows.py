"""What a results.json says beside its blocks, as lines and cells, which console, card and page show alike: scores, what
was removed whole and tuned, speed, cost, and text samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa_exp.blocks.reports import Narrowed, RecoveryReport, Removed, StructureReport
from besa_exp.evaluation.score import Score, Scores

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads, and cells under them
SAVED_AS = {
    None: "",
    "padded": "; saved with zeros up to the widest block",
    "custom_code": "; saved with a modelling file (trust_remote_code=True)",
}


def scored(results: Mapping[str, Any]) -> dict[str, Score]:
    """Each score under its label, `perplexity <set>` or `<task> <metric>`, in their order."""
    found = Scores.from_dict(results).scores
    return {score.label: score for score in sorted(found, key=lambda score: (score.kind, score.name, score.metric))}


def compared(results: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], str]:
    """The models that a model is shown beside with their parts of results.json, as far as there are some: the dense one
    and, last, the one before it was tuned. And what the model itself is called."""
    others = {name: values for name in ("dense", "before") if (values := results.get(name))}
    return others, "tuned" if "before" in others else "pruned" if "pruner" in results else "model"


def short_label(score: Score, short: Mapping[str, str]) -> str:
    """The label with a set's name as `set_names` has it."""
    return f"perplexity {short[score.name]}{score.under}" if score.kind == "perplexity" else score.label


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
    steps = "1 step" if report.steps == 1 else f"{report.steps:,} steps"
    course = f"{steps}{size} on {report.tokens:,} tokens, the weights after step {report.best_step} kept"
    loss = f"held-out loss {report.loss_before:.4f} before, {report.loss_after:.4f} after{report.task_said}"
    return f"{report.method}, {course}; {loss}" + (f"; stopped early: {report.stopped}" if report.stopped else "")


def speed_table(results: Mapping[str, Any]) -> Rows:
    """The SIMULATED cycles and speed-ups by linear type; no rows where none were asked for."""
    linears = (results.get("simulated_speed") or {}).get("linears", {})
    rows = [
        (
            kind,
            f"{row['sparsity']:.4f}",
            f"{row['dense_cycles']:,.1f}",
            f"{row['sparse_cycles']:,.1f}",
            "n/a" if row["speed_up"] is None else f"{row['speed_up']:.3f}x",
        )
        for kind, row in linears.items()
    ]
    return ("linear", "sparsity", "dense cycles", "simulated cycles", "simulated speed-up"), rows


def cost_table(results: Mapping[str, Any]) -> Rows:
    """What the model costs, beside the dense one's where that is known; no rows where no time was measured and nothing
    is gone whole: zeros cost what weights do. Times are of one machine, which the first line names."""
    cost, heads = results.get("cost") or {}, ("cost", "dense", "model")
    if "device" not in cost and "dense" not in cost:
        return heads, []
    own, dense = _cells(cost), _cells((results.get("dense") or {}).get("cost") or cost.get("dense") or {})
    return heads, [(what, dense.get(what, ""), value) for what, value in own.items()]


def _cells(cost: Mapping[str, Any]) -> dict[str, str]:
    if not cost:
        return {}
    cells = {"device": f"{cost['device']}, {cost['dtype']}, {cost['threads']} threads"} if "device" in cost else {}
    cells |= {
        "parameters": f"{cost['parameters']:,}",
        "MB": f"{cost['bytes'] / 1e6:,.2f}",
        "MFLOPs a token": f"{cost['flops_per_token'] / 1e6:,.2f}",
        "cache bytes a token": f"{cost['cache_bytes_per_token']:,.0f}",
    }
    for kind in ("prefill", "decode"):
        for batch, speed in cost.get(f"{kind}_tokens_per_second", {}).items():
            cells[f"{kind} tokens/s, batch {batch}"] = f"{speed:,.0f}"
    return cells


def text_table(results: Mapping[str, Any]) -> Rows:
    """What the model goes on with after each prompt, beside what it is compared with where that was asked too; no rows
    where there are no samples."""
    own, (others, name) = results.get("texts") or {}, compared(results)
    beside = {head: texts for head, values in others.items() if (texts := values.get("texts")) and texts != own}
    rows = [(prompt, *(texts.get(prompt, "") for texts in beside.values()), text) for prompt, text in own.items()]
    return ("prompt", *beside, name), rows
