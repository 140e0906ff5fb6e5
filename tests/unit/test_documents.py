"""README, CONTRIBUTING, docs/ and the studies' pages: their links lead somewhere, their commands and those of the
Makefile compose, what they name is there, and the studies' tables are what their records say."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from studies import EXPERIMENTS, collect_of, records_of
from tiny_llama import tiny_llama

import besa_exp
import besa_exp.cli.configuration  # registers the resolvers of conf/
from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import method_name, read_settings
from besa_exp.cli.show import keys_of
from besa_exp.errors import ConfigurationError
from besa_exp.presets import CONF_DIR, groups, listed, presets
from besa_exp.run_folder.folder import WRITTEN

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted(EXPERIMENTS.glob("*/README.md"))
OF_THE_READER = ("--config-dir", "pruner=random")  # presets that the reader is shown how to write
PLACEHOLDERS = {
    r"\bMETHOD\b": "full",
    r"\bLR\b": "1e-3",
    r"<method>": "wanda_then_quantise",
    r"\$\([^)]*\)|\$\w+": "RUN",
}
COMPOSED = {"prune": "prune", "prefetch": "prune", "evaluate": "evaluate", "tune": "tune"}


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Each `besa ...` line of a code block, and each that stands in a line of text; under torchrun too."""
    for page in PAGES + STUDIES:
        lines = [line for block in fenced(page, "") for line in block.splitlines()] + spans(page)
        lines = [re.sub(r"^(torchrun .* -m besa_exp|\.venv/bin/besa) ", "besa ", line) for line in lines]
        yield from (filled(line) for line in lines if line.startswith("besa "))


def filled(command: str) -> str:
    """With a value in place of what a reader fills in."""
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(placeholder, value, command)
    return command


def spans(page: Path) -> list[str]:
    """What stands in backticks within a page's text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def study(monkeypatch) -> tuple[Any, list[dict[str, Any]]]:
    """`collect.py` of the real model's study, and its records."""
    return collect_of("real_model", monkeypatch), records_of("real_model")


def test_the_table_of_results_holds_the_records_of_the_study(study) -> None:
    collect, records = study
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert collect.with_results(text, records) == text


def test_the_figure_of_results_holds_the_records_of_the_study(study) -> None:
    collect, records = study
    drawn = collect.FIGURE.read_text(encoding="utf-8")
    assert collect.figure(records) == drawn, "run python experiments/real_model/collect.py"
    curves = re.findall(r'<path d="M([\d.]+ [-\dL. ]+)" fill="none"', drawn)
    besa = [point.split() for point in curves[3].split("L")]  # the fourth line: wanda, sparsegpt, besa_paper, besa
    assert len(curves) == 6
    at = [48 + (float(x) - 64) / (620 - 64) * 34 for x, _ in besa]  # %: from 48 to 82 across the plot
    read = [20 * 40 ** ((344 - float(y)) / (344 - 46)) for _, y in besa]  # from 20 to 800, a logarithm
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "| `besa` | 3" in line)
    written = [float(cell.split()[0]) for cell in row.split("|")[2:6]]
    assert at == pytest.approx([50, 60, 70, 80], abs=0.05)
    assert read == pytest.approx(written, rel=0.01)


def test_the_tables_of_the_studies_hold_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(study: str) -> str:
        return (EXPERIMENTS / study / "tables.md").read_text(encoding="utf-8")

    best, first, paper, joint, structure = (
        (collect_of(study, monkeypatch), records_of(study))
        for study in ("best", "first_results", "paper", "joint", "structure")
    )
    assert "\n".join(best[0].tables(best[0].Rows(best[1]))) == written("best")
    by_model = {model: [run for run in first[1] if run["model"] == model] for model in first[0].MODELS}
    assert first[0].tables(by_model) == written("first_results")
    assert paper[0].tables.tables(paper[1]) == written("paper")
    assert "\n".join(joint[0].table(joint[1])) in (EXPERIMENTS / "joint" / "README.md").read_text(encoding="utf-8")
    recovery = collect_of("recovery", monkeypatch)
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (EXPERIMENTS / "recovery").glob("study_*.json")]
    tuned = ["\n".join(recovery.study_table(records)) for records in kept]
    assert tuned != []
    for page in ("README.md", "study.md"):
        text = (EXPERIMENTS / "recovery" / page).read_text(encoding="utf-8")
        assert [table for table in tuned if table not in text] == []
    for model in structure[0].MODELS:
        own = structure[0].table([run for run in structure[1] if run["model"] == model])
        assert "\n".join(own) in written("structure")


