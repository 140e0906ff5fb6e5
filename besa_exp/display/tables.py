"""A run's plan and results as rich tables: sparsity by block and linear type with losses, scores against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from besa_exp import __version__
from besa_exp.blocks.sparsity_table import block_counts, short_names, type_counts
from besa_exp.display.rows import compared, cost_table, scored, short_label, speed_table, stage_lines, text_table
from besa_exp.display.terminal import colour_of_loss
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.score import Score, partly_scored, set_names, skipped_parts
from besa_exp.settings import CalibrationSettings, RunSettings, SaveSettings
from besa_exp.texts.sources import GIVEN, is_token_file
from besa_exp.texts.token_files import token_file_shape


def plan_table(settings: RunSettings, facts: Mapping[str, Any]) -> Table:
    """Two columns: what is chosen, then `facts`."""
    calibration, evaluator = settings.calibration, settings.evaluator
    scored = [*evaluator.perplexity_sets, *evaluator.tasks, *(["simulated speed"] if evaluator.simulated_speed else [])]
    scored += ["measured speed"] if evaluator.speed else []
    rows = {
        "model": f"{settings.model.name} ({settings.model.path})",
        **({"structure": type(settings.structure).__name__ + _keys(settings.structure)} if settings.structure else {}),
        "pruner": settings.pruner_name + _keys(settings.pruner),
        **({"update": type(settings.update).__name__ + _keys(settings.update)} if settings.update else {}),
        **({"budget": type(settings.budget).__name__ + _keys(settings.budget)} if settings.budget else {}),
        **({"recovery": _said(asdict(settings.recovery))} if settings.recovery else {}),
        "target": f"sparsity {settings.sparsity:g}, {settings.pattern}",
        **({"kept dense": ", ".join(settings.ignore)} if settings.ignore else {}),
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
    elif settings.keeps_weights:
        rows.pop("target")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(str(name)), Text(str(value)))
    return table


def _said(values: Mapping[str, Any]) -> str:
    """`ffn (fraction 0.25, cold_first 1)`."""
    keys = ", ".join(f"{key} {value}" for key, value in values.items() if key != "name" and value is not None)
    return f"{values['name']} ({keys})"


def _keys(part: Any) -> str:
    """The values of a method's part in brackets."""
    values = ", ".join(f"{field.name}={getattr(part, field.name)}" for field in fields(part))
    return f" ({values})" if values else ""


def _kept(save: SaveSettings) -> str:
    kept = [name for name, wanted in (("the pruned model", save.model), ("masks", save.masks)) if wanted]
    return (" and ".join(kept) or "results") + (
        "" if save.model else " only (save.model=true keeps the pruned model too)"
    )


def _windows(calibration: CalibrationSettings) -> str:
    """Tokens are taken as they are, whatever num_samples and seq_len say."""
    if calibration.name == GIVEN[1]:
        return "as they are"
    shape = (calibration.num_samples, calibration.seq_len)
    if calibration.path and is_token_file(calibration.path):
        with suppress(ConfigurationError):  # reported where it is read
            shape = token_file_shape(Path(calibration.path).expanduser())
    return f"{' x '.join(map(str, shape))} tokens"


def outline(settings: RunSettings) -> tuple[str, str]:
    """Two lines before anything is loaded: model, amount, seed; then method, calibration, scores."""
    evaluator, amount = settings.evaluator, f"{100 * settings.sparsity:g} % {settings.pattern}"
    amount += f" but for {', '.join(settings.ignore)}" if settings.ignore else ""
    first = [
        "besa " + __version__,
        settings.model.name,
        *([] if settings.is_dense else [amount]),
        f"seed {settings.seed}",
    ]
    scored = ["perplexity on " + ", ".join(Path(name).name for name in evaluator.perplexity_sets)]
    scored = (scored if evaluator.perplexity_sets else []) + [*evaluator.tasks]
    limit = f" ({evaluator.limit} questions each)" if evaluator.limit and evaluator.tasks else ""
    second = [f"pruner {settings.pruner_name}"]
    if not settings.is_dense:
        calibration = settings.calibration
        second.append(f"calibration {Path(calibration.path or calibration.name).name} {_windows(calibration)}")
    second.append(
        "scores " + (", ".join(scored) or "none") + limit + (", dense too" if evaluator.dense and scored else "")
    )
    return " · ".join(first), " · ".join(second)


def sparsity_tables(results: Mapping[str, Any], width: int, style: box.Box) -> list[RenderableType]:
    """Zeros by block and linear type. Where `width` columns do not hold all types, the rest has its own table."""
    types = list(type_counts(results["blocks"]))
    for number in range(len(types), 0, -1):  # as many types side by side as fit
        parts = [types[start : start + number] for start in range(0, len(types), number)]
        tables = [_sparsity_table(results["blocks"], part, style) for part in parts]
        if number == 1 or all(_width(table) <= width for table in tables):
            return [*tables]
    return []


