"""What is recorded of the machine and the request, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from besa_exp.machine.environment import _git_state, environment, masked, masked_command
from besa_exp.run_folder.folder import RunFolder

ROOT = Path(__file__).parents[3]


def test_the_configuration_is_written_in_its_order_with_secrets_masked(tmp_path: Path) -> None:
    config = {
        "model": {"path": "org/name", "hf_token": "hf_secret", "revision": "a" * 40},
        "calibration": {"save_tokens": False, "tokenizer": "llama", "path": "https://user:pass@host/c4.jsonl"},
        "words": ["plain", "hf_" + "Ab1" * 10],
        "api-key": "k", "password": None,
    }  # fmt: skip
    with RunFolder.open(tmp_path) as folder:
        folder.write_config(config)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(written) == ["model", "calibration", "words", "api-key", "password"]
    assert written["model"] == {"path": "org/name", "hf_token": "***", "revision": "a" * 40}
    assert written["calibration"] == {"save_tokens": False, "tokenizer": "llama", "path": "https://***@host/c4.jsonl"}
    assert (written["words"], written["api-key"], written["password"]) == (["plain", "***"], "***", None)


def test_a_command_is_masked_word_by_word() -> None:
    words = masked_command(["besa", "prune", "+hf_token=abc", "sparsity=0.5", "model.path=https://u:p@h/m"])
    assert words == ["besa", "prune", "+hf_token=***", "sparsity=0.5", "model.path=https://***@h/m"]
    assert masked("a key to success") == "a key to success"


def test_the_environment_names_versions_and_device_but_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with RunFolder.open(tmp_path) as folder:
        folder.write_environment(environment(torch.device("cpu")))
    text = (tmp_path / "environment.json").read_text()
    record = json.loads(text)
    assert record["packages"]["torch"] == torch.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (record["device"], record["threads"]) == ("cpu", torch.get_num_threads())
    assert record == environment(torch.device("cpu"))
    assert "0123456789abcdef" not in text


def test_the_environment_names_the_commit_of_the_project() -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    record = environment(torch.device("cpu"))
    assert record["git_commit"] == (head or None)
    assert isinstance(record["git_modified"], bool) == bool(head)


def test_looking_at_the_checkout_takes_no_lock_of_it(tmp_path: Path) -> None:
    """`git status` writes what it found into the index, under the lock that a commit of the user's needs."""
    (tmp_path / "__init__.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    os.utime(tmp_path / "__init__.py", (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    commit, modified = _git_state(tmp_path)
    assert (len(commit or ""), modified) == (40, False)
    assert (tmp_path / ".git" / "index").read_bytes() == before
