"""Presets, the name of a run, and the way from a composed configuration to settings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from hypothesis import given, settings, strategies
from omegaconf import DictConfig, OmegaConf

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import Unreadable, as_values, method_name, read_settings, run_name
from besa_exp.errors import ConfigurationError
from besa_exp.presets import CONF_DIR, METHOD_GROUPS, default_preset, first_comment, groups, listing, preset, presets
from besa_exp.run_folder.identity import request_identity
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings

ROOT = Path(__file__).parents[3]

PRESETS = [(group, name) for group in groups() for name in presets(group)]
NEEDED = {("model", "local"): ["model.path=folder"], ("calibration", "local"): ["calibration.path=text.txt"]}
OVERRIDING = ("experiment", "testbed", "debug")
SETTINGS = {
    "model": ModelSettings,
    "calibration": CalibrationSettings,
    "evaluator": EvaluatorSettings,
    "tracker": TrackerSettings,
}


@cache
def composed(*lines: str) -> DictConfig:
    """Composed once for each set of lines; no test changes it."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("prune", list(lines), return_hydra_config=True)


def read(*lines: str) -> RunSettings:
    config = composed(*lines)
    return read_settings(config, method_name(config.hydra.runtime.choices))


def problems_of(*lines: str) -> dict[str, str]:
    with pytest.raises(Unreadable) as refusal:
        read(*lines)
    return refusal.value.by_key


def chosen_together() -> Iterator[dict[str, str]]:
    """Every preset once: those that override others' keys alone, of the other groups one of each."""
    rows = [[(group, name) for name in presets(group)] for group in groups() if group not in OVERRIDING]
    yield from (dict(filter(None, row)) for row in zip_longest(*rows))
    yield from ({group: name} for group in OVERRIDING for name in presets(group))


def told_apart(jobs: list[list[str]]) -> list[list[str]]:
    """The first job of a sweep, and those that differ from it in one key; of numbers, which compose alike, the last."""
    differences = [[line for line, other in zip(job, jobs[0], strict=True) if line != other] for job in jobs]
    found = {}
    for job, lines in zip(jobs, differences, strict=True):
        if len(lines) < 2:
            key, _, value = "".join(lines).partition("=")
            found[key if re.fullmatch(r"[\d.]+", value) else (key, value)] = job
    return list(found.values())


@pytest.mark.parametrize("chosen", [*chosen_together()], ids=lambda chosen: "+".join(chosen.values()))
def test_every_preset_composes_and_becomes_the_settings_that_python_gets_by_its_name(chosen: dict[str, str]) -> None:
    needed = [line for choice in chosen.items() for line in NEEDED.get(choice, [])]
    lines = [*(f"{group}={name}" for group, name in chosen.items()), "seed=7", *needed]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composer = Composer("prune")
        main = compose("prune", lines, return_hydra_config=True)
        configs = [main]
        if main.hydra.mode == RunMode.MULTIRUN:
            params = [f"{key}={value}" for key, value in (main.hydra.sweeper.params or {}).items()]
            jobs = composer.spread(composer.parse(lines), params)
            configs = [config for job in told_apart(jobs) if (config := composer.compose(job))]
    assert composer.problems == {}
    if not {*chosen}.isdisjoint(OVERRIDING):
        assert set(main) == set(composed()), "a preset of others' keys adds one of its own"
    for config in configs:
        read_config = read_settings(config, method_name(config.hydra.runtime.choices))
        for group, name in chosen.items():
            if group in SETTINGS:
                assert type(getattr(read_config, group)) is SETTINGS[group]
            if group in (*METHOD_GROUPS, "evaluator"):
                assert getattr(read_config, group) == preset(group, name, seed=7)
        assert callable(read_config.pruner.prune_block)


