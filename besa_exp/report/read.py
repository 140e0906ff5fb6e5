"""All that a report shows, read and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from besa_exp.report.comparability import entries
from besa_exp.report.comparison import Comparison, compare
from besa_exp.report.curves import Curve, read_curve
from besa_exp.report.depth import ErrorAlongDepth, errors_along_depth
from besa_exp.report.folders import find_runs
from besa_exp.report.methods import Method, Style, looks
from besa_exp.report.paper import PaperTable, paper_tables
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.summaries import DENSE, Cell, cells


@dataclass(frozen=True)
class Report:
    """The runs with a curve for each, the cells over seeds, the errors along depth, and the paper's tables."""

    places: Sequence[str]
    runs: Sequence[RunRecord]
    curves: Sequence[Curve]
    cells: Sequence[Cell]
    errors: Sequence[ErrorAlongDepth]
    tables: Sequence[PaperTable]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        return compare(self.runs)

    @cached_property
    def looks(self) -> Mapping[Method, Style]:
        """Of every method that is shown anywhere."""
        return looks({run.method for run in self.runs} | {cell.method for cell in self.cells} | {DENSE})


def read_report(places: Sequence[str]) -> Report:
    """Reads and judges the runs at `places`. ConfigurationError: there are none."""
    folders = find_runs(places)
    runs = [read_run(folder) for folder in folders]
    judged = entries(runs)
    found = cells(runs, judged)
    curves = [read_curve(folder) for folder in folders]
    return Report(places, runs, curves, found, errors_along_depth(runs, judged), paper_tables(runs, found))
