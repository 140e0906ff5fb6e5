"""Checks the saved model as others will load it: by transformers, in a fresh process that knows nothing of the run.

`python -m besa_exp.checkpoints.fresh_process` loads a folder with `AutoModelForCausalLM.from_pretrained`, prints the
tensors that are missing or unexpected in the files, and the mean cross-entropy of a few tokens, which must equal
that of the pruned model in the run's memory. It works beside the scoring, so that a run hardly waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import RunError
from besa_exp.machine.memory import free_memory
from besa_exp.machine.process import run_as_process

TOKENS = 64  # of one sample: enough to distinguish models
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative; the devices may differ
SHARE_OF_FREE = 0.5  # of the memory that is free: larger models are not loaded a second time
logger = logging.getLogger(__name__)


def token_loss(model: Any, input_ids: Int[Tensor, "sample seq"]) -> float:
    """Mean cross-entropy of the next token, in fp32."""
    with torch.no_grad():
        logits = model(input_ids.to(next(model.parameters()).device), use_cache=False).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).cpu(), input_ids[:, 1:].flatten().cpu()))


@contextmanager
def reloading(
    folder: Path,
    input_ids: Int[Tensor, "sample seq"],
    expected: float,
    dtype: torch.dtype,
    trust_remote_code: bool,
    routes: bool = False,
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Starts to load `folder` in a fresh process. The yielded function waits for the result, or the reason why there is
    none. RunError, then: the folder does not load, or computes something else than `expected`. The latter is a warning
    where a router `routes` tokens to experts: rounding on another device sends some elsewhere."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = free_memory()
    if size > SHARE_OF_FREE * free:
        reason = (
            f"the model takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; it was reloaded by the run itself"
        )
        yield lambda: {"skipped": reason}
        return
    request = {
        "folder": str(folder.absolute()),
        "input_ids": input_ids.tolist(),
        "trust_remote_code": trust_remote_code,
        "routes": routes,
    }
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        text=True,
    )
    assert process.stdin is not None
    with process:
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            yield lambda: _answer(process, request, expected, TOLERANCE.get(dtype, max(TOLERANCE.values())))
        finally:
            process.kill()


def _answer(
    process: subprocess.Popen[str], request: dict[str, Any], expected: float, tolerance: float
) -> dict[str, Any]:
    said, errors = process.communicate()
    if process.returncode:
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise RunError(f"{request['folder']}: the saved model does not load in a fresh process: {last}")
    return checked(json.loads(said.splitlines()[-1]), request, expected, tolerance)


def checked(found: dict[str, Any], request: dict[str, Any], expected: float, tolerance: float) -> dict[str, Any]:
    """What the results record of a reloaded model. RunError: tensors are missing or left over, or its loss differs."""
    folder = request["folder"]
    if found["lacking"] or found["left"]:
        raise RunError(
            f"{folder}: the saved model does not load as it was: missing tensors {found['lacking']}, unexpected "
            f"tensors {found['left']}"
        )
    if not abs(found["token_loss"] - expected) <= tolerance * abs(expected):
        other = (
            f"{folder}: the saved model computes something else in a fresh process: a loss of "
            f"{found['token_loss']:.6g} a token where the pruned model has {expected:.6g}"
        )
        if not request["routes"]:
            raise RunError(other)
        logger.warning("%s; a router may send tokens to other experts there", other)
    return {"token_loss": found["token_loss"], "expected": expected, "tokens": len(request["input_ids"][0])}


def reloaded(request: dict[str, Any]) -> dict[str, Any]:
    """The loss of the folder's model, and the tensors that its files lack or have left over."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=request["trust_remote_code"],
    )
    model, loading_info = loaded  # transformers' types do not know what output_loading_info does
    loss = token_loss(model.eval(), torch.tensor(request["input_ids"]))
    lacking, left = (sorted(map(str, loading_info[key])) for key in ("missing_keys", "unexpected_keys"))
    return {"token_loss": loss, "lacking": lacking, "left": left}


def _main() -> int:
    found = reloaded(json.loads(sys.stdin.readline()))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    run_as_process(_main)
