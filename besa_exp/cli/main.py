"""The command line: which command is meant. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name

from besa_exp import __version__
from besa_exp.errors import ConfigurationError, Interrupted, RunError, did_you_mean
from besa_exp.machine.process import command_line, speaks_first
from besa_exp.machine.streams import exit_code_of

COMPOSED_FROM = {"prune": "prune", "prefetch": "prune", "evaluate": "evaluate"}  # command to its file in conf/
PATIENCE = 60.0  # seconds in which the first of several processes that are refused may say so, on a busy machine
HELP = """\
besa: prunes language models block by block (BESA, arXiv 2402.16880) and compares methods.

  besa prune [key=value ...]     prune a model; with no arguments the embedded one: no network, account or GPU
  besa prune -m key=a,b,c ...    a sweep: one job for each value
  besa evaluate checkpoint=DIR   score a model folder, run folder or hub id; the scores join the run's results
  besa tune checkpoint=DIR recovery=NAME
                                 tune a pruned model while its zeros stay zero
  besa masks apply MASKS --model DIR --out DIR
                                 rebuild a pruned model from dense weights and a run's masks.safetensors
  besa compare DIR...            compare finished runs in one sorted table (--latex, --csv)
  besa report DIR... [--out DIR]
                                 write one page, tables and figures that compare runs and sweeps
  besa status DIR...             show which runs are running, failed (and why) or left
  besa generate DIR [--prompt TEXT] [--chat]
                                 generate text with a run's model and, beside it, the dense one
  besa prefetch [key=value ...]  download what a run with these keys needs from the hub, or list what is missing
  besa list [group ...]          list the presets, one line each (--json: for programs)
  besa show GROUP=PRESET         explain a preset's keys: meaning, type, value; besa show: the other keys of a run
  besa --version

  besa prune --help              list all groups, keys and flags
  besa prune --cfg job           show the configuration of a run without running it
  eval "$(besa -sc install=bash)"  complete commands, presets and keys with Tab (zsh too)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a failure inside a run, 2 for a request that is refused,
    130 and 143 for one that was interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command not in COMMANDS:
        print(f"besa: {command}: no such command{did_you_mean(command, COMMANDS)}", file=sys.stderr)
        print(f"commands: {', '.join(name for name in COMMANDS if name[0] != '-')}; besa --help", file=sys.stderr)
        return 2
    try:
        _check_text(rest)
        with command_line(["besa", *arguments]):
            code = resolve_name(COMMANDS[command])(rest)
        sys.stdout.flush()
        return code if command in WORKING else exit_code_of(sys.stdout, code)
    except ConfigurationError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        count = "1 problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
        lines = [f"besa {command}: {count}, nothing was done", *(f"  - {problem}" for problem in error.problems)]
        _tell_refusal("\n".join(lines))
        return 2
    except RunError as error:
        print(f"besa {command}: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"besa: interrupted: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("besa: interrupted; run the same command again to resume", file=sys.stderr)
        return 130


def _check_text(words: Sequence[str]) -> None:
    """ConfigurationError: bytes that are no UTF-8, which Python keeps as halves of surrogate pairs."""
    odd = [word for word in words if any("\ud800" <= letter <= "\udfff" for letter in word)]
    if odd:
        rule = "is not UTF-8: neither results.json nor safetensors can hold such a name; rename the file or folder"
        raise ConfigurationError(*(f"{word!a}: {rule}" for word in odd))


def _tell_refusal(text: str) -> None:
    """On stderr. Of several processes the first of a machine tells it; torchrun ends the others while they wait, where
    that one is refused too."""
    if not speaks_first():
        time.sleep(PATIENCE)
    print(text, file=sys.stderr, flush=True)


def _help(_: Sequence[str]) -> int:
    print(HELP, end="")
    return 0


def _version(_: Sequence[str]) -> int:
    print(f"besa-exp {__version__}")
    return 0


def _list(arguments: Sequence[str]) -> int:
    import argparse
    import json

    from besa_exp.presets import listed, listing

    parser = argparse.ArgumentParser(
        prog="besa list", allow_abbrev=False, description="Lists the presets, one line each."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="pruners, models, ... (default: all groups)")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="list your own presets in DIR too")
    parser.add_argument("--json", action="store_true", help="{group: {preset: line}}, for programs")
    asked = parser.parse_args(arguments)
    wanted = asked.groups, asked.config_dir
    print(json.dumps(listed(*wanted), indent=1, ensure_ascii=False) if asked.json else listing(*wanted))
    return 0


def _complete(arguments: Sequence[str]) -> int:
    """Answers the shell: commands here, everything after a command that Hydra composes by Hydra, whose script calls
    `besa -sc query=bash` with the line so far in COMP_LINE and takes its first word for the program; so the command is
    taken out before Hydra sees the line."""
    from besa_exp.cli.prune import hydra_flags

    if not any(argument.startswith("query=") for argument in arguments):
        return hydra_flags(["-sc", *arguments])
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) < 3:
        names, begun = [name for name in COMMANDS if name[0] != "-"], words[-1] if len(words) > 1 else ""
        print(" ".join(name for name in names if name.startswith(begun)))
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


# Imported when they are called: torch and Hydra take seconds.
COMMANDS: Mapping[str, str] = {
    "prune": "besa_exp.cli.prune:prune",
    "evaluate": "besa_exp.cli.evaluate:evaluate",
    "tune": "besa_exp.cli.tune:tune",
    "masks": "besa_exp.cli.masks:masks",
    "prefetch": "besa_exp.cli.prefetch:prefetch",
    "list": "besa_exp.cli.main:_list",
    "show": "besa_exp.cli.show:show",
    "compare": "besa_exp.cli.compare:comparison",
    "status": "besa_exp.cli.status:status",
    "generate": "besa_exp.cli.generate:generate",
    "report": "besa_exp.report.command:report",
    "--help": "besa_exp.cli.main:_help",
    "-h": "besa_exp.cli.main:_help",
    "help": "besa_exp.cli.main:_help",
    "--version": "besa_exp.cli.main:_version",
    "-sc": "besa_exp.cli.main:_complete",
    "--shell-completion": "besa_exp.cli.main:_complete",
}
WORKING = ("prune", "evaluate", "tune", "masks", "prefetch", "report")  # whose output is not all that they are for