@pytest.mark.parametrize("preset", presets("model"))
def test_a_published_perplexity_has_its_source_and_a_window_that_the_model_takes(preset: str) -> None:
    text = (CONF_DIR / "model" / f"{preset}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if preset in ("embedded", "local"):
        return
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", values["path"])
    assert set(values) <= {"defaults", "path", "context", "dtype", "published_perplexity"}
    for by_window in values.get("published_perplexity", {}).values():
        assert max(by_window) <= values["context"]
        assert re.search(r"published_perplexity: .* # arXiv \d{4}\.\d{5}, ", text)


def test_published_perplexities_are_read_by_window() -> None:
    assert read("model=llama2_7b").model.published_perplexity == {"wikitext2": {2048: 5.47, 4096: 5.12}}
    assert read("model=smollm2_135m").model.published_perplexity == {}
    told = problems_of("+model.published_perplexity={wikitext2: {2048: good}}")
    assert "model.published_perplexity.wikitext2.2048=good: must be a finite number" in str(told)


def test_what_is_published_of_a_model_does_not_change_a_runs_name() -> None:
    assert run_name(composed("+model.published_perplexity={embedded: {256: 9.0}}")) == run_name(composed())


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_says_in_its_first_lines_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert first_comment(path) in lines[0] + lines[1]
    assert len(first_comment(path)) > 15
    assert "@package" not in first_comment(path)


def test_every_key_of_the_settings_stands_in_the_configuration() -> None:
    config = composed()
    unchosen = {"pruner_name", "skipping", *METHOD_GROUPS}
    assert set(config) - {"hydra"} == set(RunSettings.__dataclass_fields__) - unchosen | {"pruner"}
    for group, cls in SETTINGS.items():
        assert set(config[group]) - {"_target_"} == set(cls.__dataclass_fields__)


def test_the_configuration_holds_no_python() -> None:
    assert not list(CONF_DIR.rglob("*.py")), "a .py file under conf/ breaks editable installs"


def test_the_wheel_takes_the_configuration_along() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["besa_exp", "conf"]
    assert wheel["sources"] == {"conf": "besa_exp/conf"}


def test_the_resolved_configuration_can_be_read_as_settings_again() -> None:
    config = composed("sparsity=0.7", "calibration.num_samples=3")
    assert read_settings(OmegaConf.create(as_values(config)), "besa") == read_settings(config, "besa")


def test_values_arrive_with_their_types() -> None:
    given = read("sparsity=0", "evaluator.perplexity_sets=[embedded,c4]", "evaluator.limit=8", "model.revision='7'")
    assert (given.sparsity, type(given.sparsity)) == (0.0, float)
    assert given.evaluator.perplexity_sets == ("embedded", "c4")
    assert given.evaluator.limit == 8
    assert given.model.revision == "7"


def test_one_value_may_stand_for_a_list_of_one() -> None:
    assert read("evaluator.perplexity_sets=embedded").evaluator.perplexity_sets == ("embedded",)


def test_a_batch_size_is_a_number_or_auto() -> None:
    assert read().evaluator.batch_size == "auto"
    assert read("evaluator.batch_size=4").evaluator.batch_size == 4
    told = problems_of("evaluator.batch_size=large")["evaluator.batch_size"]
    assert told.startswith("evaluator.batch_size=large: must be a whole number or auto")


def test_seeds_of_the_groups_follow_the_one_seed() -> None:
    assert read("seed=5").calibration.seed == 5


def test_a_tracked_runs_group_is_its_experiment_and_none_without_one() -> None:
    assert read("tracker=wandb").tracker.group is None
    assert read("experiment=compare", "tracker=wandb").tracker.group == "compare"


def test_the_model_is_named_after_its_path_not_its_preset() -> None:
    assert read("model.path=/models/Some-Llama/").model.name == "Some-Llama"
    assert read("model.path=/models/step1000/hf", "model.name=step1000").model.name == "step1000"


def test_a_models_name_is_in_its_runs_name_and_not_in_what_identifies_it() -> None:
    named, unnamed = run_name(composed("model.name=mine")), run_name(composed())
    assert named.startswith("mine-besa-")
    assert named.rpartition("-")[2] == unnamed.rpartition("-")[2]


def test_presets_beside_the_packages_are_listed(tmp_path: Path) -> None:
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner" / "mine.yaml").write_text("# A pruner of mine\n_target_: mine.Mine\n")
    assert re.search(rf"^  mine +A pruner of mine \(of {tmp_path}\)$", listing(["pruners"], tmp_path), re.MULTILINE)
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        listing([], tmp_path / "gone")


def test_every_unreadable_value_is_told_at_once_by_its_key() -> None:
    told = problems_of(
        "sparsity=abc", "calibration.num_samples=1.5", "save.model=maybe", "evaluator.limit=x", "model=local"
    )
    assert set(told) == {"sparsity", "calibration.num_samples", "save.model", "evaluator.limit", "model.path"}
    assert told["sparsity"] == "sparsity=abc: must be a finite number; write for example sparsity=0.5"


@pytest.mark.parametrize("value", ["nan", "inf", "true", "null", "[0.5]"])
def test_a_sparsity_that_is_no_finite_number_is_refused(value: str) -> None:
    assert set(problems_of(f"sparsity={value}")) == {"sparsity"}


def test_a_key_added_to_a_group_is_refused_with_the_nearest_one() -> None:
    told = problems_of("+calibration.num_sample=3")
    assert "did you mean num_samples?" in told["calibration.num_sample"]


def test_a_target_that_is_no_settings_class_is_refused() -> None:
    assert "must be ModelSettings" in problems_of("model._target_=besa_exp.settings.SaveSettings")["model"]
    assert "cannot be imported" in problems_of("pruner._target_=besa_exp.nowhere.Wanda")["pruner"]


def test_what_does_not_change_the_result_does_not_change_the_name() -> None:
    name = run_name(composed())
    same = ["tracker=none", "offline=true", "overwrite=true", "profile=true", "sparsity=0.50"]
    assert {run_name(composed(line)) for line in same} == {name}
    assert run_name(composed("pattern=2:4", "sparsity=0.5")) == run_name(composed("pattern=2:4", "sparsity=0.1"))


@pytest.mark.parametrize(
    "line",
    [
        "sparsity=0.51",
        "seed=1",
        "pattern=2:4",
        "calibration.num_samples=7",
        "pruner=wanda",
        "evaluator=none",
        "model.dtype=bfloat16",
        "save.model=false",
    ],
)
def test_what_changes_the_result_changes_the_name(line: str) -> None:
    assert run_name(composed(line)) != run_name(composed())


@pytest.mark.parametrize("place", ["pruner", "pruner.model"])
def test_a_class_that_moves_renames_no_run_and_disowns_no_block(place: str) -> None:
    here = composed("pruner=best")
    moved = deepcopy(here)
    target = OmegaConf.select(here, place)._target_
    OmegaConf.update(moved, f"{place}._target_", f"besa_exp.elsewhere.{target.rpartition('.')[2]}")
    assert run_name(moved) == run_name(here)
    assert request_identity(as_values(moved)) == request_identity(as_values(here))


def test_equal_fields_of_another_preset_are_another_run() -> None:
    config = composed("pruner=wanda")
    renamed = deepcopy(config)
    renamed.hydra.runtime.choices.pruner = "mine"
    assert run_name(renamed) != run_name(config)
    blocks = [request_identity({"method": name} | as_values(config)) for name in ("wanda", "mine")]
    assert blocks[0] != blocks[1]


def test_the_name_tells_model_pruner_sparsity_and_seed() -> None:
    assert re.fullmatch(
        r"embedded-wanda-0\.6-s3-[0-9a-f]{8}", run_name(composed("pruner=wanda", "sparsity=0.6", "seed=3"))
    )
    assert re.fullmatch(r"embedded-wanda-2_4-s0-[0-9a-f]{8}", run_name(composed("pruner=wanda", "pattern=2:4")))
    tuned = run_name(composed("recovery=full", "recovery.path=/home/me/a.txt"))
    assert re.fullmatch(r"embedded-besa_full-path_a\.txt-0\.5-s0-[0-9a-f]{8}", tuned)


@given(path=strategies.text(max_size=300), seed=strategies.integers())
@settings(max_examples=50, deadline=None)
def test_any_name_is_safe_in_a_shell_and_bounded(path: str, seed: int) -> None:
    name = path.replace("${", "")  # is an interpolation, no name
    values = {"model": {"path": name}, "pruner": {}, "pattern": name, "sparsity": 0.5, "seed": seed}
    config = OmegaConf.create({**values, "hydra": {"runtime": {"choices": {"pruner": name}}}})
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,180}", run_name(config))


