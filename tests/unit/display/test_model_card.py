"""The model card says what a reader of a pruned model needs to know."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from besa_exp.display.model_card import base_licence, model_card, renewed_card
from besa_exp.evaluation.simulated_speed import MODEL

LINEARS = {
    "self_attn.q_proj": {"weights": 100, "pruned": 40, "sparsity": 0.4},
    "mlp.experts.0.w1": {"weights": 1000, "pruned": 500, "sparsity": 0.5},
    "mlp.experts.1.w1": {"weights": 1000, "pruned": 700, "sparsity": 0.7},
}
RESULTS = {
    "model": "/home/somebody/tiny",
    "pruner": "besa",
    "pattern": "unstructured",
    "seed": 7,
    "target_sparsity": 0.6,
    "measured_sparsity": 0.5905,
    "calibration": {"name": "c4", "num_samples": 128, "seq_len": 2048, "tokens_sha256": "x"},
    "blocks": [{"index": 0, "linears": LINEARS}, {"index": 1, "linears": LINEARS}],
    "perplexity": {"wikitext2": 6.25, "ptb": None},
    "zero_shot": {"piqa": {"acc,none": 0.75, "acc_stderr,none": 0.01, "acc_norm,none": 0.5}},
    "dense": {"perplexity": {"wikitext2": 5.5}, "zero_shot": {"piqa": {"acc,none": 0.8}}},
    "unavailable": {"ptb": "no network"},
}
COMMAND = ("/home/somebody/.venv/bin/besa", "prune", "sparsity=0.6", "+hf_token=abc", "model.path=my models/tiny")


def test_the_card_names_method_target_measured_sparsity_and_command() -> None:
    card = model_card(RESULTS, COMMAND, hub_id="org/tiny", revision="abc123")
    assert "[org/tiny](https://huggingface.co/org/tiny), revision `abc123`" in card
    assert "besa, pattern unstructured, seed 7" in card
    assert "target 0.6000, measured 0.5905" in card
    assert "c4, 128 samples of 2048 tokens\n" in card
    chat = RESULTS["calibration"] | {"provenance": {"chat_template": True}}
    assert "2048 tokens of conversations\n" in model_card(RESULTS | {"calibration": chat}, COMMAND)
    assert "besa prune sparsity=0.6 '+hf_token=***' 'model.path=my models/tiny'" in card
    assert "## Command" not in model_card(RESULTS, [])  # of a notebook


def test_a_model_that_was_not_scored_dense_has_no_column_for_it() -> None:
    assert "| measure | pruned |" in model_card({**RESULTS, "dense": {}}, COMMAND)


def test_a_renewed_card_has_the_new_scores_and_keeps_what_it_said_of_the_base(tmp_path: Path) -> None:
    old = model_card(RESULTS, COMMAND, hub_id="org/tiny", licence={"license": "mit"})
    (tmp_path / "README.md").write_text(old)
    scored = RESULTS | {"perplexity": RESULTS["perplexity"] | {"c4": 8.125}}
    renewed = renewed_card(tmp_path, scored, shlex.join(COMMAND), None)
    assert "| perplexity c4 | n/a | 8.1250 |" in renewed
    assert [line for line in renewed.splitlines() if "c4 |" not in line] == old.splitlines()


def test_the_card_says_how_the_model_is_used_and_2_4_products_only_where_there_are_such() -> None:
    card = model_card(RESULTS, COMMAND)
    for word in ("AutoModelForCausalLM", "lm_eval run", "vllm serve", "convert_hf_to_gguf"):
        assert word in card
    assert "to_sparse_semi_structured" not in card
    assert "to_sparse_semi_structured" in model_card({**RESULTS, "pattern": "2:4"}, COMMAND)
    assert "to_sparse_semi_structured" not in model_card({**RESULTS, "pattern": "2:4", "ignore": ["0.*"]}, COMMAND)


def test_no_absolute_path_is_told(tmp_path: Path) -> None:
    hidden = {
        "perplexity": {"/home/somebody/ev.txt": 3.0}, "unavailable": {"x": "/home/somebody/x.txt: there is none"},
        "calibration": RESULTS["calibration"] | {"name": "~/somebody/c.txt"}, "texts": {"Once": "a / b and/or c"},
    }  # fmt: skip
    card = model_card(
        {**RESULTS, **hidden}, [*COMMAND, "evaluator.perplexity_sets=[/home/somebody/ev.txt,c4]"], "org/tiny"
    )
    assert "somebody" not in card
    for kept in (
        "perplexity ev.txt",
        "n/a, x: x.txt: there",
        "c.txt, 128",
        "a / b and/or c",
        "https://huggingface.co/org/tiny",
    ):
        assert kept in card
    assert "'evaluator.perplexity_sets=[ev.txt,c4]'" in card


def test_sets_of_one_file_name_are_told_apart() -> None:
    scores = {"/home/me/wiki/test.txt": 3.0, "/home/me/c4/test.txt": 7.0}
    record = {"max_windows": 2, "num_windows": 2, "windows": 9}
    known = {"perplexity": {"/home/me/c4/test.txt": record}}
    card = model_card({**RESULTS, "perplexity": scores, "dense": {}, "provenance": known}, COMMAND)
    for line in ("| perplexity wiki/test.txt | 3.0000 |", "| perplexity c4/test.txt | 7.0000 |"):
        assert line in card
    assert "- c4/test.txt: scored on 2 of 9 windows" in card


@pytest.mark.parametrize("place", ["/home/somebody/tiny", "models/of/somebody/tiny/"])
def test_the_card_of_a_local_model_does_not_tell_where_it_lies(place: str) -> None:
    card = model_card(RESULTS | {"model": place}, COMMAND)
    assert "# tiny, pruned to 59.1% by besa" in card
    assert "- Base model: tiny\n" in card
    assert "somebody" not in card


@pytest.mark.parametrize(("hub_id", "base"), [("org/tiny", "[org/tiny]"), (None, "tiny\n")])
def test_the_title_has_the_name_that_was_given_and_the_base_model_its_own(hub_id: str | None, base: str) -> None:
    card = model_card(RESULTS | {"model_name": "mine"}, COMMAND, hub_id)
    assert "# mine, pruned to 59.1% by besa" in card
    assert f"- Base model: {base}" in card
    assert f"# {hub_id or 'tiny'}, pruned" in model_card(RESULTS | {"model_name": "tiny"}, COMMAND, hub_id)


def test_the_card_gives_the_sparsity_of_each_linear_type() -> None:
    card = model_card(RESULTS, COMMAND)
    assert "| self_attn.q_proj | 200 | 80 | 0.4000 |" in card
    assert "| mlp.experts.w1 | 4,000 | 2,400 | 0.6000 |" in card


def test_the_card_sets_scores_beside_the_dense_ones_with_reasons_for_gaps() -> None:
    card = model_card(RESULTS, COMMAND)
    assert "| perplexity wikitext2 | 5.5000 | 6.2500 |" in card
    assert "| perplexity ptb" not in card
    assert "| piqa acc | 0.8000 | 0.7500 |" in card
    assert "| piqa acc_norm | n/a | 0.5000 |" in card
    assert "- n/a, ptb: no network" in card
    assert "stderr" not in card


def test_a_card_without_scores_has_no_table_of_them() -> None:
    unscored = {key: value for key, value in RESULTS.items() if key not in ("perplexity", "zero_shot", "dense")}
    assert "## Scores" not in model_card(unscored, COMMAND)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_card_says_that_zeros_save_nothing_by_themselves(pattern: str) -> None:
    card = model_card({**RESULTS, "pattern": pattern}, COMMAND)
    assert "same disk space, memory and time as the dense one" in card
    assert ("unstructured zeros save neither memory nor time" in card) == (pattern == "unstructured")


def test_the_front_matter_is_yaml_and_claims_a_hub_model_only_where_there_is_one() -> None:
    for hub_id in ("org/tiny", None):
        front = yaml.safe_load(model_card(RESULTS, COMMAND, hub_id=hub_id).split("---\n")[1])
        assert front["library_name"] == "transformers"
        assert front.get("base_model", "no such claim") == (hub_id or "no such claim")


def test_simulated_speed_is_called_simulated_in_the_title_and_the_heads() -> None:
    row = {"dense_cycles": 4096.0, "sparse_cycles": 2048.0, "speed_up": 2.0, "sparsity": 0.5}
    card = model_card({**RESULTS, "simulated_speed": {"model": MODEL, "linears": {"mlp.up_proj": row}}}, COMMAND)
    assert "## Speed, simulated, not measured: ViTCoD" in card
    assert "| simulated cycles | simulated speed-up |" in card
    assert "| mlp.up_proj | 0.5000 | 4,096.0 | 2,048.0 | 2.000x |" in card
    assert "imulated" not in model_card(RESULTS, COMMAND)


@pytest.mark.parametrize(("size", "said"), [(None, "each output channel"), (64, "every 64 inputs")])
def test_the_card_says_what_the_weights_were_rounded_to(size: int | None, said: str) -> None:
    card = model_card({**RESULTS, "quantisation": {"bits": 3, "group_size": size}}, COMMAND)
    assert f"rounded to 3 bits with a scale for {said}, stored dequantised" in card
    assert "bits" not in model_card({**RESULTS, "quantisation": None}, COMMAND)


def test_the_licence_tags_of_the_base_model_are_handed_on_and_a_card_without_them_claims_none(tmp_path) -> None:
    card = tmp_path / "README.md"
    assert base_licence(tmp_path) == {}
    card.write_text("---\nlicense: other\nlicense_name: llama3\ntags: [a]\n---\n# Base\n\n---\nlicense: mit\n---\n")
    front = yaml.safe_load(model_card(RESULTS, COMMAND, licence=base_licence(tmp_path)).split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "llama3")
    for told in ("# Base\n\n---\nlicense: mit\n---\n", "---\n: [\n---\n", "---\nlicense: [mit]\n---\n"):
        card.write_text(told)
        assert base_licence(tmp_path) == {}
    assert "license" not in model_card(RESULTS, COMMAND)


def test_the_card_tells_what_was_removed_whole_and_what_was_tuned() -> None:
    size = {"dense": 4, "left": 3}
    narrowed = {"kind": "narrowed", "index": 2, "groups": size, "channels": {"dense": 8, "left": 8}, "parameters": size}
    structure = {"method": "by_hand", "num_blocks": 4, "weights": size}
    structure |= {"blocks": [{"kind": "removed", "index": 1, "parameters": 9}, narrowed]}
    recovery = {"method": "full", "loss": {"before": 3.5, "after": 3.25}, "steps": 9, "best_step": 6, "tokens": 4096}
    told = {"structure": structure, "parameters": {"dense": 1000, "left": 880}}
    card = model_card({**RESULTS, **told, "recovery": recovery | {"stopped": None}}, COMMAND)
    assert "- Removed whole: 1 of 4 blocks (index 1), 1 groups of heads in 1 blocks by by_hand; 880 of 1,000" in card
    assert "- Recovery: full, 9 steps on 4,096 tokens, the weights after step 6 kept; held-out loss 3.5000 bef" in card
    assert "does save disk space" in card
    assert "Removed whole" not in model_card(RESULTS, COMMAND)
