"""`besa generate DIR [--prompt TEXT] [skipping=NAME]`: what the pruned model of a run says, the dense one beside it, or
what a model says while it skips, what it says without beside it, and how fast it says either."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from besa_exp.cli.preflight import check_model
from besa_exp.display.terminal import console_of
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.evaluation.checks import PROMPTS
from besa_exp.machine.process import set_before_imports
from besa_exp.run_folder.lookup import check_run, read_group, run_and_model
from besa_exp.settings import EvaluationSettings, ModelSettings

if TYPE_CHECKING:
    import torch

    from besa_exp.checkpoints.load import LoadedModel
    from besa_exp.evaluation.cost import Paired

PLAIN_WIDTH = 120
DESCRIPTION = """\
Continues each prompt, greedily, with the pruned model of a run and with its dense model, side by side. DIR may be any
model folder; where no run made it, there is no dense model to show. With skipping=NAME and its keys (besa list
skippings) the command compares the model in DIR without and with skipping: its texts, and its tokens a second."""
GIVEN = ("skipping", "calibration", "model", "seed", "device", "deterministic")  # keys that a policy is asked with


def generate(arguments: Sequence[str]) -> int:
    """Prints the texts; 0. ConfigurationError: there is no model to load."""
    parser = argparse.ArgumentParser(prog="besa generate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("place", metavar="DIR", help="a run folder that kept its model, or a model folder")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument("--chat", action="store_true", help="format each prompt as a user's turn, by the chat template")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="new tokens at most (default: %(default)s)")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense model out")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument(
        "keys", nargs="*", metavar="key=value", help="skipping=NAME, and the keys of what it is calibrated on"
    )
    asked = parser.parse_intermixed_args(arguments)
    prompts = asked.prompt or list(PROMPTS)
    if asked.tokens < 1 or not all(prompts):
        raise ConfigurationError("--tokens must be at least 1, and a --prompt must not be empty")
    if asked.keys:
        if asked.chat:
            raise ConfigurationError(
                "--chat takes no keys: skipping is compared on plain prompts; leave one of them out"
            )
        return _generate_skipping(asked.place, asked.keys, prompts, asked.tokens, asked.offline)
    models = _models(asked.place, asked.no_dense)
    set_before_imports(offline=asked.offline)
    found = {which: _texts(settings, prompts, asked) for which, settings in models.items()}
    _print_texts(console := console_of(PLAIN_WIDTH), prompts, {which: texts for which, (texts, _) in found.items()})
    if not asked.chat and any(chats for _, chats in found.values()):
        console.print("The tokenizer has a chat template: --chat formats each prompt by it.", style="dim")
    return 0


def _generate_skipping(place: str, keys: Sequence[str], prompts: Sequence[str], tokens: int, offline: bool) -> int:
    """With a policy and without: texts, tokens a second, and what was skipped."""
    settings = _asked(place, keys, offline)
    import torch

    from besa_exp.checkpoints.load import model_context
    from besa_exp.errors import Unavailable
    from besa_exp.evaluation.continuations import continuations, prompt_ids
    from besa_exp.evaluation.cost import paired_speeds
    from besa_exp.evaluation.policies import decide, skipping_of
    from besa_exp.machine.device import prepared_device
    from besa_exp.runs.run import calibration_of

    loaded = _speaking(settings.model, prepared_device(settings), offline)
    calibration, model = settings.calibration, loaded.model
    assert calibration is not None
    try:
        skipping = skipping_of(settings.skipping, lambda: calibration_of(calibration, offline, loaded).input_ids)
        assert skipping is not None
        decided = decide(loaded, skipping)
    except Unavailable as error:
        raise RunError(str(error)) from error
    name = f"skipping={decided.settings.name}"
    said = {"without skipping": continuations(model, loaded.tokenizer, prompts, tokens)}
    with decided.generating(model) as course:
        said[name] = continuations(model, loaded.tokenizer, prompts, tokens)
    console = console_of(PLAIN_WIDTH)
    _print_texts(console, prompts, said)
    ids = prompt_ids(loaded.tokenizer, prompts[0], model.device)
    decoded = max(1, min(tokens, model_context(model) - ids.shape[1]))
    _print_speeds(console, name, paired_speeds(model, lambda: decided.generating(model), ids, decoded))
    what = "blocks of prompt tokens" if decided.policy is None else "FFNs of decoded tokens"
    found = "".join(f"; {key} {value} found" for key, value in decided.found.items() if key != "skipped")
    console.print(f"{100 * course.fraction:.1f} % of the {what} skipped; {torch.get_num_threads()} threads{found}")
    return 0


def _print_speeds(console: Console, name: str, pairs: tuple[Paired, Paired]) -> None:
    table = Table(box=box.SIMPLE, title="tokens a second, one sequence", title_justify="left", show_edge=False)
    for column in ("", "without", name, "quotient"):
        table.add_column(column, justify="right" if column else "left")
    for what, pair in zip(("prefill", "decode"), pairs, strict=True):
        table.add_row(what, f"{pair.plain:,.1f}", f"{pair.under:,.1f}", f"{pair.quotient:.3f}")
    console.print(table)


def _asked(place: str, keys: Sequence[str], offline: bool) -> EvaluationSettings:
    """What `besa evaluate` would be asked, nothing being scored. ConfigurationError: every problem there is."""
    others = [key for key in keys if key.partition("=")[0].partition(".")[0] not in GIVEN]
    if others or not any(key.startswith("skipping=") for key in keys):
        wrong = f"{others[0]}: " if others else ""
        raise ConfigurationError(f"{wrong}besa generate takes skipping=NAME, and keys of {', '.join(GIVEN)} with it")
    from besa_exp.cli.evaluate import CONFIG_NAME, read_asked
    from besa_exp.cli.prune import composed

    words = [f"checkpoint={place}", "evaluator=none", f"offline={str(offline).lower()}", *keys]
    return composed("besa generate", CONFIG_NAME, words, lambda arguments: read_asked(arguments).settings)


def _print_texts(console: Console, prompts: Sequence[str], said: Mapping[str, Sequence[str]]) -> None:
    for number, prompt in enumerate(prompts):
        if number:
            console.print()
        title = Text(prompt, style="bold")
        table = Table(
            box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False, expand=True
        )
        for which in said:
            table.add_column(which, ratio=1, overflow="fold")
        table.add_row(*(Text(texts[number] or "(nothing: it ends the text here)") for texts in said.values()))
        console.print(table)


def _models(place: str, no_dense: bool) -> dict[str, ModelSettings]:
    """The dense model first; without a run there is none."""
    run, path = run_and_model(place)
    if run is None:
        alone = ModelSettings(Path(path).name, path)
        if problems := check_model(alone, "DIR")[1]:
            raise ConfigurationError(*problems)
        return {"model": alone}
    if problems := check_run(run):
        raise ConfigurationError(*(problem.replace("checkpoint=", "") for problem in problems))
    given, structure = read_group(run, "model"), read_group(run, "structure")
    own_code = (structure.get("shape"), structure.get("save")) == ("uneven", "custom_code")  # that the run wrote itself
    pruned = ModelSettings(run.name, path, trust_remote_code=own_code or bool(given.get("trust_remote_code")))
    if no_dense or "path" not in given or given["path"] == path:
        return {"pruned": pruned}
    keys = ("path", "revision", "dtype", "trust_remote_code", "convert")
    dense = ModelSettings(Path(str(given["path"])).name, **{key: given[key] for key in keys if key in given})
    return {"dense": dense, "pruned": pruned}


def _texts(settings: ModelSettings, prompts: Sequence[str], asked: argparse.Namespace) -> tuple[list[str], bool]:
    """What the model says, and whether its tokenizer has a chat template."""
    import torch

    from besa_exp.evaluation.continuations import continuations

    loaded = _speaking(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"), asked.offline)
    chats = bool(getattr(loaded.tokenizer, "chat_template", None))
    if asked.chat and not chats:
        raise ConfigurationError(f"--chat: the tokenizer of {settings.path} has no chat template; leave it out")
    return continuations(loaded.model, loaded.tokenizer, prompts, asked.tokens, asked.chat), chats


def _speaking(settings: ModelSettings, device: torch.device, offline: bool) -> LoadedModel:
    """The model, whole and with its tokenizer. ConfigurationError: it cannot speak."""
    from besa_exp.checkpoints.load import load_model

    loaded = load_model(settings, device, offline, "text that is generated")
    if loaded.tokenizer is None:
        raise ConfigurationError(
            f"{settings.path}: it has no tokenizer, and text needs one; copy the dense model's there"
        )
    return loaded