def test_the_listing_has_every_preset_with_its_line() -> None:
    text = listing()
    for group, name in PRESETS:
        assert f"{name} " in text
        assert presets(group)[name] in text
    assert "(default)" in listing(["pruners"])
    assert listing(["recoveries"]) == listing(["recovery"])
    assert default_preset("pruner") == "besa"


def test_an_unknown_group_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"prunners: no such group \(did you mean pruners\?\); groups"):
        listing(["prunners"])
    with pytest.raises(
        ConfigurationError, match=r"^wanda: no such group; it is a preset: besa show pruner=wanda; groups"
    ):
        listing(["wanda"])


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["pruner=besa", "pruner.scope=pair"], "besa-scope_pair-0.5-s0-"),
        (["pruner=besa", "calibration.num_samples=7"], "besa-num_samples_7-0.5-s0-"),
        (["pruner=wanda", "budget=owl"], "owl_wanda-0.5-s0-"),
    ],
)
def test_a_runs_name_says_what_differs_from_the_presets(lines: list[str], part: str) -> None:
    assert part in run_name(composed(*lines))


def test_a_run_under_another_name_is_found_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = run_name(composed("pruner=besa", "pruner.scope=pair"))
    earlier = f"embedded-besa-0.5-s0-{name.rpartition('-')[2]}"
    Path("outputs", earlier).mkdir(parents=True)
    config = composed("pruner=besa", "pruner.scope=pair")
    assert config.hydra.run.dir == f"outputs/{earlier}"
    Path("outputs", name).mkdir()
    assert composed("pruner=besa", "pruner.scope=pair").hydra.run.dir == f"outputs/{name}"
