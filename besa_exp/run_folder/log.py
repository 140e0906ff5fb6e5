"""run.log: what a run said, with times, and the traceback of its failure."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from besa_exp.errors import Interrupted


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Sends the project's log records of level INFO and above, and everybody's warnings, to `path` as well.

    The traceback of an exception that passes through goes to `path` alone: a person is shown one message elsewhere."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setLevel(logging.INFO)
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("besa_exp"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    project, root = logging.getLogger("besa_exp"), logging.getLogger()
    level = project.level
    if not project.isEnabledFor(logging.INFO):
        project.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
        text = str(error) or "Ctrl-C" if interrupted else "".join(traceback.format_exception(error))
        how = "was interrupted" if interrupted else "failed"
        handler.handle(logging.LogRecord("besa_exp", logging.ERROR, __file__, 0, "the run %s\n%s", (how, text), None))
        raise
    finally:
        root.removeHandler(handler)
        project.setLevel(level)
        handler.close()
