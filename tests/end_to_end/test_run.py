"""`besa prune` on the embedded model by its real command line: what it leaves can be loaded, recounted, compared. End
to end because this is what users run, and lm-eval's own command reads what it leaves."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
from ready_process import BESA, run_ready
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.checkpoints.files import load_masks
from besa_exp.cli.main import main
from besa_exp.report.curves import row_quantiles
from besa_exp.runs.prune_model import QUANTILES
from besa_exp.texts.embedded.text import MODEL_DIR, TASKS_DIR, calibration_documents

FILES = (
    "results.json metrics.jsonl sparsity.csv status.json run.log config.yaml environment.json masks.safetensors "
    "wandb model"
)
RESULTS = (
    "model pruner pattern seed target_sparsity measured_sparsity linears perplexity zero_shot dense blocks seconds "
    "peak_memory_bytes calibration environment"
)
TASK = "embedded_continuations"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight windows of 64 tokens of the embedded text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = torch.tensor(tokenizer.encode(calibration_documents().documents[0] * 3)[:512]).view(8, 64)
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids}, path)
    return path


def arguments(tokens: Path, folder: Path) -> list[str]:
    keys = [f"calibration.path={tokens}", f"evaluator.perplexity_sets=[{tokens}]", f"hydra.run.dir={folder}"]
    return ["prune", *keys, "evaluator.limit=6", "sparsity=0.6", "pruner.checks=2", "seed=3", "device=cpu"]


@pytest.fixture(scope="module")
def run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "first"
    done = run_ready(BESA, *arguments(tokens, folder))
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.fixture(scope="module")
def results(run) -> dict:
    return json.loads((run[0] / "results.json").read_text())


def test_the_run_folder_holds_what_is_promised_and_says_done(run, results):
    assert set(FILES.split()) <= {path.name for path in run[0].iterdir()}
    assert set(RESULTS.split()) <= set(results)
    assert json.loads((run[0] / "status.json").read_text())["status"] == "done"


def test_the_results_say_what_they_are_of(run, results, tokens):
    assert results["schema"] == 1
    assert shlex.split(results["command"])[1:] == arguments(tokens, run[0])
    assert (results["method"], results["budget"], results["update"]) == ("besa", None, None)


def test_what_is_printed_where_there_is_no_terminal_is_plain_and_tells_blocks_and_scores(run):
    assert "\x1b" not in run[1]
    assert "block 5 of 5" in run[1]
    assert "done: 60.00 % zeros" in run[1]


def test_the_saved_model_is_an_ordinary_folder_that_gives_the_scores_again(run, results, tokens):
    folder = run[0] / "model"
    assert not {"sparsity_config", "quantization_config"} & set(json.loads((folder / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).bos_token_id is not None
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="mean"
        )
    assert results["perplexity"][str(tokens)] == pytest.approx(math.exp(losses), rel=1e-6)


def test_a_fresh_process_reads_the_saved_model_and_computes_what_the_pruned_one_does(results):
    assert results["reloaded"]["token_loss"] == pytest.approx(results["reloaded"]["expected"], rel=1e-5)
    assert results["reloaded"]["tokens"] == 64


def test_row_sparsities_are_those_of_the_saved_weights_and_their_quantiles_are_logged(run):
    kept, weights = load_file(run[0] / "row_sparsities.safetensors"), load_file(run[0] / "model" / "model.safetensors")
    for name, rows in kept.items():
        assert rows.tolist() == pytest.approx((weights[f"{name}.weight"] == 0).float().mean(dim=1).tolist(), abs=1e-6)
    blocks = row_quantiles(run[0])
    assert [block["block"] for block in blocks] == [0, 1, 2, 3, 4]
    assert len(kept) == sum(len(block["linears"]) for block in blocks)
    down = kept["model.layers.2.mlp.down_proj"]
    logged = blocks[2]["linears"]["mlp.down_proj"]
    assert logged == pytest.approx(torch.quantile(down.double(), torch.tensor(QUANTILES).double()).tolist(), abs=1e-6)
    assert down.min() < down.max()  # BESA's rows differ


def test_sparsity_is_what_is_counted_in_the_saved_file_and_in_the_masks(run, results):
    weights = load_file(run[0] / "model" / "model.safetensors")
    masks = load_masks(run[0] / "masks.safetensors")
    zeros = {name: int((weights[name] == 0).sum()) for name in masks}
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
    total = sum(weights[name].numel() for name in masks)
    assert results["measured_sparsity"] == pytest.approx(sum(zeros.values()) / total)
    assert abs(results["measured_sparsity"] - 0.6) < 0.0005
    with (run[0] / "sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["linears"] == len(masks)
    for row in rows:
        assert int(row["pruned"]) == zeros[f"model.layers.{row['block']}.{row['linear']}.weight"]


def test_metrics_hold_a_line_for_each_step_and_block_and_agree_with_the_results(run, results):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if line["kind"] == "block"]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["block"] for line in blocks] == list(range(5))
    assert len(steps) == 5 * 7  # eight samples, one of them the probe
    for line, block in zip(blocks, results["blocks"], strict=True):
        assert line["reconstruction_loss"] == block["reconstruction_loss"]["after"]
    assert [line["which"] for line in lines if line["kind"] == "scores"] == ["dense", "pruned"]


def test_the_same_seed_gives_the_same_bytes_but_for_times(run, results, tokens, tmp_path):
    folder = tmp_path / "second"
    assert main([*arguments(tokens, folder), "save.verify=false"]) == 0
    for name in ("model/model.safetensors", "masks.safetensors", "sparsity.csv"):
        assert (folder / name).read_bytes() == (run[0] / name).read_bytes(), name
    again = json.loads((folder / "results.json").read_text())
    assert again["reloaded"] == {"skipped": "save.verify=false"}
    for one in (again, results := json.loads(json.dumps(results))):
        for key in ("seconds", "peak_memory_bytes", "started", "finished", "command", "reloaded"):
            one.pop(key)
        for block in one["blocks"]:
            block.pop("seconds")
    assert again == results


def test_products_in_bf16_give_nearly_the_same_model(results, tokens, tmp_path):
    assert main([*arguments(tokens, tmp_path), "compute_dtype=bfloat16", "save.model=false"]) == 0
    rounded = json.loads((tmp_path / "results.json").read_text())
    (found,), (expected,) = (one["perplexity"].values() for one in (rounded, results))
    assert found == pytest.approx(expected, rel=0.03)  # a handful of tokens
    losses = [[block["reconstruction_loss"]["after"] for block in one["blocks"]] for one in (rounded, results)]
    assert losses[0] != losses[1]
    assert sum(losses[0]) == pytest.approx(sum(losses[1]), rel=0.03)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # one block's differs by 2.2 to 2.7 %, its standard deviation


def test_lm_eval_runs_on_the_saved_model_and_gives_the_same_scores(run, results, tmp_path, monkeypatch):
    """By its own command, in this process: starting one takes longer than the scores."""
    from lm_eval.__main__ import cli_evaluate

    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={run[0] / 'model'}"]
    command += ["--tasks", TASK, "--include_path", str(TASKS_DIR), "--limit", "6", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(tmp_path)])
    cli_evaluate()
    (written,) = tmp_path.rglob("results*.json")
    scores = json.loads(written.read_text())["results"][TASK]
    for key in ("acc,none", "acc_norm,none"):
        assert scores[key] == pytest.approx(results["zero_shot"][TASK][key], abs=1e-6)
