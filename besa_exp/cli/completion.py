"""Completion in the shell: commands here, everything after a command that Hydra composes by Hydra.

Hydra's script calls `besa -sc query=bash` with the line so far in COMP_LINE and takes its first word for the program;
so the command is taken out before Hydra sees the line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

COMPOSED_FROM = {"prune": "prune", "prefetch": "prune", "evaluate": "evaluate"}  # command to its file in conf/


def complete(arguments: Sequence[str], commands: Sequence[str]) -> int:
    """Answers `install=SHELL`, `uninstall=SHELL` and `query=SHELL`."""
    from besa_exp.cli.prune import hydra_flags

    if not any(argument.startswith("query=") for argument in arguments):
        return hydra_flags(["-sc", *arguments])
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) < 3:
        print(" ".join(command for command in commands if command.startswith(words[-1] if len(words) > 1 else "")))
        return 0
    if words[1] == "show":
        from besa_exp.presets import groups, presets

        names = (f"{group}={name}" for group in groups() for name in presets(group))
        print(" ".join(name for name in names if name.startswith(words[-1])))
        return 0
    if words[1] not in COMPOSED_FROM:
        return 0
    os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return hydra_flags(["-sc", *arguments], COMPOSED_FROM[words[1]])
