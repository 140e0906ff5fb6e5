"""A text key's value is the text that was typed."""

from __future__ import annotations

import argparse

import pytest
from hydra import initialize_config_dir

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import Unreadable, read_settings
from besa_exp.cli.main import main
from besa_exp.cli.prune import composed
from besa_exp.cli.request import read_request
from besa_exp.cli.text_keys import list_keys, text_keys, with_text_quoted
from besa_exp.errors import ConfigurationError, quoted
from besa_exp.presets import CONF_DIR
from besa_exp.settings import RunSettings


def read(*lines: str) -> RunSettings:
    def settings(parsed: argparse.Namespace) -> RunSettings:
        config = Composer("prune").compose(parsed.overrides)
        assert config is not None
        return read_settings(config, "besa", with_pruner=False)

    return composed("besa prune", "prune", lines, settings)


@pytest.mark.parametrize(
    "value", ["2024_05_01", "1e5", "0012345", "12e4567", "1_000.5", "true", "NaN", "-.5", "7b", "a:b"]
)
def test_a_text_arrives_as_it_was_typed(value: str) -> None:
    settings = read("model=local", f"model.path={value}", f"model.revision={value}", f"tracker.tags=[{value},x]")
    assert (settings.model.path, settings.model.revision) == (value, value)
    assert settings.tracker.tags == (value, "x")


def test_nothing_stays_nothing_and_numbers_and_what_is_quoted_are_left_alone() -> None:
    for line in ("model.revision=null", "sparsity=0.5", "seed=1,2", "model.path='1'", "model=7b", "pattern=2:4", "-m"):
        assert with_text_quoted(line) == line
    assert with_text_quoted("+model.path=1_0,1_1") == "+model.path='1_0','1_1'"
    assert with_text_quoted("hydra.run.dir=2024_05_01") == "hydra.run.dir='2024_05_01'"


def test_the_keys_are_those_of_the_settings() -> None:
    assert {"model.path", "checkpoint", "save.push_to_hub", "evaluator.data_dir", "evaluator.tasks"} <= text_keys()
    assert not {"sparsity", "model.load", "evaluator.batch_size", "seed"} & text_keys()
    of_evaluator = {f"evaluator.{name}" for name in ("tasks", "perplexity_sets", "prompts")}
    assert {*of_evaluator, "tracker.tags", "recovery.kinds", "ignore"} == list_keys()


def test_a_number_that_a_preset_gives_for_a_text_is_refused_with_the_quotes_it_needs() -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = Composer("prune").compose(["model=local"])
        assert config is not None
        config.model.path = 20240501
        with pytest.raises(Unreadable) as refusal:
            read_settings(config, "besa", with_pruner=False)
    assert refusal.value.by_key["model.path"].endswith("write it in quotes: path: '20240501'")


@pytest.mark.parametrize("value", ["a=b", "a#b", "größe", "it's", 'the "b"', "a b", "a,b", "[a", "a&b", "~/a"])
def test_the_hint_for_a_value_that_cannot_be_read_is_an_argument_that_can_be(value: str) -> None:
    import shlex

    (argument,) = shlex.split(quoted("model.path", value))
    assert read("model=local", argument).model.path == value


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.path=a=b", "= in a value stands in quotes"),
        ("model.path=o [1]", "model.path=o [1]: [ in a value stands in quotes"),
        ("model.path=a#b", "# in a value"),
        ("model.path=größe", "ö in a value"),
        ("model.path=~/models/mine", "~ in a value stands in quotes"),
        ("model.path=it's", "a quote in a value"),
        ("model.path=a, b=c", "= in a value"),
    ],
)
def test_the_character_that_cannot_be_read_is_named(line: str, told: str) -> None:
    key, _, value = line.partition("=")
    (problem,) = refused(line)
    assert told in problem
    assert problem.endswith(quoted(key, value))


