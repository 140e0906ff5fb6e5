"""A run's plan and results as rich tables: sparsity by block and linear type with losses, scores against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from besa_exp.blocks.sparsity_table import block_counts, short_names, type_counts
from besa_exp.display.cost import COST_HEADS, cost_rows
from besa_exp.display.model_card import SPEED_HEADS, score_rows, speed_rows
from besa_exp.display.stages import stage_lines
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.score import Scores, partly_scored, skipped_parts
from besa_exp.settings import CalibrationSettings, RunSettings, SaveSettings
from besa_exp.texts.sources import is_token_file
from besa_exp.texts.token_files import token_file_shape


def plan_table(settings: RunSettings, facts: Mapping[str, Any]) -> Table:
    """Two columns: what is chosen, then `facts`."""
    calibration, evaluator = settings.calibration, settings.evaluator
    scored = [*evaluator.perplexity_sets, *evaluator.tasks, *(["simulated speed"] if evaluator.simulated_speed else [])]
    scored += ["measured speed"] if evaluator.speed else []
    rows = {
        "model": f"{settings.model.name} ({settings.model.path})",
        "pruner": settings.pruner_name + _keys(settings.pruner),
        **({"update": type(settings.update).__name__ + _keys(settings.update)} if settings.update else {}),
        **({"budget": type(settings.budget).__name__ + _keys(settings.budget)} if settings.budget else {}),
        "target": f"sparsity {settings.sparsity:g}, {settings.pattern}",
        "calibration": f"{calibration.path or calibration.name}, {_windows(calibration)}",
        **({"skipping": _said(settings.skipping.asked)} if settings.skipping else {}),
        "scores": (", ".join(scored) or "none") + (", dense too" if evaluator.dense and scored else ""),
        "tracker": settings.tracker.name + (f", {settings.tracker.mode}" if settings.tracker.name != "none" else ""),
        "seed": settings.seed,
        "keeps": _kept(settings.save),
        **facts,
    }
    if settings.is_dense:
        rows = {name: value for name, value in rows.items() if name not in ("target", "calibration", "keeps")}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(str(name)), Text(str(value)))
    return table


def _said(values: Mapping[str, Any]) -> str:
    """`ffn (fraction 0.25, cold_first 1)`."""
    keys = ", ".join(f"{key} {value}" for key, value in values.items() if key != "name")
    return f"{values['name']} ({keys})"


def _keys(part: Any) -> str:
    """The values of a pruner, update or budget in brackets."""
    values = ", ".join(f"{field.name}={getattr(part, field.name)}" for field in fields(part))
    return f" ({values})" if values else ""


def _kept(save: SaveSettings) -> str:
    kept = [name for name, wanted in (("the pruned model", save.model), ("masks", save.masks)) if wanted]
    return (" and ".join(kept) or "results") + (
        "" if save.model else " only (save.model=true keeps the pruned model too)"
    )


def _windows(calibration: CalibrationSettings) -> str:
    """A token file is taken as it is, whatever num_samples and seq_len say."""
    shape = (calibration.num_samples, calibration.seq_len)
    if calibration.path and is_token_file(calibration.path):
        with suppress(ConfigurationError):  # reported where it is read
            shape = token_file_shape(Path(calibration.path).expanduser())
    return f"{' x '.join(map(str, shape))} tokens"


def result_tables(results: Mapping[str, Any], width: int, style: box.Box) -> list[RenderableType]:
    """The tables of a results.json. Where `width` columns do not hold all linear types, the rest has its own table."""
    types = list(type_counts(results["blocks"]))
    tables: list[RenderableType] = []
    for number in range(len(types), 0, -1):  # as many types side by side as fit
        parts = [types[start : start + number] for start in range(0, len(types), number)]
        sparsity = [_sparsity_table(results["blocks"], part, style) for part in parts]
        if number == 1 or all(_width(table) <= width for table in sparsity):
            tables += sparsity
            break
    tables += [Text(f"{what}: {how}") for what, how in stage_lines(results).items()]
    scores = score_rows(results)
    if scores:
        named = "pruned" if "pruner" in results else "score"
        tables.append(_score_table(scores, score_rows(results.get("dense") or {}), style, named))
    if rows := speed_rows(results):
        tables.append(_speed_table(rows, results["simulated_speed"]["model"], style))
    if costs := cost_rows(results):
        tables.append(_cost_table(costs, bool(results.get("dense")), style))
    tables += [Text(f"{name}: {part}") for name, part in skipped_parts(Scores.from_dict(results).scores).items()]
    tables += [
        Text(f"{task}: scored on {part}") for task, part in partly_scored(Scores.from_dict(results).scores).items()
    ]
    tables += [Text(f"n/a {name}: {reason}") for name, reason in sorted((results.get("unavailable") or {}).items())]
    return tables


def as_text(content: RenderableType, width: int) -> str:
    """`content` without colours, `width` columns."""
    file = StringIO()
    Console(file=file, width=width, force_terminal=False, color_system=None, emoji=False).print(content)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _sparsity_table(blocks: Sequence[Mapping[str, Any]], types: Sequence[str], style: box.Box) -> Table:
    """Percent of zeros: a row a block, a column each of `types`, then the whole block and, where known, its losses."""
    with_losses = all("reconstruction_loss" in block for block in blocks)
    table = _table("zeros in %" + (", reconstruction loss before and after" if with_losses else ""), style)
    names = short_names(type_counts(blocks))
    for head in ("block", *(names[kind] for kind in types), "all", *(("before", "after") if with_losses else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for block in blocks:
        counts = type_counts([block])
        cells = [_percent(*counts[kind]) if kind in counts else "" for kind in types]
        losses = [f"{block['reconstruction_loss'][when]:.4g}" for when in ("before", "after") if with_losses]
        table.add_row(str(block["index"]), *cells, _percent(*block_counts(block)), *losses)
    counts = type_counts(blocks)
    weights, pruned = (sum(column) for column in zip(*counts.values(), strict=True))
    table.add_section()
    table.add_row("all", *(_percent(*counts[kind]) for kind in types), _percent(weights, pruned), style="bold")
    return table


def _score_table(
    pruned: Mapping[str, float | None], dense: Mapping[str, float | None], style: box.Box, named: str
) -> Table:
    """Perplexities (lower is better, difference in percent) and task metrics (higher is better, plain difference)."""
    table = _table("scores", style)
    table.add_column("measure", overflow="fold")
    for head in ("dense", named, "difference") if dense else (named,):
        table.add_column(head, justify="right", no_wrap=True)
    for name in dict.fromkeys([*pruned, *dense]):
        after, before = pruned.get(name), dense.get(name)
        compared = [_score(before), _score(after), _difference(name, before, after)] if dense else [_score(after)]
        table.add_row(Text(name), *compared)
    return table


def _speed_table(rows: Sequence[tuple[str, ...]], model: str, style: box.Box) -> Table:
    """SIMULATED cycles and speed-ups by linear type; its title says so."""
    table = _table(f"speed, {model}", style)
    for number, head in enumerate(SPEED_HEADS):
        table.add_column(head, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    return table


def _cost_table(rows: Sequence[tuple[str, str, str]], with_dense: bool, style: box.Box) -> Table:
    table = _table("cost", style)
    for number, head in enumerate(COST_HEADS if with_dense else (COST_HEADS[0], COST_HEADS[-1])):
        table.add_column(head, justify="right" if number else "left")
    for what, dense, own in rows:
        table.add_row(*((what, dense, own) if with_dense else (what, own)))
    return table


def _table(title: str, style: box.Box) -> Table:
    """An empty table, its columns close together except where they have edges."""
    padding = (0, 1) if style is box.MARKDOWN else (0, 1, 0, 0)
    return Table(box=style, title=title, title_justify="left", padding=padding)


def _difference(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f"{(after - before) / before:+.2%}" if name.startswith("perplexity ") else f"{after - before:+.4f}"


def _score(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _percent(weights: int, pruned: int) -> str:
    return f"{100 * pruned / weights:.2f}"


def _width(table: Table) -> int:
    wide = Console(width=10_000, file=StringIO())
    return Measurement.get(wide, wide.options, table).maximum