def test_a_folder_without_runs_takes_no_record_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = collect_of("recovery", monkeypatch)
    monkeypatch.setattr(collect, "HERE", tmp_path)
    (tmp_path / "results.json").write_text('[{"name": "wanda_0.6"}]')
    with pytest.raises(SystemExit, match="no finished run"):
        collect.main(tmp_path / "runs")
    assert "wanda_0.6" in (tmp_path / "results.json").read_text()


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page in PAGES + STUDIES:
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


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_commands_of_the_makefile_are_accepted(tmp_path: Path) -> None:
    targets = ("paper", "best", "budgets", "first-results", "real-study")
    asked = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/installed", *targets, f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=os.environ | {"BESA_SHARED": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [filled(line) for line in re.findall(r"/besa ((?:prune|evaluate) .*?)(?=$| &&| \\)", asked, re.MULTILINE)]
    assert len(lines) > 40
    refused = []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for line in dict.fromkeys(lines):
            command, *words = shlex.split(line)
            composer = Composer(command)
            overrides = composer.parse(words)
            config = composer.compose(composer.spread(overrides, [])[0])
            if config is None or composer.problems:
                refused.append(f"{line}: {composer.problems}")
            elif command == "prune":
                read_settings(config, method_name(config.hydra.runtime.choices))
    assert refused == []


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize(
    ("page", "words"), [("README.md", []), ("docs/runs.md", ["debug=tiny", "evaluator.dense=true"])]
)
def test_the_run_folder_that_a_page_shows_is_the_commands_own(page: str, words: list[str]) -> None:
    shown = set(re.findall(r"outputs/embedded-[\w.-]+", (ROOT / page).read_text(encoding="utf-8")))
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", words, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        assert shown == {config.hydra.run.dir}


def test_every_option_of_a_script_that_the_documents_show_is_there() -> None:
    unknown = []
    for script in EXPERIMENTS.rglob("*.py"):
        source = script.read_text(encoding="utf-8")
        there = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source))
        shown = options(ast.get_docstring(ast.parse(source)) or "")
        for page in [*PAGES, *STUDIES, ROOT / "Makefile"]:
            commands = re.findall(rf"{script.relative_to(EXPERIMENTS)}( [^`\n|;&]*)", page.read_text(encoding="utf-8"))
            if page.parent == script.parent:
                commands += re.findall(rf"`{script.name}( [^`]*)", page.read_text(encoding="utf-8"))
            shown |= options(" ".join(commands))
        unknown += [f"{script.relative_to(ROOT)} {option}" for option in sorted(shown - there)]
    assert unknown == []


def test_every_file_of_a_run_has_a_line() -> None:
    text = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    passing = {"blocks", "recovery", "scores.json", "spent.json", "narrowed"}  # of an unfinished run, or told elsewhere
    names = [name if "." in name else f"{name}/" for name in WRITTEN if name not in passing]
    assert [name for name in (*names, "status.json") if f"`{name}`" not in text] == []


def test_a_preset_that_promises_the_dense_models_scores_has_them() -> None:
    for name, line in listed(["experiment"])["experiment"].items():
        if "before and after" in line:
            with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                assert compose("prune", [f"experiment={name}"]).evaluator.dense is True


def keys() -> set[str]:
    """Every key of every command and preset, dotted, and every group of keys."""
    at_the_top = {
        key.name for command in ("prune", "evaluate", "tune") for key in keys_of(CONF_DIR / f"{command}.yaml")
    }
    whole_runs = ("experiment", "testbed", "debug")  # their keys are those of a run
    found = at_the_top | {
        key.name if group in whole_runs else f"{group}.{key.name}"
        for group in groups()
        for preset in presets(group)
        for key in keys_of(CONF_DIR / group / f"{preset}.yaml")
    }
    return found | {key.rpartition(".")[0] for key in found}