def refused(*lines: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as refusal:
        composed("besa prune", "prune", lines, lambda parsed: len(read_request(parsed).jobs))
    return refusal.value.problems


CASES = {
    ("model.path=a,b",): "the comma makes it several values; add -m to run them all; where it is part of one value, "
    "that stands in quotes: 'model.path=\"a,b\"'",
    ("evaluator.perplexity_sets=a,b",): "a list stands in brackets: 'evaluator.perplexity_sets=[a,b]'",
    ("seed=1,2",): "seed=1,2: several values; add -m to run them all",
    ("-m", "seed=1,1"): "seed=1 is named twice in the sweep; name each value once",
    ("-m", "seed=1,1,2", "sparsity=0.6"): "seed=1 is named twice in the sweep",
    ("--sparsity=0.5",): "--sparsity=0.5: no such flag; a key is written without dashes: sparsity=0.5",
    ("--sparsity", "0.5"): "a key is written without dashes: sparsity=VALUE",
    ("model=local", "model.path="): "model.path=: is empty",
    ("calibration.path=",): "calibration.path=: is empty; give a text, or leave the key out",  # $FILE that is not set
    ("calibration.num_samples=1e30",): "calibration.num_samples=1e+30: must be at most 2^63 - 1",
    ("model.revision=v2",): "model.revision=v2: model.path=embedded is local; only a model of the hub has revisions",
    ("recovery=null",): "no such preset; none is chosen where recovery is left out, or taken back with ~recovery",
    ("+experiment=laptop",): "+experiment=laptop: a preset is chosen without +: experiment=laptop",
    ("++pruner=wanda",): "++pruner=wanda: a preset is chosen without +: pruner=wanda",
    ("tracker.name=wandbb",): "tracker.name=wandbb: must be wandb or none (did you mean wandb?)",
}


@pytest.mark.parametrize("lines", CASES)
def test_what_was_meant_is_told(lines: tuple[str, ...]) -> None:
    assert any(CASES[lines] in problem for problem in refused(*lines)), refused(*lines)


def test_an_added_key_that_there_is_not_is_told_once_with_all_that_there_are() -> None:
    (problem,) = refused("+sparsty=0.5")
    assert problem.startswith("sparsty: no such key (did you mean sparsity?); keys: model, calibration, pruner, ")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("MODE", "PROJECT", "ENTITY", "RUN_GROUP", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return monkeypatch


def test_wandbs_own_variables_win_over_untouched_defaults_and_the_command_line_over_them(
    variables: pytest.MonkeyPatch,
) -> None:
    untouched = read().tracker
    assert (untouched.mode, untouched.project, untouched.entity, untouched.tags) == ("offline", "besa", None, ())
    given = {"MODE": "disabled", "PROJECT": "2024", "ENTITY": "team", "RUN_GROUP": "g", "TAGS": "a, b"}
    for name, value in given.items():
        variables.setenv(f"WANDB_{name}", value)
    tracker = read().tracker
    assert (tracker.mode, tracker.project, tracker.entity) == ("disabled", "2024", "team")
    assert (tracker.group, tracker.tags) == ("g", ("a", "b"))
    asked = read("tracker.mode=offline", "tracker.project=mine", "tracker.group=null", "tracker.tags=[c]").tracker
    assert (asked.mode, asked.project, asked.group, asked.tags) == ("offline", "mine", None, ("c",))
    variables.setenv("WANDB_MODE", "dryrun")
    assert read().tracker.mode == "offline"


def test_the_resolved_configuration_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--cfg", "job", "--resolve"]) == 0
    assert "project: besa" in capsys.readouterr().out


def test_a_mode_that_the_variable_gives_and_nobody_knows_is_told_with_the_variable(variables) -> None:
    variables.setenv("WANDB_MODE", "shared")
    assert any("tracker.mode=shared (WANDB_MODE says so): must be one of" in problem for problem in refused())


@pytest.mark.parametrize("command", ["prune", "report"])
def test_a_name_that_is_no_text_is_refused_at_the_door(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be met when results.json is written."""
    assert main([command, "model.path=/a/\udcff"]) == 2
    assert r"'model.path=/a/\udcff': is not UTF-8" in capsys.readouterr().err
