"""What is wrong with a method of one's own is told before any long work, with the preset's key and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from besa_exp.cli.main import main

MODULE = """
from dataclasses import dataclass
from besa_exp.blocks.pruner import Traits

@dataclass(frozen=True)
class Mine:
    seed: int = 0
    traits = Traits()
    def check(self, sparsity, pattern): return None
    def prune_block(self, task): ...

@dataclass(frozen=True)
class Half:
    seed: int = 0
    traits = Traits()

@dataclass(frozen=True)
class Odd:
    seed: int = 0
    def __post_init__(self): raise TypeError("an odd seed")

@dataclass(frozen=True)
class Numbered(Mine):
    def check(self, sparsity, pattern): return [3]

@dataclass(frozen=True)
class Traitless(Numbered):
    traits = None
    def check(self, sparsity, pattern): return []

@dataclass(frozen=True)
class Named(Traitless):
    traits = Traits("InputNorm")

@dataclass
class Counting:
    seed: int = 0
    traits = Traits()
    def check(self, sparsity, pattern): return []
    def prune_block(self, task): ...

@dataclass(frozen=True)
class Untyped:
    seed: "Nowhere" = 0
"""
OF_MINE = "_target_: a_method_of_mine."
WRONG = {
    "seed: 0": "pruner: its preset lacks _target_",
    f"{OF_MINE}Half": "pruner=Half: a pruner has check, prune_block, traits; see docs/extending.md",
    f"{OF_MINE}Mine": "pruner=Mine: its check gives None; it gives a list of sentences",
    f"{OF_MINE}Numbered": "pruner=Numbered: its check gives [3]; it gives a list of sentences",
    f"{OF_MINE}Traitless": "pruner=Traitless: its traits are None; give traits = Traits(...) of besa_exp.blocks.pruner",
    f"{OF_MINE}Named": "pruner=Named: its traits ask for 'InputNorm'; a statistic is a class, such as besa_exp",
    f"{OF_MINE}Counting": "pruner=Counting: is a dataclass that can change; write @dataclass(frozen=True)",
    f"{OF_MINE}Odd": "pruner: Odd cannot be made (TypeError: an odd seed)",
    f"{OF_MINE}Untyped": "pruner._target_=a_method_of_mine.Untyped: its fields' types cannot be read (name 'Nowhere'",
    f"{OF_MINE}Mine\nseed: ${{sed}}": "pruner.seed: Interpolation key 'sed' not found",
    f"{OF_MINE}Mine\nseed: 1: 2": "mapping values are not allowed in this context; in ",
    f"{OF_MINE}Mine\nseed: []": "pruner.seed=[]: must be a whole number",
}


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets, and their module beside it."""
    (tmp_path / "presets" / "pruner").mkdir(parents=True)
    (tmp_path / "a_method_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "presets"


@pytest.mark.parametrize("text", WRONG)
def test_a_preset_that_is_no_pruner_is_refused_with_the_reason(
    text: str, presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (presets / "pruner" / "mine.yaml").write_text(text)
    assert main(["prune", "--config-dir", "presets", "pruner=mine"]) == 2
    (problem,) = capsys.readouterr().err.splitlines()[1:]
    assert problem.startswith(f"  - {WRONG[text]}")


def test_a_preset_that_has_the_name_of_one_of_ours_is_not_passed_over(
    presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (presets / "pruner" / "wanda.yaml").write_text(f"{OF_MINE}Mine")
    assert main(["prune", "--config-dir", "presets", "pruner=wanda"]) == 2
    assert "presets/pruner/wanda.yaml: is not read, as the package has a preset" in capsys.readouterr().err
    assert main(["prune", "--config-dir", "presets", "pruner=wanda", "--cfg", "job"]) == 2
    assert main(["prune", "--config-dir", "presets", "pruner=magnitude", "--cfg", "job"]) == 0


def test_a_configuration_that_is_not_there_is_refused_with_the_remedy(
    presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "--config-dir", "presets", "--config-name", "mine"]) == 2
    assert "--config-name=mine: there is no such file; leave it out" in " ".join(capsys.readouterr().err.split())


def test_a_class_on_the_command_line_is_refused_as_runs_are_told_apart_by_presets(
    presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "pruner=wanda", "pruner._target_=a_method_of_mine.Mine"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 problem, nothing was done - pruner._target_=a_method_of_mine.Mine: a preset names its class;" in said
