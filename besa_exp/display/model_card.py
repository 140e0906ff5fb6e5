"""The README.md of a pruned model folder: what it is, how it was made, how sparse it is and what it scores."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from besa_exp.blocks.sparsity_table import type_counts
from besa_exp.display.markdown import escaped, markdown_table
from besa_exp.display.missed_target import told_miss
from besa_exp.display.rows import compared, cost_table, scored, short_label, speed_table, stage_lines, text_table
from besa_exp.evaluation.score import Score, partly_scored, set_names, skipped_parts
from besa_exp.machine.environment import masked_command, without_folders

FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
LICENCE_TAGS = ("license", "license_name", "license_link")
SAVES_NOTHING = (
    "The zeros are stored as ordinary dense numbers. This checkpoint takes the same disk space, memory and time as the "
    "dense one: unstructured zeros save neither memory nor time on today's hardware."
)
SAVES_WHEN_CONVERTED = (
    "The zeros are stored as ordinary dense numbers: as it is, this checkpoint takes the same disk space, memory and "
    "time as the dense one. Hardware and software that know an N:M pattern (2:4 today) can use it after a conversion."
)
SAVES_WHAT_IS_GONE = "What was removed whole is not stored: that part does save disk space, memory and time."
USES = """\
It is a plain Hugging Face folder, called `FOLDER` here:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```

```
lm_eval run --model hf --model_args pretrained=FOLDER --tasks piqa
vllm serve FOLDER                                                     # as a dense model
python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile model.gguf    # as a dense model
```

besa-exp's tests load such folders with transformers and lm-eval; vLLM and llama.cpp were not tried."""
SEMI_STRUCTURED = """\
Its 2:4 zeros save time and memory where the linears are converted, on a CUDA device of compute capability 8.0 or more
and in 16 bits (besa-exp's tests do not cover this):

```python
import torch
from torch.sparse import to_sparse_semi_structured

model = model.to("cuda", torch.float16)
for linear in model.model.layers.modules():
    if isinstance(linear, torch.nn.Linear):
        linear.weight = torch.nn.Parameter(to_sparse_semi_structured(linear.weight))
