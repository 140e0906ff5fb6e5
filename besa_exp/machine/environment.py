"""What a run records of where it ran and what it was asked, with no secret: no environment variable, no user."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "accelerate",
    "besa-exp",
    "datasets",
    "hydra-core",
    "lm-eval",
    "numpy",
    "omegaconf",
    "prodigyopt",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)
MASK = "***"
ABSOLUTE = re.compile(r"(?<![\w.:/~`)*])~?/(?:[^/\s,\[\]()='\"|]+/)*(?=[^/\s])")  # the folders before the last part
SECRET_WORDS = {"token", "secret", "password", "passwd", "key", "apikey", "credential", "credentials", "auth"}
SECRET_VALUES = (  # hub tokens, API keys with a usual prefix, the user part of an address
    re.compile(r"\b(?:hf|api_org|wandb_v1|ghp|github_pat|sk)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git commit of the project (None outside a checkout), device and threads: equal for equal set-ups."""
    import torch

    commit, modified = _git_state(Path(__file__).parent)
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "git_commit": commit,
        "git_modified": modified,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def without_folders(value: Any) -> Any:
    """`value` with the last part alone of each absolute path in its texts: where things lie is private."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_folders(item) for item in value]
    return ABSOLUTE.sub("", value) if isinstance(value, str) else value


def masked(value: Any, name: str = "") -> Any:
    """`value` with `***` for the text under every key that names a secret and for what looks like one in other text."""
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [masked(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_WORDS & set(re.split(r"[^a-z0-9]+", name.lower())):
        return MASK
    for pattern in SECRET_VALUES:
        value = pattern.sub(MASK, value)
    return value


def masked_command(arguments: Sequence[str]) -> list[str]:
    """The words of a command, `key=value` ones masked as a configuration is."""
    words = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        words.append(f"{masked(key)}{equals}{masked(value, key)}" if equals else masked(argument))
    return words


@cache
def version_of(package: str) -> str | None:
    """Of an installed package; None: it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout that tracks this very package, and whether tracked files differ from it.

    An installed package may lie inside the checkout of something else, hence the look at whether it is tracked."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "rev-parse", "HEAD"), bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # beside a commit that is being made
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _processor() -> str:
    """The CPU's model name, else its architecture."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
