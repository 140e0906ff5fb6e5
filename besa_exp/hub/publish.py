"""A finished run's model on the Hugging Face hub, where `save.push_to_hub=owner/name` asks for it: private, unless that
repository is there already and is not.

The hub's own client sends it with the token it finds itself (HF_TOKEN, or `hf auth login`); nothing here reads or
writes one. By then the run is finished: what fails is reported with the command that sends the model later. No torch.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from besa_exp.hub.client import HUB_TIMEOUT
from besa_exp.machine.process import is_leader
from besa_exp.settings import SaveSettings

MESSAGE = "Model pruned with besa-exp"


def check_push(save: SaveSettings, offline: bool) -> list[str]:
    """Why a run could not push its model, in complete sentences."""
    if save.push_to_hub is None:
        return []
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    asked, problems = f"save.push_to_hub={save.push_to_hub}", []
    try:
        validate_repo_id(save.push_to_hub)
        valid = save.push_to_hub.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        problems.append(f"{asked}: must name a repository of the hub as owner/name")
    if not save.model:
        problems.append(f"{asked}: the run would keep no model to push; add save.model=true")
    if offline:
        problems.append(f"{asked}: needs the network, which offline=true forbids; push later: `{later(save)}`")
    elif get_token() is None:
        problems.append(f"{asked}: there is no token for the hub on this machine; `hf auth login`, or set HF_TOKEN")
    return problems


def check_names(names: Sequence[str]) -> list[str]:
    """Jobs of a sweep that would push over each other: each needs a name of its own; an empty one pushes nothing."""
    return [
        f"save.push_to_hub={name}: {names.count(name)} jobs of the sweep would push to it, one over the other; give "
        "each its own, as in 'save.push_to_hub=owner/name-${sparsity}', or push single runs"
        for name in dict.fromkeys(names)
        if name and names.count(name) > 1
    ]


def later(save: SaveSettings, model: Path = Path("RUN/model")) -> str:
    """The command of the hub's own client that does the same."""
    return shlex.join(["hf", "upload", save.push_to_hub or "OWNER/NAME", str(model), ".", "--private"])


def publish(folder: Path, save: SaveSettings) -> None:
    """Push the model of a finished run, if that is asked for, and say so; a failure is reported, and changes
    nothing."""
    if save.push_to_hub is None or not is_leader():
        return
    model = folder / "model"
    try:
        if not model.is_dir():
            raise FileNotFoundError(f"{model} is not there; besa masks apply rebuilds it for methods that only mask")
        print(f"pushed {model} to {_push(model, save.push_to_hub)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is finished and keeps its exit code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"  # the hub's own reason is the last line
        print(
            f"warning: {model} was not pushed to {save.push_to_hub} ({reason}); the run is finished and "
            f"nothing is lost; push it later with `{later(save, model)}`, or give the same command again",
            file=sys.stderr,
        )


def _push(model: Path, repository: str) -> str:
    """The address of the commit. An unchanged folder makes none: the client compares hashes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with suppress(RepositoryNotFoundError):
        api.model_info(repository, timeout=HUB_TIMEOUT)  # does it answer?
    api.create_repo(repository, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=model, commit_message=MESSAGE))
