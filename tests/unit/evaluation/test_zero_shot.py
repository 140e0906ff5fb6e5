"""Zero-shot scores through lm-eval: its definitions unchanged, its side effects undone, and what cannot be had."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import numpy
import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_llama

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import Unavailable
from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.scores import evaluate
from besa_exp.evaluation.task_definitions import TASK_FOLDERS
from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.embedded.text import TASK_NAME

CONTEXT = 512
HUB_TASKS = [name for name in TASK_FOLDERS if name != TASK_NAME]
CHOICES = {"text": ["a red fox", "the sea", "one", "a very long answer indeed"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "piqa": lambda n: {"goal": f"Open box {n}", "sol1": "use a key", "sol2": "use a spoon, then sing", "label": n % 2},
    "boolq": lambda n: {"passage": f"Box {n} is {'red' * n}.", "question": f"is box {n} red", "label": n % 2},
    "openbookqa": lambda n: {"question_stem": f"Number {n} is", "choices": CHOICES, "answerKey": "ABCD"[n % 4]},
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(CONTEXT)


@pytest.fixture
def mirror(tmp_path) -> Path:
    """Twelve questions of two tasks, in the layout of a mirror."""
    write_mirror(tmp_path, "piqa", "validation", [ROWS["piqa"](number) for number in range(12)])
    write_mirror(tmp_path, "openbookqa", "test", [ROWS["openbookqa"](number) for number in range(12)])
    return tmp_path


def write_mirror(folder: Path, task: str, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / task).mkdir(exist_ok=True)
    (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def first_questions(shared_dir, tmp_path_factory) -> Path:
    """A mirror with the first questions of the real tasks: thousands would be read each time."""
    folder = tmp_path_factory.mktemp("mirror")
    for file in (shared_dir / "data" / "zero_shot").glob("*/*.jsonl"):
        (folder / file.parent.name).mkdir(exist_ok=True)
        with file.open() as lines:
            (folder / file.parent.name / file.name).write_text("".join(islice(lines, 40)))
    return folder


def settings(*tasks: str, data_dir: Path | None = None, **changes) -> EvaluatorSettings:
    given = EvaluatorSettings("test", tasks=tasks, data_dir=None if data_dir is None else str(data_dir), batch_size=4)
    return replace(given, **changes)


def score(model, given: EvaluatorSettings, tokenizer=None) -> Scores:
    return evaluate(LoadedModel(model, tokenizer or byte_tokenizer(), None, Path()), given, True, 0, lambda _: None)


def log_probability(model, tokenizer, context: str, continuation: str) -> float:
    """log p(continuation | context), fp64, one request at a time without padding."""
    before, ids = tokenizer(context).input_ids, tokenizer(context + continuation).input_ids
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probabilities[place - 1, ids[place]]) for place in range(len(before), len(ids)))


# The numbers


def test_accuracies_equal_a_literal_computation_on_the_first_questions_of_the_limit(model, mirror):
    tokenizer = byte_tokenizer()
    hits, hits_norm = [], []
    for number in range(11):
        row = ROWS["openbookqa"](number)
        choices, gold = row["choices"]["text"], "ABCD".index(row["answerKey"])
        scores = [log_probability(model, tokenizer, row["question_stem"], f" {choice}") for choice in choices]
        lengths = [len(choice) for choice in choices]
        hits.append(scores.index(max(scores)) == gold)
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        hits_norm.append(normed.index(max(normed)) == gold)
    scores = score(model, settings("openbookqa", data_dir=mirror, limit=11))
    metrics = scores.zero_shot["openbookqa"]
    assert metrics["acc,none"] == pytest.approx(sum(hits) / 11)
    assert metrics["acc_norm,none"] == pytest.approx(sum(hits_norm) / 11)
    assert metrics.keys() == {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"}
    assert sum(hits) != sum(hits_norm)  # else the two could be mixed up
    assert scores.provenance["zero_shot"]["limit"] == scores.provenance["zero_shot"]["tasks"]["openbookqa"]["documents"]


def test_scores_equal_those_of_lm_evals_own_simple_evaluate_also_with_examples(model, mirror, monkeypatch):
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet

    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides the signatures of both from a type checker
    hflm: Any = HFLM
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it starts pip and compilers
    write_mirror(mirror, "piqa", "validation", [ROWS["piqa"](number * number) for number in range(60)])
    write_mirror(mirror, "piqa", "train", [ROWS["piqa"](number) for number in range(100, 130)])
    with quiet(), torch.random.fork_rng():
        task = load_task("piqa", settings(data_dir=mirror, num_fewshot=2), True).tasks["piqa"]
        theirs = simple_evaluate(
            hflm(pretrained=model, tokenizer=byte_tokenizer(), batch_size=3),
            tasks=[task],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            num_fewshot=2,
            fewshot_random_seed=0,
        )
    ours = score(model, settings("piqa", data_dir=mirror, num_fewshot=2))
    metrics = ours.zero_shot["piqa"]
    assert metrics == pytest.approx({key: theirs["results"]["piqa"][key] for key in metrics})
    assert ours.provenance["zero_shot"]["tasks"]["piqa"]["num_fewshot"] == 2


@pytest.mark.parametrize(("held", "reads"), [(2.0**31, 1), (1.0, 6)])
def test_a_streamed_models_blocks_are_read_once_for_all_questions_that_memory_holds(
    model, mirror, tmp_path, monkeypatch, held: float, reads: int
):
    from besa_exp.checkpoints.streaming import open_streamed
    from besa_exp.evaluation import zero_shot

    monkeypatch.setattr(zero_shot, "HELD_BYTES", held)
    model.save_pretrained(tmp_path / "model")
    whole = score(model, settings("openbookqa", data_dir=mirror, batch_size=8))
    opened, weights = open_streamed(tmp_path / "model", "auto", torch.device("cpu"), False)
    read: list[str] = []
    read_part = type(weights).read
    monkeypatch.setattr(type(weights), "read", lambda self, part: (read.append(part), read_part(self, part))[1])
    loaded = LoadedModel(opened, byte_tokenizer(), weights, Path())
    given = settings("openbookqa", data_dir=mirror, batch_size=8)
    scores = evaluate(loaded, given, True, 0, lambda _: None)
    assert scores.zero_shot["openbookqa"] == pytest.approx(whole.zero_shot["openbookqa"])
    assert read == ["model.layers.0.", "model.layers.1."] * reads  # 48 requests are six batches
    assert all(parameter.is_meta for parameter in opened.model.layers.parameters())


def test_equal_runs_give_equal_scores_print_nothing_and_leave_all_global_states_as_they_were(
    model, mirror, capfd, caplog
):
    tokenizer = byte_tokenizer()
    random.seed(5)
    numpy.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = global_states()
    first, again = (score(model, settings("piqa", data_dir=mirror), tokenizer) for _ in range(2))
    assert first == again
    assert global_states() == before
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def global_states() -> list[Any]:
    """What lm-eval and datasets change while they run; Python's own random state is drawn from by the checks of types
    that tests add, and has a test of its own."""
    states = [repr(numpy.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002
    return [*states, logging.getLogger("lm_eval").level, datasets.is_progress_bar_enabled()]


def test_what_is_drawn_with_a_seed_leaves_all_random_states_as_they_were() -> None:
    from besa_exp.evaluation.zero_shot import seeded

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.random()), float(torch.rand(()))  # noqa: NPY002

    with seeded(3):
        expected = draw()
    before = [random.getstate(), *global_states()]
    with seeded(3):
        assert draw() == expected
    assert [random.getstate(), *global_states()] == before


def test_the_record_says_what_makes_two_scores_comparable(model, mirror):
    record = score(model, settings("piqa", data_dir=mirror)).provenance["zero_shot"]
    task = record["tasks"]["piqa"]
    assert (record["batch_size"], record["limit"], record["max_length"]) == (4, None, CONTEXT)
    assert record["lm_eval"].startswith("0.4.")
    assert record["tokenizer_adds_bos"] is True
    assert (task["version"], task["num_fewshot"], task["documents"]) == (1.0, 0, 12)
    assert "piqa/validation.jsonl sha256:" in task["data"]


def test_the_batch_size_and_the_context_reach_lm_evals_model(model):
    from besa_exp.evaluation.zero_shot import harness

    scored = harness(LoadedModel(model, byte_tokenizer(), None, Path()), 7, 100)
    assert (scored.batch_size, scored.max_length) == (7, 100)


def test_automatic_batches_hold_as_many_questions_as_their_length_allows_and_change_no_score(mirror, monkeypatch):
    write_mirror(mirror, "boolq", "validation", [ROWS["boolq"](number) for number in range(40)])
    model = tiny_llama(CONTEXT)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    one_by_one = score(model, settings("boolq", data_dir=mirror, batch_size=1))
    alone = sum(rows * length for rows, length in shapes)
    shapes.clear()
    monkeypatch.setattr("besa_exp.evaluation.batches.TOKENS_ON_CPU", 1000)
    automatic = score(model, settings("boolq", data_dir=mirror, batch_size="auto"))
    assert automatic.zero_shot["boolq"] == one_by_one.zero_shot["boolq"]
    assert [rows for rows, _ in shapes[:-1]] == [1000 // (length + 1) for _, length in shapes[:-1]]  # the last is over
    assert shapes == sorted(shapes, key=lambda shape: -shape[1])
    assert sum(rows for rows, _ in shapes) in (40, 80)
    assert sum(rows * length for rows, length in shapes) < 1.2 * alone  # padding


def test_questions_that_do_not_fit_the_memory_together_are_scored_in_halves(mirror):
    model = tiny_llama(CONTEXT)
    expected = score(model, settings("piqa", data_dir=mirror))

    def refuse(_, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse)
    for batch_size in ("auto", 8):
        found = score(model, settings("piqa", data_dir=mirror, batch_size=batch_size))
        assert found.zero_shot == expected.zero_shot


# lm-eval's own definitions


def defined(name: str) -> dict[str, Any]:
    """The registered task's definition, as lm-eval reads it."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / TASK_FOLDERS[name]
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).task_index[name].cfg or {}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_mirror_changes_nothing_of_a_task_but_its_data(first_questions, name):
    from lm_eval.config.task import TaskConfig

    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet

    with quiet():
        task = load_task(name, settings(data_dir=first_questions), True).tasks[name]
    registered = TaskConfig(**{key: value for key, value in defined(name).items() if key != "tag"})
    of_data = {"custom_dataset", "training_split", "validation_split", "test_split", "fewshot_config"}
    for key in set(TaskConfig.__dataclass_fields__) - of_data - {"metadata"}:
        found, expected = getattr(task.config, key), getattr(registered, key)
        if callable(found):  # the definition as text has the path of a function, such as .../utils.process_docs
            found, expected = found.__name__, str(expected).rpartition(".")[2]
        assert found == (expected or 0 if key == "num_fewshot" else expected), key
    assert (registered.metadata or {})["version"] == task.VERSION
    scored = registered.test_split or registered.validation_split
    assert (task.config.test_split or task.config.validation_split) == scored
    assert task.task_name == name


