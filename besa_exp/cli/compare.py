"""`besa compare DIR...`: finished runs as one sorted table, in the terminal, as LaTeX or as CSV. No torch, no Hydra."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from besa_exp.display.terminal import console_of, counted
from besa_exp.errors import ConfigurationError
from besa_exp.report.comparison import BY, Comparison, compare
from besa_exp.report.comparison_formats import csv_of, latex, terminal_table
from besa_exp.report.folders import find_runs
from besa_exp.report.runs import RunRecord, read_run

DESCRIPTION = """\
Compares finished runs: a row for each method and target, with scores over seeds, what was lost against the dense model,
and the time to prune. For charts and single runs: besa report."""
PLAIN_WIDTH = 160  # columns where no terminal sets them


def comparison(arguments: Sequence[str]) -> int:
    """Prints the table; 0. ConfigurationError: there is no finished run."""
    parser = argparse.ArgumentParser(prog="besa compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("places", nargs="*", default=["outputs"], metavar="DIR", help="run folders, sweeps, patterns")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--latex", action="store_true", help="a booktabs table: best bold, second underlined")
    form.add_argument("--csv", action="store_true", help="every score with its spread, one row a method and target")
    by = f"{', '.join(BY)} or a score's name (default: score within each target)"
    parser.add_argument("--sort", default="score", metavar="KEY", help=by)
    asked = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in find_runs(asked.places)]
    found = compare(runs, asked.sort)
    if not found:
        states = ", ".join(sorted({run.status for run in runs}))
        raise ConfigurationError(f"{' '.join(asked.places)}: no finished run with scores ({states}); see besa status")
    labels = [measure.label for one in found for measure in one.measures]
    if asked.sort not in (*BY, *labels):
        raise ConfigurationError(f"--sort={asked.sort}: must be one of {', '.join([*BY, *dict.fromkeys(labels)])}")
    if asked.latex or asked.csv:
        print((latex if asked.latex else csv_of)(found), end="")
        return 0
    console = console_of(PLAIN_WIDTH)
    for part in tables(runs, found, console.width):
        console.print(part, soft_wrap=isinstance(part, Text))
    return 0


def tables(runs: Sequence[RunRecord], found: Sequence[Comparison], width: int) -> list[RenderableType]:
    """A table a model, and a line about runs that are not finished."""
    parts: list[RenderableType] = []
    for one in found:
        parts += [terminal_table(one, width), Text("")]
    unfinished = [run for run in runs if run.status != "done"]
    if not unfinished:
        return parts[:-1]
    parents = sorted({str(run.path.parent) for run in unfinished})
    places = parents if len(parents) <= 3 else [os.path.commonpath(parents) or "."]
    command = f"besa status {shlex.join(places)}"
    states = counted(sorted(run.status for run in unfinished))
    return [*parts, Text(f"not in the table: {states} ({command})", style="yellow")]