def test_every_key_and_preset_that_the_documents_name_is_there() -> None:
    known, unknown = keys(), []
    for page in PAGES + STUDIES:
        words = [word for text in [*spans(page), *fenced(page, "")] for word in re.split(r"[\s,'\"()]+", text)]
        for word in words:
            name, given, value = word.partition("=")
            group = name.partition(".")[0]
            if group not in (*groups(), "save") or not re.fullmatch(r"\w+(\.[a-z]\w*)*", name):
                continue
            dotted = "." in name and not name.endswith((".py", ".yaml", ".json", ".layers", ".safetensors"))
            chosen = given and "." not in name and re.fullmatch(r"[a-z]\w+", value)
            if (dotted and name not in known) or (chosen and value not in (*presets(group), "random", "none", "null")):
                unknown.append(f"{page.relative_to(ROOT)}: {word}")
    assert unknown == []


def test_every_method_stands_in_the_readme_or_among_those_that_round() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rounding = (ROOT / "docs/quantisation.md").read_text(encoding="utf-8")
    methods = {name for group in ("structure", "budget", "update", "recovery", "skipping") for name in presets(group)}
    assert [name for name in sorted(methods - {"uniform"}) if f"`{name}`" not in text] == []
    pruners = set(presets("pruner")) - {"dense"}
    assert [name for name in sorted(pruners) if f"`{name}`" not in text and f"`{name}`" not in rounding] == []


def test_every_file_and_target_of_make_that_the_documents_name_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    places = [ROOT, ROOT / "besa_exp", ROOT / "besa_exp/methods", ROOT / "tests", ROOT / "tests/end_to_end"]
    missing = []
    for page in PAGES + STUDIES:
        for span in spans(page):
            made = re.match(r"make ([\w-]+)", span)
            file = re.fullmatch(r"[\w.]+/[\w./]+\.py", span)
            elsewhere = span.endswith("random.py") or span in ("large_models/templates.py", "numpy/ma/core.py")
            if made and made[1] not in targets:
                missing.append(f"{page.relative_to(ROOT)}: {span}")
            if file and not elsewhere and not any((place / span).is_file() for place in (*places, page.parent)):
                missing.append(f"{page.relative_to(ROOT)}: {span}")
    assert missing == []


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


def test_every_argument_of_the_python_functions_has_a_word() -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(spans(ROOT / "docs/python.md"))))
    for function in (besa_exp.prune, besa_exp.tune):
        _, *arguments = inspect.signature(function).parameters  # the first is the model
        assert f"## `besa_exp.{function.__name__}`" in text
        assert [name for name in arguments if name not in named] == []


def test_every_room_has_a_line() -> None:
    rooms = {path.name for path in (ROOT / "besa_exp").iterdir() if path.is_dir()} - {"__pycache__", "conf"}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [room for room in sorted(rooms) if f"{room}/`" not in text] == []


def test_the_methods_that_the_documents_work_out_prune_and_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("worked_out")  # where hints are looked up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    for source in fenced(ROOT / "docs/extending.md", "python"):
        if "\nclass " in source:
            exec(source, names)
    with pytest.raises(ConfigurationError, match=r"pruner\.seed=-1: must be in"):
        names["Random"](seed=-1)
    tokens, model = torch.randint(0, 258, (8, 16), generator=torch.Generator().manual_seed(1)), tiny_llama()
    assert besa_exp.prune(tiny_llama(), None, tokens, pruner=names["Random"](seed=1), sparsity=0.25).sparsity == 0.25
    root = replace(besa_exp.preset("pruner", "wanda"), importance=names["Root"](power=2.0))
    by_root, by_wanda = (
        besa_exp.prune(one, None, tokens, pruner=by) for one, by in ((model, root), (tiny_llama(), "wanda"))
    )
    assert by_root.sparsity == by_wanda.sparsity == 0.5
    assert any(not torch.equal(mask, by_wanda.keep_masks[name]) for name, mask in by_root.keep_masks.items())
    asked = {"name": "head", "method": names["Head"](), "steps": 2, "held_out": 2, "lr": 1e-3, "seq_len": 16}
    tuned = replace(besa_exp.preset("recovery", "norms"), **asked)
    assert besa_exp.tune(model, None, tokens, recovery=tuned).steps == 2