def test_prompts_are_lm_evals(mirror):
    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet

    with quiet():
        task = load_task("piqa", settings(data_dir=mirror), True).tasks["piqa"]
    document = task.eval_docs[3]
    assert task.fewshot_context(document, num_fewshot=0) == "Question: Open box 3\nAnswer:"
    assert task.doc_to_choice(document) == ["use a key", "use a spoon, then sing"]
    assert task.doc_to_target(document) == 1


def test_real_tasks_are_scored_under_their_own_names(model, first_questions):
    scores = score(model, settings("winogrande", "arc_challenge", data_dir=first_questions, limit=4))
    assert scores.zero_shot.keys() == {"winogrande", "arc_challenge"}
    assert scores.provenance["zero_shot"]["tasks"]["arc_challenge"]["documents"] == 4
    assert not scores.unavailable


def test_the_embedded_task_needs_no_data_from_anywhere(model, tmp_path):
    scores = score(model, settings(TASK_NAME, data_dir=tmp_path, limit=8))
    assert 0 <= scores.zero_shot[TASK_NAME]["acc,none"] <= 1
    assert scores.provenance["zero_shot"]["tasks"][TASK_NAME]["data"] == "embedded"


# What cannot be had


def test_a_task_that_cannot_be_had_is_named_with_its_reason_and_loses_no_other(model, mirror, monkeypatch):
    (mirror / "boolq").mkdir()
    (mirror / "boolq" / "validation.jsonl").write_text('{"passage": ')
    scores = score(model, settings("winogrande", "boolq", "piqa", data_dir=mirror))
    assert scores.zero_shot.keys() == {"piqa"}
    assert scores.unavailable.keys() == {"winogrande", "boolq"}
    assert str(mirror / "winogrande" / "validation.jsonl") in scores.unavailable["winogrande"]
    assert "boolq/validation.jsonl, line 1: cannot be read: " in scores.unavailable["boolq"]


