"""README, CONTRIBUTING and docs/: their links lead somewhere, their commands compose, and what they name is there."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny_llama import tiny_llama

import besa_exp
import besa_exp.cli.configuration  # registers the resolvers of conf/
from besa_exp.presets import CONF_DIR, groups

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_THE_READER = ("--config-dir", "pruner=random")  # presets that the reader is shown how to write
COMPOSED = {"prune": "prune", "prefetch": "prune", "evaluate": "evaluate", "tune": "tune"}


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Each `besa ...` line of a code block, and each that stands in a line of text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in fenced(page, "") for line in block.splitlines()]
        lines += re.findall(r"`(besa [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        yield from (line for line in lines if line.startswith("besa "))


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_results_holds_the_records_of_the_study(monkeypatch) -> None:
    study = ROOT / "experiments" / "real_model"
    monkeypatch.syspath_prepend(str(study))
    collect = importlib.import_module("collect")
    sys.modules.pop("collect")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert collect.with_results(text, json.loads((study / "results.json").read_text(encoding="utf-8"))) == text


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def jobs(words: list[str]) -> Iterator[list[str]]:
    """The lines of each job: a sweep's values one by one, the first and the last of each key together."""
    overrides = OverridesParser.create().parse_overrides(words)
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line or ""]
        for override in overrides
    ]
    yield from map(list, product(*([options[0], options[-1]][: len(options)] for options in values)))


@pytest.mark.parametrize("command", sorted({*commands()}))
def test_a_command_of_the_documents_composes(command: str) -> None:
    name, *words = shlex.split(command, comments=True)[1:]
    if name not in COMPOSED or any(part in command for part in OF_THE_READER):
        return
    words = [word for word in words if "=" in word]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for lines in jobs(words):
            compose(COMPOSED[name], lines, return_hydra_config=True)


def test_the_python_of_the_documents_is_python() -> None:
    blocks = [block for page in PAGES for block in fenced(page, "python")]
    assert len(blocks) > 5
    for block in blocks:
        ast.parse(block if not block.startswith('"random":') else "{" + block + "}")


def test_the_tests_that_the_faults_name_are_there() -> None:
    named = set(re.findall(r"`((?:unit/\w+/)?test_\w+\.py)`", (ROOT / "docs/faults.md").read_text(encoding="utf-8")))
    assert len(named) > 5
    folders = {name: ROOT / "tests" / (name if "/" in name else f"end_to_end/{name}") for name in named}
    assert [name for name, file in folders.items() if not file.is_file()] == []


def test_every_key_and_group_has_a_line() -> None:
    text = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    top = re.findall(r"^(\w+):", (CONF_DIR / "prune.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    keys = [key for key in top if key not in ("defaults", "model", "save", "hydra")]
    assert [key for key in [*keys, *groups()] if f"`{key}`" not in text] == []


def test_every_room_has_a_line() -> None:
    rooms = {path.name for path in (ROOT / "besa_exp").iterdir() if path.is_dir()} - {"__pycache__", "conf"}
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [room for room in sorted(rooms) if f"{room}/`" not in text] == []


def test_the_pruner_that_the_documents_work_out_prunes() -> None:
    (source,) = (block for block in fenced(ROOT / "docs/extending.md", "python") if "class Random" in block)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    tokens = torch.randint(0, 258, (4, 16), generator=torch.Generator().manual_seed(1))
    assert besa_exp.prune(tiny_llama(), None, tokens, pruner=names["Random"](seed=1), sparsity=0.25).sparsity == 0.25