def result_tables(results: Mapping[str, Any], style: box.Box) -> list[RenderableType]:
    """Scores beside the dense ones, simulated speed, and what is not available."""
    tables: list[RenderableType] = [Text(f"{what}: {how}") for what, how in stage_lines(results).items()]
    tables += [_score_table(results, style)] if scored(results) else []
    head, rows = speed_table(results)
    tables += [_rows_table(f"speed, {results['simulated_speed']['model']}", head, rows, style)] if rows else []
    head, costs = cost_table(results)
    if costs:
        beside = any(dense for _, dense, _ in costs)
        head, *costs = [row if beside else (row[0], row[-1]) for row in (head, *costs)]
        tables.append(_rows_table("cost", head, costs, style))
    head, samples = text_table(results)
    tables += [_text_table(head, samples, style)] if samples else []
    tables += [Text(f"{name}: {part}") for name, part in skipped_parts(scored(results).values()).items()]
    tables += [Text(f"n/a {name}: {reason}") for name, reason in sorted((results.get("unavailable") or {}).items())]
    return tables


def as_text(content: RenderableType, width: int) -> str:
    """`content` without colours, `width` columns."""
    file = StringIO()
    Console(file=file, width=width, force_terminal=False, color_system=None, emoji=False).print(content)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _sparsity_table(blocks: Sequence[Mapping[str, Any]], types: Sequence[str], style: box.Box) -> Table:
    """Percent of zeros: a row a block, under its index from 0 as in tensor names, a column each of `types`, then the
    whole block and, where known, its reconstruction loss; that of the starting mask too, where a method betters it."""
    heads = _loss_heads(blocks)
    table = _table("zeros in %" + (", reconstruction loss" if heads else "") + ", by block index (from 0)", style)
    names = short_names(type_counts(blocks))
    for head in ("index", *(names[kind] for kind in types), "all", *heads):
        table.add_column(head, justify="right", no_wrap=True)
    for block in blocks:
        counts = type_counts([block])
        cells = [_percent(*counts[kind]) if kind in counts else "" for kind in types]
        losses = [f"{block['reconstruction_loss'][when]:.4g}" for when in heads.values()]
        table.add_row(str(block["index"]), *cells, _percent(*block_counts(block)), *losses)
    counts = type_counts(blocks)
    weights, pruned = (sum(column) for column in zip(*counts.values(), strict=True))
    table.add_section()
    table.add_row("all", *(_percent(*counts[kind]) for kind in types), _percent(weights, pruned), style="bold")
    return table


def _loss_heads(blocks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Column to its key in results.json."""
    losses = [block.get("reconstruction_loss") for block in blocks]
    if not all(loss and loss["after"] is not None for loss in losses):
        return {}
    betters = any(loss["before"] != loss["after"] for loss in losses if loss)
    return ({"start": "before"} if betters else {}) | {"loss": "after"}


def _score_table(results: Mapping[str, Any], style: box.Box) -> Table:
    """Scores beside those of what the model is compared with, with standard error, questions and direction. The change
    is to the nearest of these, of perplexities in percent, of tasks plain; its colour says how much was lost."""
    after, (others, named) = scored(results), compared(results)
    beside = {head: found for head, values in others.items() if (found := scored(values))}
    counted = _counted(after)
    table = _table("", style)
    table.add_column("measure", overflow="fold")
    for head in (*beside, named, *(["change"] if beside else []), *(["scored on"] if counted else [])):
        table.add_column(head, justify="right", no_wrap=True)
    scores = {label: score for found in (*beside.values(), after) for label, score in found.items()}
    short = set_names([score for found in (after, *beside.values()) for score in found.values()])
    for label in dict.fromkeys([*after, *scores]):
        score, own = scores[label], after.get(label)
        cells: list[str | Text] = [_shown(found.get(label)) for found in (*beside.values(), after)]
        if beside:
            cells.append(_difference([*beside.values()][-1].get(label), own))
        cells += [counted.get(label, "")] if counted else []
        table.add_row(Text(f"{short_label(score, short)} {'↑' if score.rises else '↓'}"), *cells)
    return table


def _shown(score: Score | None) -> str:
    return score.shown if score else "n/a"


def _counted(scores: Mapping[str, Score]) -> dict[str, str]:
    """{label: `8 of 1,838 questions`}: of each task, and of the sets of which windows were left out."""
    partly, found = partly_scored(scores.values()), {}
    for label, score in scores.items():
        whole = f"{score.n:,} questions" if score.n and score.kind == "zero_shot" else ""
        if told := partly.get(score.name, whole):
            found[label] = told
    return found


def _rows_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], style: box.Box) -> Table:
    table = _table(title, style)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _text_table(head: Sequence[str], rows: Sequence[tuple[str, ...]], style: box.Box) -> Table:
    table = _table("", style)
    for name in head:
        table.add_column(name, overflow="fold", ratio=1 if name == head[0] else 2)
    for row in rows:
        table.add_row(*(Text(" ".join(cell.split())) for cell in row))
    return table


def _table(title: str, style: box.Box) -> Table:
    """An empty table, its columns close together except where they have edges."""
    padding = (0, 1) if style is box.MARKDOWN else (0, 1, 0, 0)
    return Table(box=style, title=title or None, title_justify="left", padding=padding)


def _difference(before: Score | None, after: Score | None) -> Text:
    if before is None or after is None or before.value is None or after.value is None:
        return Text("")
    change = after.value - before.value
    if after.kind == "perplexity":
        return Text(f"{change / before.value:+.2%}", style=colour_of_loss(change / before.value))
    return Text(f"{change:+.4f}", style=colour_of_loss(-change if after.rises else change, accuracy=True))


def _percent(weights: int, pruned: int) -> str:
    return f"{100 * pruned / weights:.2f}" if weights else "dense"


def _width(table: Table) -> int:
    wide = Console(width=10_000, file=StringIO())
    return Measurement.get(wide, wide.options, table).maximum
