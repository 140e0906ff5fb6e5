"""What a block's and a model's reports become in JSON, and what they are when they are read again."""

from __future__ import annotations

import json

from besa_exp.blocks.reports import (
    BlockReport,
    LinearReport,
    Narrowed,
    RecoveryReport,
    Removed,
    Size,
    Step,
    StructureReport,
)

LINEARS = (LinearReport("self_attn.q_proj", 8, 3, 0.4), LinearReport("mlp.up_proj", 24, 13, 0.55))
REPORT = BlockReport(3, LINEARS, 0.75, 0.5, 1.5, (Step(3, 0, 0.75, 0.5, 0.25, 0.125),))
STRUCTURE = StructureReport(
    "by_hand",
    4,
    (Removed(1, 100), Narrowed(2, groups=Size(4, 3), channels=Size(8, 6), parameters=Size(100, 80))),
    Size(900, 790),
    Size(1000, 880),
)


def through_json(values):
    return json.loads(json.dumps(values))


def test_a_block_is_the_same_after_it_was_written_and_read():
    assert BlockReport.from_dict(through_json(REPORT.to_dict(steps=True))) == REPORT
    assert "steps" not in REPORT.to_dict()


def test_a_block_of_results_that_do_not_tell_what_was_allocated_is_read():
    old = through_json(REPORT.to_dict())
    for linear in old["linears"].values():
        del linear["allocated"]
    assert [linear.allocated for linear in BlockReport.from_dict(old).linears] == [3 / 8, 13 / 24]


def test_another_number_goes_through_to_the_steps():
    assert REPORT.numbered(5).index == 5
    assert [step.block for step in REPORT.numbered(5).steps] == [5]
    assert REPORT.numbered(5).numbered(3) == REPORT


def test_a_structure_is_the_same_after_it_was_written_and_read():
    read = StructureReport.from_dict(through_json(STRUCTURE.to_dict()), {"dense": 1000, "left": 880})
    assert read == STRUCTURE
    assert read.to_dict()["blocks"][0] == {"kind": "removed", "index": 1, "parameters": 100}


def test_the_blocks_of_the_pruned_model_have_their_numbers_in_the_dense_one():
    assert STRUCTURE.kept == (0, 2, 3)


def test_a_recovery_is_the_same_after_it_was_written_and_read():
    report = RecoveryReport("full", 3.5, 3.25, steps=100, best_step=50, tokens=4096, stopped="the loss is inf")
    assert RecoveryReport.from_dict(through_json(report.to_dict())) == report
