"""A streamed run holds a block or three, never the model. End to end because the memory is a process's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ready_process import run_ready
from safetensors.torch import save_file
from tiny_llama import tiny_llama

BLOCKS, HIDDEN, FFN, SAMPLES, SEQ_LEN = 24, 512, 1408, 2, 32
BLOCK_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 308 MB whose blocks have 13 MB each."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": BLOCKS}
    model = tiny_llama(SEQ_LEN, num_attention_heads=8, num_key_value_heads=8, **sizes)
    model.save_pretrained(folder, max_shard_size="60MB")
    save_file({"input_ids": torch.randint(0, 64, (SAMPLES, SEQ_LEN))}, folder / "tokens.safetensors")
    return folder


def test_a_streamed_run_grows_by_three_blocks_and_not_by_the_model(large, tmp_path):
    tokens = large / "tokens.safetensors"
    keys = [f"model.path={large}", "model.dtype=float32", "model.load=streamed", f"calibration.path={tokens}"]
    keys += ["pruner=besa", "evaluator=perplexity", f"evaluator.perplexity_sets=[{tokens}]", "tracker=none"]
    keys += ["save.verify=false"]  # in a process of its own
    done = run_ready("peak_memory.py", "prune", *keys, "device=cpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    grown = int(done.stdout.splitlines()[-1].split()[-1])
    activations = 2 * SAMPLES * SEQ_LEN * HIDDEN * 4
    assert grown < 3 * BLOCK_BYTES + activations + 130e6  # the last for what a run imports late and the allocator keeps
    assert 3 * BLOCK_BYTES + activations + 130e6 < 0.6 * BLOCKS * BLOCK_BYTES  # so that the whole model would show