```"""


def model_card(
    results: Mapping[str, Any],
    command: Sequence[str],
    hub_id: str | None = None,
    revision: str | None = None,
    licence: Mapping[str, str] | None = None,
) -> str:
    """Markdown from the content of results.json (without scores: a card that names none) and the command's words, if
    there was one.

    `hub_id` is the dense model's name on the Hugging Face hub, where it has one, `licence` what its own card says of
    that (`base_licence`). The title has the name that was given to the run's model, the base model its own. The
    program, first word of `command`, is shown as `besa`: where it is installed is private."""
    folder = results["model"].rstrip("/").rpartition("/")[2]  # the last part alone: the rest is private
    given = results.get("model_name")
    name = given if given not in (None, folder) else hub_id or folder
    model = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else escaped(folder)
    target, measured = results["target_sparsity"], results["measured_sparsity"]
    lines = [
        *_front_matter(hub_id, licence or {}),
        f"# {escaped(name)}, pruned to {measured:.1%} by {results['pruner']}",
        "",
        f"- Base model: {model}" + (f", revision `{revision}`" if revision else ""),
        f"- Method: {results['pruner']}, pattern {results['pattern']}, seed {results['seed']}",
        f"- Sparsity of the pruned linears: target {target:.4f}, measured {measured:.4f}"
        + (f"; **{missed}**" if (missed := told_miss(results)) else ""),
    ]
    lines += [*_facts(results), "", _savings(results), "", *_linear_types(results)]
    lines += [
        "",
        *_scores(results),
        *_section("What it says (greedy)", *text_table(results), numbers=False),
        *_section(f"Speed, {(results.get('simulated_speed') or {}).get('model')}", *speed_table(results)),
        *_section("Cost", *cost_table(results)),
        *_use(results),
    ]
    if command:
        lines += ["## Command", "", "```", shlex.join(["besa", *masked_command(command[1:])]), "```", ""]
    return without_folders("\n".join(lines))


def _facts(results: Mapping[str, Any]) -> list[str]:
    """What was left out, done besides, and calibrated on."""
    lines = [f"- Kept dense: {escaped(', '.join(results['ignore']))}"] if results.get("ignore") else []
    lines += [f"- {what}: {escaped(how)}" for what, how in stage_lines(results).items()]
    if quantisation := results.get("quantisation"):
        shared = "each output channel" if (size := quantisation["group_size"]) is None else f"every {size} inputs"
        lines.append(f"- Weights: rounded to {quantisation['bits']} bits with a scale for {shared}, stored dequantised")
    if dense := results.get("dequantised"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in dense["packing"].items())
        lines.append(f"- Dense weights: unpacked from {dense['file']} ({kinds}) and stored as {dense['dtype']}")
    if calibration := results.get("calibration"):
        samples, length = calibration["num_samples"], calibration["seq_len"]
        chat = " of conversations" if (calibration.get("provenance") or {}).get("chat_template") else ""
        lines.append(f"- Calibration: {escaped(calibration['name'])}, {samples} samples of {length} tokens{chat}")
    return lines


def _linear_types(results: Mapping[str, Any]) -> list[str]:
    counts = type_counts(results["blocks"]).items()
    rows = [[name, f"{weights:,}", f"{pruned:,}", f"{pruned / weights:.4f}"] for name, (weights, pruned) in counts]
    table = markdown_table(["linear", "weights", "zeros", "sparsity"], rows, numbers=True)
    return ["## Sparsity by linear type", "", *table]


def base_licence(folder: Path, *more: str) -> dict[str, str]:
    """The licence tags, and `more`, of the model card in a model's folder; none where there is no card or it has
    none."""
    card = folder / "README.md"
    found = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    try:
        tags = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # somebody else's file
        return {}
    known = tags if isinstance(tags, dict) else {}
    return {key: known[key] for key in (*LICENCE_TAGS, *more) if isinstance(known.get(key), str)}


def renewed_card(folder: Path, results: Mapping[str, Any], command: str, revision: str | None) -> str:
    """The card of a model in `folder` with the scores that `results` hold now; what its own says of the base model
    stays."""
    known = base_licence(folder, "base_model")
    return model_card(results, shlex.split(command), known.pop("base_model", None), revision, known)


def _front_matter(hub_id: str | None, licence: Mapping[str, str]) -> list[str]:
    base = [f"base_model: {json.dumps(hub_id)}"] if hub_id else []
    base += [f"{tag}: {json.dumps(value)}" for tag, value in licence.items()]
    return ["---", "library_name: transformers", *base, "tags:", "- pruning", "- sparsity", "- besa", "---", ""]


def _scores(results: Mapping[str, Any]) -> list[str]:
    """The scores, beside those of what the model is compared with where there are some; nothing where nothing was."""
    pruned, (others, own) = scored(results), compared(results)
    if not pruned:
        return []
    every = {head: scored(values) for head, values in others.items()}
    beside = {head: found for head, found in every.items() if any(score.value is not None for score in found.values())}
    known = [score for found in (pruned, *beside.values()) for score in found.values()]
    short = set_names(known)  # the folders' names go, as they are private
    rows = [
        [escaped(short_label(score, short)), *(_number(found.get(label)) for found in beside.values()), _number(score)]
        for label, score in pruned.items()
        if score.value is not None
    ]
    head = ["measure", *beside, own]
    lines = ["## Scores", "", *(markdown_table(head, rows, numbers=True) if rows else [])]
    found, unavailable = pruned.values(), sorted((results.get("unavailable") or {}).items())

    def called(name: str) -> str:
        return escaped(short.get(name, name))

    reasons = [f"- n/a, {called(name)}: {escaped(reason)}" for name, reason in unavailable]
    reasons += [f"- {called(name)}: scored on {part}" for name, part in partly_scored(found).items()]
    reasons += [f"- {called(name)}: {part}" for name, part in skipped_parts(found).items()]
    return [*lines, "", *reasons, *([""] if reasons else [])]


def _number(score: Score | None) -> str:
    return "n/a" if score is None or score.value is None else f"{score.value:.4f}"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    cells = [[escaped(cell) for cell in row] for row in rows]
    return [f"## {title}", "", *markdown_table(head, cells, numbers=numbers), ""] if rows else []


def _savings(results: Mapping[str, Any]) -> str:
    words = SAVES_NOTHING if results["pattern"] == "unstructured" else SAVES_WHEN_CONVERTED
    return words + (f" {SAVES_WHAT_IS_GONE}" if results.get("structure") else "")


def _use(results: Mapping[str, Any]) -> list[str]:
    """What it can be used with; 2:4 products where every linear of every block has them."""
    converts = results["pattern"] == "2:4" and not results.get("ignore")
    return ["## Use", "", USES, "", *([SEMI_STRUCTURED, ""] if converts else [])]
