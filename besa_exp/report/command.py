"""`besa report DIR... [--out DIR]`: run folders in; tables, figures and one page out."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic
from besa_exp.report.comparability import entries
from besa_exp.report.comparison import compare
from besa_exp.report.comparison_formats import latex
from besa_exp.report.curves import Curve, read_curve
from besa_exp.report.depth import ErrorAlongDepth, errors_along_depth
from besa_exp.report.folders import find_runs
from besa_exp.report.page_data import page_data
from besa_exp.report.paper import PaperTable, paper_markdown, paper_tables
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.summaries import Cell, cells, markdown, runs_csv

NEEDED = ("matplotlib", "plotly")
DESCRIPTION = """\
Compares run folders: report.html (one page that opens from the disk), summary.md, summary.csv, summary.tex, PNG and
PDF figures."""


def report(arguments: Sequence[str]) -> int:
    """Writes the report and prints where; returns 0. ConfigurationError: no run, nowhere to write, no plotting
    library."""
    parser = argparse.ArgumentParser(prog="besa report", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "places", nargs="+", metavar="DIR", help="a run folder, a folder of them (sweeps, nested), a pattern"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/report"), metavar="DIR", help="default: %(default)s")
    asked = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"besa report needs {' and '.join(missing)}: pip install 'besa-exp[report]'")
    found = read_report(asked.places)
    _write(found, _made(asked.out))
    return 0


@dataclass(frozen=True)
class Report:
    """All that is written, as values."""

    places: Sequence[str]
    runs: Sequence[RunRecord]
    curves: Sequence[Curve]
    cells: Sequence[Cell]
    errors: Sequence[ErrorAlongDepth]
    tables: Sequence[PaperTable]


def read_report(places: Sequence[str]) -> Report:
    """Reads and judges the runs at `places`. ConfigurationError: there are none."""
    folders = find_runs(places)
    runs = [read_run(folder) for folder in folders]
    judged = entries(runs)
    found = cells(runs, judged)
    curves = [read_curve(folder) for folder in folders]
    return Report(places, runs, curves, found, errors_along_depth(runs, judged), paper_tables(runs, found))


def write_page(report: Report, path: Path) -> None:
    """report.html."""
    from besa_exp.report.page import page

    given = (report.places, report.runs, report.curves, report.cells, report.errors, report.tables)
    atomic.write_text(path, page(page_data(*given)))


def _write(report: Report, out: Path) -> None:
    from besa_exp.report.figures import draw

    runs = report.runs
    atomic.write_text(out / "summary.csv", runs_csv(runs))
    comparisons = compare(runs)
    atomic.write_text(out / "summary.tex", latex(comparisons))
    atomic.write_text(out / "summary.md", markdown(runs, report.cells, paper_markdown(report.tables)))
    write_page(report, out / "report.html")
    figures = draw(out, runs, report.curves, report.cells, report.errors, comparisons)
    done = sum(run.status == "done" for run in runs)
    apart = len({number for cell in report.cells if cell.apart for number in cell.runs})
    counts = [f"{done} finished run{'' if done == 1 else 's'}"]
    counts += [f"{apart} of them not comparable in part"] if apart else []
    missed = sum(bool(run.missed) for run in runs if run.status == "done")
    counts += [f"{missed} of them missed their target by 0.5 points or more"] if missed else []
    counts += [f"{len(runs) - done} not finished"] if done < len(runs) else []
    print(f"{', '.join(counts)} -> {out / 'report.html'}, summary.md, summary.csv, summary.tex, {len(figures)} figures")


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out={out}: cannot be made ({error.strerror}); name another folder") from error
    return out
