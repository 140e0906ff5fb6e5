"""`skipping=` through the real commands: other scores than without, in folders of their own, told wherever shown. End
to end because the folders' names and what is shown come from the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from besa_exp.cli.main import main


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "scored.safetensors"
    save_file({"input_ids": torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))}, path)
    return path


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def literal_perplexity(model: Any, tokens: Path) -> float:
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    return float(logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().neg().exp())


def without_last_ffn(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    return model


def test_a_run_and_its_dense_model_are_scored_under_the_policy_and_named_after_it(
    given: list[str], tokens: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*given, f"evaluator.perplexity_sets=[{tokens}]", "evaluator.dense=true"]
    assert main(["prune", *words]) == 0
    assert main(["prune", *words, "skipping=static", "skipping.blocks=[1]"]) == 0
    said = capsys.readouterr().out
    (plain,), (under,) = (
        [path for path in Path("outputs").glob("model*") if ("skipping_static" in path.name) == skips]
        for skips in (False, True)
    )
    before, after = results_in(plain), results_in(under)
    name = str(tokens)
    assert after["perplexity"][name] == pytest.approx(literal_perplexity(without_last_ffn(under / "model"), tokens))
    dense = literal_perplexity(without_last_ffn(model_dir), tokens)
    assert after["dense"]["perplexity"][name] == pytest.approx(dense)
    assert before["dense"]["perplexity"][name] != pytest.approx(dense, rel=1e-3)
    record = after["provenance"]["perplexity"][name]["skipping"]
    assert record == after["skipping"][name] == after["dense"]["skipping"][name]
    assert record == {
        "name": "static", "blocks": [1], "warm_tokens": 0, "prompt_tokens": 0, "found": {}, "skipped": 0.5,
    }  # fmt: skip
    assert "skipping" not in before
    assert "(skipping=static)" in said
    assert "50.0 % of FFNs skipped (static)" in " ".join(said.split())  # lines are broken
    assert "50.0 % of FFNs skipped (static)" in (under / "model" / "README.md").read_text()


def test_scores_of_a_runs_model_under_a_policy_leave_its_own_alone_and_have_a_folder(
    given: list[str], tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = f"evaluator.perplexity_sets=[{tokens}]"
    assert main(["prune", *given, sets, "hydra.run.dir=run"]) == 0
    before = (Path("run") / "results.json").read_bytes()
    words = ["evaluate", "checkpoint=run", "device=cpu", "evaluator=none", sets]
    found = [f"calibration.path={tmp_path / 'tokens.safetensors'}", "skipping.cold_first=0", "skipping.cold_last=0"]
    assert main([*words, "skipping=ffn", "skipping.fraction=0.5", *found]) == 0
    (folder,) = Path("outputs").glob("run-skipping_ffn-*")
    record = results_in(folder)["skipping"][str(tokens)]
    assert record["found"]["skipped"] == pytest.approx(0.5, abs=0.1)
    assert record["skipped"] == pytest.approx(0.5, abs=0.2)
    assert (Path("run") / "results.json").read_bytes() == before
    assert main([*words, "skipping=ffn", "skipping.fraction=0.5", *found]) == 0
    assert "already scored" in capsys.readouterr().out
    assert main([*words, "skipping=random", "hydra.run.dir=run"]) == 2
    assert "skipping nothing then" in capsys.readouterr().err


def test_bad_policies_are_told_together_before_anything_is_loaded(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *given, "skipping=ffn", "skipping.fraction=2", "skipping.span=0", "model.load=streamed"]) == 2
    said = capsys.readouterr().err
    assert "skipping.fraction=2: must be in [0, 1]" in said
    assert "skipping.span=0: must be at least 1" in said
    assert "skipping needs the whole model in memory; set model.load=whole" in said
    assert main(["prune", *given, "skipping=static", "skipping.threshold=0.5"]) == 2
    assert "skipping.threshold: no such key" in capsys.readouterr().err
