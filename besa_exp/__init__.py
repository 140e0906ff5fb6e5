"""BESA: blockwise, differentiable sparsity allocation for pruning large language models (arXiv 2402.16880).

model, tokenizer = besa_exp.load_model("path or hub id")
report = besa_exp.prune(model, tokenizer, texts, pruner="besa", sparsity=0.5)  # in place
besa_exp.tune(model, tokenizer, texts, recovery="full")  # in place; zeros stay
runs = besa_exp.load_runs("outputs/*").to_pandas()  # one row a run

Errors of a request are ConfigurationError, a ValueError that names every problem with its remedy. docs/python.md has a
table of the arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from besa_exp.presets import preset
    from besa_exp.report.loaded import LoadedRun, LoadedRuns, load_run, load_runs
    from besa_exp.runs.api import PruneReport, load_model, prune
    from besa_exp.runs.tune_object import tune

__version__ = "0.1.0"
__all__ = ["LoadedRun", "LoadedRuns", "PruneReport", "load_model", "load_run", "load_runs", "preset", "prune", "tune"]

_PLACES = {  # imported when they are first used: `import besa_exp` itself imports neither torch nor transformers
    "preset": "besa_exp.presets",
    "LoadedRun": "besa_exp.report.loaded",
    "LoadedRuns": "besa_exp.report.loaded",
    "load_run": "besa_exp.report.loaded",
    "load_runs": "besa_exp.report.loaded",
    "PruneReport": "besa_exp.runs.api",
    "load_model": "besa_exp.runs.api",
    "prune": "besa_exp.runs.api",
    "tune": "besa_exp.runs.tune_object",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
