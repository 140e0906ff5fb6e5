"""`besa report DIR... [--out DIR]`: run folders in; tables, figures and one page out."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic
from besa_exp.report.comparison_formats import latex
from besa_exp.report.page import page, page_data
from besa_exp.report.paper import paper_markdown
from besa_exp.report.read import Report, read_report
from besa_exp.report.summaries import markdown, runs_csv

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
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--out={asked.out}: cannot be made ({error.strerror}); name another folder"
        ) from error
    _write(found, asked.out)
    return 0


def write_page(report: Report, path: Path) -> None:
    atomic.write_text(path, page(page_data(report)))


def _write(report: Report, out: Path) -> None:
    from besa_exp.report.figures import draw

    runs = report.runs
    atomic.write_text(out / "summary.csv", runs_csv(runs))
    atomic.write_text(out / "summary.tex", latex(report.comparisons))
    atomic.write_text(out / "summary.md", markdown(runs, report.cells, paper_markdown(report.tables)))
    write_page(report, out / "report.html")
    figures = draw(report, out)
    done = sum(run.status == "done" for run in runs)
    apart = len({number for cell in report.cells if cell.apart for number in cell.runs})
    counts = [f"{done} finished run{'' if done == 1 else 's'}"]
    counts += [f"{apart} of them not comparable in part"] if apart else []
    missed = sum(bool(run.missed) for run in runs if run.status == "done")
    counts += [f"{missed} of them missed their target by 0.5 points or more"] if missed else []
    counts += [f"{len(runs) - done} not finished"] if done < len(runs) else []
    print(f"{', '.join(counts)} -> {out / 'report.html'}, summary.md, summary.csv, summary.tex, {len(figures)} figures")
