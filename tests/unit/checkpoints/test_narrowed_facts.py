"""What headers and config say of a model's parts is what the model itself says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES, MIXTURES, tiny

from besa_exp.checkpoints.narrowed_config import dimensions_of, family_problems
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model
from besa_exp.checkpoints.narrowed_tensors import costs_of_folder


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_folder_tells_the_dimensions_and_costs_of_its_model(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert dimensions_of(config) == dimensions_of_model(model)
    found, expected = costs_of_folder(tmp_path, dimensions_of(config)), costs_of_model(model)
    assert (found.total, found.blocks) == (expected.total, expected.blocks)
    if not family_problems(config, narrows=True):
        assert (found.groups, found.channels) == (expected.groups, expected.channels)
        assert min(found.groups) > 0
        assert min(found.channels) > 0