def test_rows_without_the_fields_of_the_task_make_it_unavailable(model, mirror):
    write_mirror(mirror, "boolq", "validation", [{"text": "x"}] * 3)
    scores = score(model, settings("boolq", data_dir=mirror))
    told = scores.unavailable["boolq"]
    assert "its rows must have the keys that the task's prompt names" in told
    assert "network" not in told


def test_a_task_of_the_hub_that_is_not_cached_is_unavailable_offline_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    scores = score(model, settings("piqa"))
    assert "OfflineModeIsEnabled" in scores.unavailable["piqa"]
    assert "set evaluator.data_dir" in scores.unavailable["piqa"]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert datasets.config.HF_HUB_OFFLINE is False


def test_few_shot_examples_that_the_mirror_lacks_are_missed_by_name(model, mirror):
    scores = score(model, settings("piqa", data_dir=mirror, num_fewshot=2))
    assert str(mirror / "piqa" / "train.jsonl") in scores.unavailable["piqa"]


def test_prompts_beyond_the_context_are_cut_and_counted(mirror):
    write_mirror(mirror, "boolq", "validation", [ROWS["boolq"](number) for number in range(30)])
    scores = score(tiny_llama(96), settings("boolq", data_dir=mirror))
    cut = scores.provenance["zero_shot"]["tasks"]["boolq"]["requests_cut_to_context"]
    lengths = [
        len(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer: {choice}") + 1  # BOS
        for row in map(ROWS["boolq"], range(30))
        for choice in ("no", "yes")
    ]
    assert 0 < cut == sum(length > 97 for length in lengths) < 60
    assert "boolq" in scores.zero_shot


def test_a_choice_longer_than_the_context_makes_the_task_unavailable(mirror):
    scores = score(tiny_llama(16), settings("piqa", "openbookqa", data_dir=mirror))
    assert scores.unavailable["piqa"] == "one of its choices has 23 tokens; the model's context is 16"
    assert scores.unavailable.keys() == {"piqa", "openbookqa", "text samples"}  # whose prompts are too long too


@pytest.mark.parametrize(
    ("tokenizer", "reason"), [(None, "no tokenizer"), (byte_tokenizer(specials=False), "neither BOS nor EOS")]
)
def test_without_what_lm_eval_needs_of_a_tokenizer_every_task_is_unavailable(model, mirror, tokenizer, reason):
    loaded = LoadedModel(model, tokenizer, None, Path())
    scores = evaluate(loaded, settings("piqa", TASK_NAME, data_dir=mirror), True, 0, lambda _: None)
    assert scores.unavailable.keys() == {"piqa", TASK_NAME}
    assert all(reason in said for said in scores.unavailable.values())


def test_load_task_raises_unavailable_for_a_mirror_without_the_task(tmp_path):
    from besa_exp.evaluation.task_loading import load_task

    with pytest.raises(Unavailable, match=r"unset evaluator\.data_dir"):
        load_task("piqa", settings(data_dir=tmp_path), True)


def test_neither_perplexity_nor_the_checks_import_lm_eval_datasets_or_transformers():
    heavy = ("lm_eval", "datasets", "transformers", "pyarrow")
    code = (
        "import sys, besa_exp.texts.calibration, besa_exp.evaluation.scores;"
        "from besa_exp.evaluation.checks import check_evaluator;"
        "from besa_exp.settings import EvaluatorSettings;"
        "check_evaluator(EvaluatorSettings('x', ('c4',), tasks=('piqa',)), 64);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
