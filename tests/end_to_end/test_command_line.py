"""What the command line answers when all is well: runs, flags of Hydra, presets of one's own, completion. End to end
because Hydra answers some of it and Hydra is entered by the command alone."""

from __future__ import annotations

import logging
import pstats
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from besa_exp.cli.main import main

OWN_PRESET = "# A preset of one's own\n_target_: besa_exp.settings.ModelSettings\npath: /models/mine\n"


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Hydra's --info gives the root logger a handler of its own, which a program that ends does not mind."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_resolved_configuration_is_shown_readable_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--cfg", "job", "--resolve", "seed=3", "pruner=wanda"]) == 0
    shown = capsys.readouterr().out
    assert "${" not in shown
    values = yaml.safe_load(shown)
    assert "hydra" not in values
    assert (values["seed"], values["calibration"]["seed"]) == (3, 3)
    assert values["pruner"]["_target_"] == "besa_exp.methods.pruners.uniform.Uniform"


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("flags", [["--info", "defaults"], ["--info", "searchpath"], ["--cfg", "hydra"]])
def test_flags_of_hydra_are_answered_by_hydra(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *flags]) == 0
    assert "hydra" in capsys.readouterr().out


def test_help_lists_every_group_and_key_after_what_prefetch_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["prefetch", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("besa prefetch [key=value ...]. Downloads what a run")
    assert "besa prune [key=value ...]" in shown
    assert "pruner: besa, " in shown
    assert "num_samples:" in shown
    assert "\n  epochs: 1  # passes over the calibration set\n" in shown
    assert "\nsparsity: 0.5  # fraction of zeros asked of the linears" in shown
    assert "\ndeterministic: true  # only algorithms that" in shown  # as all commands have it
    assert "\n    steps: 56  # steps of the search\n" in shown
    assert "_target_" not in shown
    assert "--multirun" in shown


def test_presets_of_ones_own_come_with_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(OWN_PRESET)
    assert main(["prune", "--config-dir", str(tmp_path), "--cfg", "job", "model=mine"]) == 0
    assert "path: /models/mine" in capsys.readouterr().out
    assert main(["prune", "--config-dir", str(tmp_path), "model=mime"]) == 2
    assert "did you mean mine?" in capsys.readouterr().err
    assert main(["prune", "--config-dir", str(tmp_path), "model=mine"]) == 2
    assert "model.path=/models/mine: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("besa pru", "prune"),
        ("besa list pr", ""),
        ("besa comp", "compare"),
        ("besa show pruner=besa_p", "pruner=besa_paper"),
        ("besa prune pruner=besa_p", "pruner=besa_paper"),
        ("besa prune pruner=wanda calibration.num", "calibration.num_samples="),
        ("besa prune experiment=paper_llama", "experiment=paper_llama2_7b_50"),
    ],
)
def test_the_shell_completes_commands_presets_and_keys(
    line: str, offered: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.strip() == offered


def test_the_completion_script_is_for_the_besa_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion besa")


def test_an_experiment_can_be_a_sweep_of_its_own(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["experiment=semi_structured", "pruner=magnitude,wanda", "pattern=2:4", "dry_run=true"]
    assert main(["prune", *given, *asked]) == 0
    jobs = [line for line in capsys.readouterr().out.splitlines() if "outputs/" in line]
    assert [line.split("-")[1] for line in jobs] == ["magnitude", "wanda"]


def test_the_profile_preset_tells_where_the_time_went(given: list[str]) -> None:
    assert main(["prune", *given, "debug=profile"]) == 0
    (folder,) = Path("outputs").iterdir()
    assert "Ordered by: cumulative time" in (folder / "profile.txt").read_text()
    timed = pstats.Stats(str(folder / "profile.pstats")).get_stats_profile().func_profiles
    assert "prune_blocks" in timed


class Noted(Callback):
    """A user's callback of Hydra: the events, and the sparsity that each was told."""

    seen: ClassVar[list[tuple[str, float]]] = []

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self.seen.append(("run starts", config.sparsity))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        self.seen.append(("job starts", config.sparsity))

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        self.seen.append(("job ends", config.sparsity))

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        self.seen.append(("run ends", config.sparsity))


def test_callbacks_of_hydra_hear_of_a_run_whose_configuration_is_composed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = []
    load = ConfigLoaderImpl.load_configuration

    def noted(self: ConfigLoaderImpl, *given: Any, **named: Any) -> DictConfig:
        composed.append(given)
        return load(self, *given, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", noted)
    monkeypatch.setattr(Noted, "seen", [])
    own = f"+hydra.callbacks.noted._target_={Noted.__module__}.Noted"
    words = ["pruner=magnitude", "sparsity=0.25", "evaluator=none", "tracker=none", "save.model=false", own]
    words += ["calibration.num_samples=2", "calibration.seq_len=16"]
    assert main(["prune", *words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert Noted.seen == [(event, 0.25) for event in ("run starts", "job starts", "job ends", "run ends")]
    assert len(composed) == 1
