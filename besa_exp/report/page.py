"""One self-contained page: template, style, script, plotly and the data in a single HTML file that fetches nothing.

The data is a JSON element whose `<`, `>` and `&` are escaped, so that no text of a run (a name, an error) can end it or
become markup; the script puts it into the page as text only, and the page's own policy forbids every request.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

PARTS = Path(__file__).with_name("page_parts")
SCRIPTS = ("elements.js", "filters.js", "charts.js", "sections.js", "start.js")  # in the order they need each other
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def page(data: Mapping[str, Any], title: str = "besa report") -> str:
    """The whole HTML. Needs plotly, whose JavaScript becomes part of the page."""
    from plotly.offline import get_plotlyjs

    script = "\n".join(_part(name) for name in SCRIPTS)
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        style=_part("page.css"),
        data=_json_element({key: value for key, value in data.items() if key != "details"}),
        details=_json_element(data.get("details", [])),
        plotly=get_plotlyjs(),
        script=f"(() => {{\n'use strict';\n{script}\n}})();",
    )


def _json_element(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for mark, escape in ESCAPES.items():
        text = text.replace(mark, escape)
    return text


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
