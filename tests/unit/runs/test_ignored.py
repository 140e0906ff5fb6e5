"""What is ignored stays dense, and the target is met over the rest, whatever prunes, updates or deals out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

import besa_exp
from besa_exp.blocks.ignored import check_ignored
from besa_exp.checkpoints.files import masks_description
from besa_exp.errors import ConfigurationError
from besa_exp.presets import preset
from besa_exp.report.depth import allocation
from besa_exp.report.read import read_report
from besa_exp.runs.prune import prune as prune_into
from besa_exp.runs.rebuild import Masks, rebuild
from besa_exp.settings import EvaluatorSettings, ModelSettings, RunSettings, SaveSettings, TrackerSettings
from besa_exp.texts.tokens import write_token_file

TOKENS = torch.randint(0, 258, (8, 16), generator=torch.Generator().manual_seed(1))
IGNORE = ("0.*", "3.*", "*.mlp.down_proj", "2.self_attn.[qk]_proj")  # first and last block whole
ASKED = [
    {"pruner": "magnitude"},
    {"pruner": "sparsegpt"},
    {"pruner": "besa"},
    {"pruner": "wanda", "pattern": "2:4"},
    {"pruner": "best"},
    {"pruner": "wanda", "budget": "owl"},
    {"pruner": "quantise_then_wanda", "budget": "owl"},
    {"pruner": "wanda", "budget": "alpha", "update": "obs"},
    {"pruner": "wanda", "budget": "learned"},
    {"pruner": "wanda", "budget": "atp"},
]


def tiny():
    return tiny_llama(context=32, num_hidden_layers=4)


def is_dense(name: str) -> bool:
    return any(part in name for part in (".layers.0.", ".layers.3.", "down_proj", ".2.self_attn.q", ".2.self_attn.k"))


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked.values()))
def test_ignored_linears_stay_and_the_rest_meets_the_target(asked: dict[str, Any]) -> None:
    dense, model = tiny().state_dict(), tiny()
    report = besa_exp.prune(model, None, TOKENS, batch_size=4, ignore=IGNORE, **asked)
    pruned = [name for name in dense if "_proj" in name and not is_dense(name)]
    assert sorted(report.keep_masks) == sorted(pruned)
    state = model.state_dict()
    assert all(torch.equal(state[name], dense[name]) for name in dense if "_proj" in name and name not in pruned)
    zeros = sum(int((state[name] == 0).sum()) for name in pruned)
    assert zeros == round(0.5 * sum(dense[name].numel() for name in pruned))
    assert [len(block.linears) for block in report.blocks] == [0, 6, 4, 0]
    assert [block.sparsity for block in report.blocks][::3] == [0, 0]


def test_a_part_of_a_block_that_is_ignored_is_no_part_of_its_own() -> None:
    model, dense = tiny(), tiny().state_dict()
    pruner = replace(preset("pruner", "besa"), scope="sub_block")
    report = besa_exp.prune(model, None, TOKENS, batch_size=4, pruner=pruner, ignore=["*.self_attn.*"])
    assert all(torch.equal(weight, dense[name]) for name, weight in model.state_dict().items() if "attn" in name)
    assert {name.split(".")[3] for name in report.keep_masks} == {"mlp"}
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_patterns_that_match_nothing_or_all_are_refused() -> None:
    names = ["0.mlp.up_proj", "1.mlp.up_proj"]
    assert check_ignored(("1.*",), names) == []
    (nothing,) = check_ignored(("1.mlp.up", "0.*"), names)
    assert "did you mean 1.mlp.up_proj" in nothing
    (everything,) = check_ignored(("0.*", "*.up_proj"), names)
    assert "nothing is pruned" in everything
    with pytest.raises(ConfigurationError, match="matches no linear"):
        besa_exp.prune(tiny(), None, TOKENS, pruner="magnitude", ignore=["9.*"])


def test_a_run_says_what_it_ignored_and_its_masks_rebuild_it(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "dense")
    write_token_file(TOKENS, tmp_path / "tokens.safetensors")
    settings = RunSettings(
        model=ModelSettings("dense", str(tmp_path / "dense")),
        calibration=replace(preset("calibration", "c4"), path=str(tmp_path / "tokens.safetensors"), batch_size=4),
        pruner=preset("pruner", "wanda"),
        pruner_name="wanda",
        evaluator=EvaluatorSettings("none"),
        tracker=TrackerSettings("none"),
        ignore=("0.*",),
        save=SaveSettings(verify=False),
    )
    results = prune_into(settings, tmp_path / "runs" / "one")
    assert (results["ignore"], results["measured_sparsity"], results["linears"]) == (["0.*"], 0.5, 21)
    assert "- Kept dense: 0.\\*" in (tmp_path / "runs" / "one" / "model" / "README.md").read_text()
    run = besa_exp.load_run(tmp_path / "runs" / "one")
    assert sorted({name.split(".")[2] for name in run.masks()}) == ["1", "2", "3"]
    masks = run.folder / "masks.safetensors"
    rebuild(Masks(masks, masks_description(masks)), settings.model, tmp_path / "again", ["besa"])
    saved, again = (folder / "model.safetensors" for folder in (run.folder / "model", tmp_path / "again"))
    assert saved.read_bytes() == again.read_bytes()
    (read,) = read_report([str(tmp_path / "runs")]).runs
    assert read.method.label == "wanda, ignore=0.*"
    assert read.weights == sum(w.numel() for name, w in model.state_dict().items() if "_proj" in name)
    assert allocation(read).counts[0] == (None,) * 7
