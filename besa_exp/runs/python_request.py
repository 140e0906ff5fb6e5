"""What a Python call asks for, as the settings of a run: presets made objects, and all that speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.checkpoints.load import LoadedModel, model_context, vocabulary_size
from besa_exp.errors import ConfigurationError
from besa_exp.methods.given import check_kinds, check_methods
from besa_exp.presets import METHOD_GROUPS, preset, preset_values, presets
from besa_exp.rules import broken_rules
from besa_exp.runs.model_object import check_model
from besa_exp.runs.recover import check_recovery_of
from besa_exp.runs.run import calibration_of
from besa_exp.settings import CalibrationSettings, ModelSettings, RunSettings, TrackerSettings
from besa_exp.tensors.masks import Goal
from besa_exp.texts.calibration import Calibration, given_calibration
from besa_exp.texts.sources import GIVEN

Texts = str | Path | Iterable[str] | Int[Tensor, "sample seq"]
Given = str | Sequence[str] | Int[Tensor, "sample seq"]  # the same, as `given_texts` reads it
SEQ_LEN = 2048  # tokens of a window of given texts, or the model's context if that is less


def for_paths_alone(settings: RunSettings, out: str | Path | None) -> list[str]:
    """What is asked that a model object cannot be given."""
    problems = {
        "structure= is for a path: what is left of a model is another model, which is written to out=": (
            settings.structure is not None
        ),
        "out= and evaluator= are for a path; a model object is pruned in place: save it with "
        "model.save_pretrained(...), and score what was saved with besa evaluate checkpoint=...": (
            out is not None or settings.evaluator.name != "none"
        ),
        "recovery= is for a path; tune a model object that is pruned with besa_exp.tune(model, tokenizer, texts, "
        "recovery=...)": settings.recovery is not None,
    }
    return [problem for problem, holds in problems.items() if holds]


def asked_in_python(
    model_or_path: Any, texts: Any, sizes: Mapping[str, int | None], *, seed: Any, evaluator: Any, **more: Any
) -> tuple[RunSettings, Callable[[LoadedModel], Calibration]]:
    """What a call asks for, and what reads its calibration tokens. `sizes`: of the calibration, None where nothing was
    said. ConfigurationError: a preset that there is not, or a target that this method cannot meet."""
    given, seed, ignore = given_texts(texts), plain(seed), more["ignore"]
    patterns = tuple(ignore) if isinstance(ignore, list | tuple) else (ignore,)
    more |= {"sparsity": plain(more["sparsity"]), "ignore": patterns}
    chosen = {group: more.pop(group) for group in METHOD_GROUPS}
    is_path = isinstance(model_or_path, (str, Path))
    problems = [] if is_path else check_model(model_or_path)
    try:
        calibration = _calibration_settings(given, seed, sizes)
    except ConfigurationError as error:
        raise ConfigurationError(*problems, *error.problems) from None
    methods = {}
    for group in METHOD_GROUPS:
        try:
            named = isinstance(chosen[group], str)
            methods[group] = preset(group, chosen[group], seed=seed) if named else chosen[group]
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(*problems)
    kind = type(model_or_path).__name__
    settings = RunSettings(
        model=model_settings(str(model_or_path)) if is_path else ModelSettings(kind, kind),
        calibration=calibration,
        pruner_name="+".join(_name(chosen[group]) for group in METHOD_GROUPS if chosen[group] is not None),
        evaluator=preset("evaluator", evaluator) if isinstance(evaluator, str) else evaluator,
        tracker=TrackerSettings("none"),
        seed=seed,
        **methods,
        **more,
    )
    if problems := _check_target(settings):
        raise ConfigurationError(*problems)
    return settings, partial(read_calibration, given, settings, sizes["seq_len"])


def model_settings(path: str) -> ModelSettings:
    """Those of the model preset of this name, else of the folder or hub id."""
    if path not in presets("model") or path == "local" or Path(path).is_dir():
        return ModelSettings(Path(path).name, path)
    values = preset_values("model", path)
    values.pop("_target_")
    name = values.pop("name") or Path(values["path"]).name
    return ModelSettings(name=name, **values)


def _name(method: Any) -> str:
    """Of a preset or an object; an object is called by its class."""
    return method if isinstance(method, str) else getattr(method, "name", type(method).__name__.lower())


def plain(number: Any) -> Any:
    """A number of numpy's or torch's as Python's; all else as it is."""
    return number.item() if hasattr(number, "item") else number


def _check_target(settings: RunSettings) -> list[str]:
    """What speaks against the target, in complete sentences."""
    if problems := broken_rules(settings, "") or broken_rules(settings.evaluator, "evaluator"):
        return problems
    try:
        Goal.parse(settings.sparsity, settings.pattern)
    except ValueError as error:
        return [str(error)]
    if problems := check_kinds(vars(settings)):
        return problems
    problems = check_methods(vars(settings), settings.sparsity, settings.pattern)
    sparsity = 0.0 if settings.keeps_weights else settings.sparsity
    return problems + (check_recovery_of(settings, sparsity, None) if settings.recovery else [])


def given_texts(given: Any) -> Given:
    """A name, a path, or texts that may be read once, as text or a list of texts; token ids as they are.
    ConfigurationError: it is neither."""
    if isinstance(given, str | Path):
        return str(given)
    if isinstance(given, Tensor):
        if given.dtype == torch.bool:
            raise ConfigurationError("tokens of torch.bool are no token ids, but a mask; give input_ids")
        return given
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigurationError(
            f"texts: {type(given).__name__} is no list of texts; give one, or token ids as a tensor [sample, seq], "
            'such as tokenizer(...)["input_ids"]'
        )
    texts = list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigurationError(
                f"texts: number {number} is {type(text).__name__}, not text; leave it out, or give token ids as a "
                "tensor [sample, seq]"
            )
    return texts


def _calibration_settings(given: Given, seed: int, sizes: Mapping[str, int | None]) -> CalibrationSettings:
    """The settings of the set's preset, with what was said otherwise."""
    if isinstance(given, str):
        named = given in presets("calibration") and given != "local"
        base = preset("calibration", given if named else "embedded", seed=seed)
        base = base if named else CalibrationSettings("local", path=given, seed=seed)
    else:
        texts, tokens = GIVEN
        base = CalibrationSettings(tokens if isinstance(given, Tensor) else texts, seq_len=SEQ_LEN, seed=seed)
    said = {key: size for key, size in sizes.items() if size is not None}
    asked = replace(base, **said)
    problems = broken_rules(asked, "")
    if base.name == GIVEN[1]:
        problems += [
            f"{key}={said[key]}: is of windows that are drawn from texts; tokens are taken as they are: leave it "
            "out, or give fewer of them"
            for key in ("num_samples", "seq_len")
            if key in said
        ]
    if problems:
        raise ConfigurationError(*problems)
    return asked


def read_calibration(given: Given, settings: RunSettings, seq_len: int | None, loaded: LoadedModel) -> Calibration:
    calibration, context = settings.calibration, model_context(loaded.model)
    if isinstance(given, str):
        return calibration_of(calibration, settings.offline, loaded)
    if seq_len is None and calibration.name == GIVEN[0]:
        calibration = replace(calibration, seq_len=min(SEQ_LEN, context))
    if loaded.tokenizer is not None and not callable(loaded.tokenizer):
        kind = type(loaded.tokenizer).__name__
        raise ConfigurationError(f"tokenizer: {kind} is none; give what AutoTokenizer.from_pretrained(...) returns")
    return given_calibration(given, calibration, loaded.tokenizer, context, vocabulary_size(loaded.model))
