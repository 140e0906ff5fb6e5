"""`torchrun --nproc-per-node 2 -m besa_exp prune`: the results of one process, and one rank's failure ends both.

End to end because ranks are processes. What torchrun's own command does is tested once; what two ranks compute much of
is tested by `two_ranks.py`, forked from a process that has torch already."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compared_runs import assert_same_but_for_rounding, assert_weights_of_least_score_went, results
from ready_process import TIMEOUT, run_ready
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from besa_exp.cli.main import main
from besa_exp.texts.embedded.text import MODEL_DIR, calibration_documents

EMBEDDING = "model.embed_tokens.weight"

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "besa_exp"]
KEYS = ["prune", "tracker=none", "device=cpu", "evaluator.limit=6", "evaluator.dense=false", "sparsity=0.6"]
KEYS += ["save.verify=false"]
SHARDED = ["recovery.shard=true", "recovery.checkpointing=true", "recovery.micro_batch=1"]


def on_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on two processes, its two streams together."""
    return subprocess.run(
        [*TORCHRUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of the embedded text: of two ranks one has a sample more, and there are four times as many tokens as a
    linear has inputs. With fewer, SparseGPT's Hessian is so ill-conditioned that rounding alone exchanges weights."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = torch.tensor(tokenizer.encode(" ".join(calibration_documents().documents[:20]))[: 33 * 64]).view(33, 64)
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's first two blocks."""
    folder = tmp_path_factory.mktemp("model") / "short"
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(folder / "model.safetensors")
    later = tuple(f"model.layers.{index}." for index in range(2, 10))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(later)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("launcher", "pruner", "more"),
    [
        ("torchrun", "wanda", ["evaluator=perplexity"]),
        ("forked", "sparsegpt", ["evaluator=perplexity"]),
        ("forked", "besa", ["evaluator=perplexity", "model.load=streamed", "pruner.batch_size=3"]),
        ("forked", "besa_paper", ["evaluator=none"]),
        ("forked", "wanda", ["evaluator=none", "update=dsnot"]),
    ],
)
def test_two_processes_give_the_masks_losses_and_scores_of_one(short, tokens, tmp_path, launcher, pruner, more):
    given = [f"model.path={short}", f"calibration.path={tokens}", f"pruner={pruner}", *more]
    given += [] if more[0] == "evaluator=none" else [f"evaluator.perplexity_sets=[{tokens}]"]
    assert main([*KEYS, *given, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    command = [*KEYS, *given, f"hydra.run.dir={tmp_path / 'two'}"]
    done = run_ready("two_ranks.py", *command) if launcher == "forked" else on_two(*command)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("block 2 of 2") == 1  # one rank speaks
    # All rows of besa_paper start at one half, and floor(alpha in) tips on the last bit. Two weights that SparseGPT
    # exchanges alter what it chooses in all later columns of their row, and the next block's inputs.
    tips = pruner in ("besa_paper", "sparsegpt")
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two", loss=5e-3 if tips else 1e-3)
    if "update=dsnot" not in more:
        assert_weights_of_least_score_went(tmp_path / "two")
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=5e-3 if tips else 1e-3)
    assert two["zero_shot"].keys() == one["zero_shot"].keys()  # values: of one and the same model, below


def steps_of(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "recovery_step"]


@pytest.mark.parametrize(("recovery", "batch", "shared"), [("full", 3, []), ("blocks", 3, []), ("full", 4, SHARDED)])
def test_two_processes_recover_as_one_does(short, tokens, tmp_path, recovery, batch, shared):
    """A step's three windows are dealt out unevenly, and gradients are summed over the ranks; or the model is dealt
    out."""
    course = ["recovery.steps=4", "recovery.lr=3e-4", f"recovery.batch_size={batch}", "recovery.checks=2"]
    course.append(f"recovery.held_out={batch + 2}")
    asked = [*KEYS, f"model.path={short}", f"calibration.path={tokens}", "pruner=magnitude", "evaluator=none"]
    asked += [f"recovery={recovery}", *course]
    assert main([*asked, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    done = run_ready("two_ranks.py", *asked, *shared, f"hydra.run.dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stdout
    one, two = (results(tmp_path / name)["recovery"]["loss"] for name in ("one", "two"))
    assert two["before"] == pytest.approx(one["before"], rel=1e-5)
    assert two["after"] == pytest.approx(one["after"], rel=1e-4)
    assert one["after"] < one["before"]
    norms = [[step.get("gradient_norm") for step in steps_of(tmp_path / name)] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # AdamW forgives any factor
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in first.items():
        assert torch.equal(weight == 0, second[name] == 0), name
        assert float((weight - second[name]).abs().mean()) <= 1e-3 * 4 * 3e-4, name  # of what the steps move at most


def test_two_processes_score_a_folder_as_one_does(short, tokens, tmp_path):
    asked = ["evaluate", f"checkpoint={short}", "device=cpu", "evaluator=quick", "evaluator.limit=6"]
    asked.append(f"evaluator.perplexity_sets=[{tokens}]")
    assert main([*asked, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    done = run_ready("two_ranks.py", *asked, f"hydra.run.dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("done: ") == 1  # one rank speaks
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert two["zero_shot"] == one["zero_shot"]
    assert len(two["evaluations"]) == 1
    assert two["blocks"] == one["blocks"]


def test_what_one_process_began_two_finish(unfinished, unbroken, request_arguments):
    done = run_ready("two_ranks.py", *request_arguments, f"hydra.run.dir={unfinished}")
    assert done.returncode == 0, done.stdout
    assert "blocks are already pruned" in done.stdout
    assert_same_but_for_rounding(unbroken, unfinished)
    assert_weights_of_least_score_went(unfinished)


def test_what_two_processes_began_one_finishes(unbroken, request_arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    at_the_second = [str(int(signal.SIGTERM)), "/blocks/000001.json"]
    run_ready("signalled_run.py", *at_the_second, "two_ranks.py", *request_arguments, f"hydra.run.dir={folder}")
    assert main([*request_arguments, f"hydra.run.dir={folder}"]) == 0
    assert "blocks are already pruned" in capsys.readouterr().out
    assert_same_but_for_rounding(unbroken, folder)
    assert_weights_of_least_score_went(folder)


def test_a_failing_rank_ends_all_with_its_error(short, tokens, tmp_path):
    """Only the second rank's samples hold the token whose embedding is zero, which norms without an eps make NaN."""
    broken, folder, ids = tmp_path / "broken", tmp_path / "run", load_file(tokens)["input_ids"]
    shutil.copytree(short, broken)
    weights = load_file(short / "model.safetensors")
    unused = min(set(range(len(weights[EMBEDDING]))) - set(ids.flatten().tolist()))
    weights[EMBEDDING][unused] = 0
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.0}))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    ids[31, 3] = unused  # of the last sample that the second rank owns, on which it checks the blocks
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    given = ["pruner=wanda", "evaluator=none", f"model.path={broken}", f"hydra.run.dir={folder}"]
    done = run_ready("two_ranks.py", *KEYS, *given, f"calibration.path={tmp_path / 'ids.safetensors'}")
    assert done.returncode != 0
    assert "rank 1 failed: model.layers.0" in done.stdout
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert "rank 1 failed: model.layers.0" in status["error"]


def test_a_rank_that_waits_for_a_lost_one_and_hears_no_signal_says_why_and_ends(tmp_path):
    """As in NCCL; torchrun alone would kill it after 30 seconds, and its status would stay `running`."""
    assert run_ready("stuck_rank.py", str(tmp_path / "run"), "run").returncode != 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["error"]) == ("failed", "RunError: rank 1 failed: block 3: the loss is nan")
    assert "block 3: the loss is nan" in (tmp_path / "run" / "run.log").read_text()


def test_an_evaluation_that_waits_for_a_lost_rank_says_why_and_ends(tmp_path):
    assert run_ready("stuck_rank.py", str(tmp_path / "run"), "evaluate").returncode != 0
    assert "the evaluation failed: rank 1 failed: block 3: the loss is nan" in (tmp_path / "run/run.log").read_text()
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_refusal_is_told_once_and_leaves_nothing(tmp_path):
    done = run_ready("two_ranks.py", *KEYS, "sparsity=1.5", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stdout.count("sparsity=1.5: must be in [0, 1)") == 1
    assert "exitcode  : 2" in done.stdout
    assert not (tmp_path / "run").exists()
