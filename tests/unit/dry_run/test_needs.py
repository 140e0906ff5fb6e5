"""What a dry run predicts is what is then there: exact where the bytes follow from shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from tiny_llama import tiny_llama
from transformers import LlamaForCausalLM

from besa_exp.blocks.activations import allocator
from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.reports import BlockReport
from besa_exp.blocks.units import blocks_together
from besa_exp.checkpoints.files import save_masks, save_model
from besa_exp.checkpoints.inspect import read_header
from besa_exp.checkpoints.streaming import give_back_memory
from besa_exp.display.tables import as_text
from besa_exp.dry_run.block_probe import BlockCost, BlockProbe, cut_down
from besa_exp.dry_run.disk_probe import DiskSpeed
from besa_exp.dry_run.estimate import Estimate, model_size
from besa_exp.dry_run.evaluation_probe import EvaluationCost
from besa_exp.dry_run.inputs import Texts, model_without_weights
from besa_exp.dry_run.meters import PeakMemory
from besa_exp.dry_run.needs import kept_bytes, needs, peak, remedies
from besa_exp.dry_run.plan import Dealing, ModelSize, Plan, Working
from besa_exp.dry_run.search_probe import dealing
from besa_exp.dry_run.seconds import FRESH_PROCESS, seconds
from besa_exp.dry_run.tables import estimate_tables, sweep_table, verdicts
from besa_exp.methods.budgets.alpha import Alpha
from besa_exp.methods.budgets.atp import Atp
from besa_exp.methods.budgets.evopress import EvoPress
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.budgets.trial import Search, Trial
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_paper import BesaPaper
from besa_exp.methods.pruners.magnitude import Magnitude
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.wanda import Wanda
from besa_exp.run_folder.finished_blocks import FinishedBlocks, block_tensors
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings
from besa_exp.tensors.masks import Target

CPU = torch.device("cpu")
HIDDEN, FFN = 64, 96
SIZE = ModelSize(blocks=(1000, 1200), outside=500, masks=250, linears=14, hidden=10, vocabulary=50, itemsize=2)
PLAN = Plan(
    size=SIZE,
    on_cuda=False,
    streamed=False,
    samples=8,
    seq_len=16,
    dense_targets=False,
    own_targets=False,
    together=1,
    dealing=None,
    activations_at="host",
    save_model=True,
    save_masks=True,
    evaluates=True,
    windows_tokens=320,
    steps=0,
    wandb=False,
    libraries=10_000,
    working=Working(statistics=100, forward=300, pruner=700, evaluation=2000),
)


SETTINGS = RunSettings(
    ModelSettings("tiny", "/models/tiny"),
    CalibrationSettings("local"),
    Wanda(),
    "wanda",
    EvaluatorSettings("perplexity", ("/a.txt",), dense=True),
    TrackerSettings("none"),
)


def plan(**changes) -> Plan:
    return dataclasses.replace(PLAN, **changes)


def at(parts, place: str) -> dict[str, int]:
    return {part.part: part.size for part in parts if part.place == place}


def data_bytes(*files: Path) -> int:
    """What the tensors of safetensors files take, their headers left out."""
    ends = [tensor["data_offsets"] for file in files for tensor in read_header(file)[0].values()]
    return sum(end - start for start, end in ends)


def on_disk(folder: Path, **changes) -> tuple[LlamaForCausalLM, Path]:
    model = tiny_llama(32, **changes)
    model.save_pretrained(folder / "dense")
    return model, folder / "dense"


def without_weights(folder: Path, dtype: str = "auto"):
    return model_without_weights(ModelSettings("tiny", str(folder), dtype=dtype), offline=True)


def empty_llama(**changes) -> LlamaForCausalLM:
    with init_empty_weights():
        return tiny_llama(32, **changes)


def probe(pruner, batch_size: int = 4, budget=None) -> BlockProbe:
    model = cut_down(empty_llama(), CPU, blocks_together(pruner))
    return BlockProbe(model, CPU, pruner, Target(0.5), batch_size, allocator("device", CPU, Path(), 0)[1], budget)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_they_are_loaded_and_saved(tied: bool, tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, tie_word_embeddings=tied)
    size = model_size(without_weights(folder))
    assert size.total_bytes == sum(value.numel() * 4 for value in model.parameters())
    save_model(model, None, tmp_path / "saved", "card", shard_size="60KB")
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 1
    assert at(needs(plan(size=size)), "disk")["saved shards"] == data_bytes(*shards)
    assert size.largest_block_bytes * 2 == size.blocks_bytes


def test_the_dtype_that_is_asked_for_counts(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, dtype=torch.bfloat16)
    values = sum(value.numel() for value in model.parameters())
    assert model_size(without_weights(folder)).total_bytes == 2 * values
    assert model_size(without_weights(folder, "float32")).total_bytes == 4 * values


def test_no_weight_is_in_memory_when_a_model_is_measured(tmp_path: Path) -> None:
    model = without_weights(on_disk(tmp_path)[1])
    assert {value.device.type for value in model.parameters()} == {"meta"}


def test_finished_blocks_and_masks_take_the_bytes_that_were_predicted(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path)
    predicted = at(needs(plan(size=model_size(without_weights(folder)))), "disk")
    finished = FinishedBlocks(tmp_path / "blocks")
    finished.begin({})
    masks = {}
    for block in capture_blocks(model, torch.zeros(1, 8, dtype=torch.int64)):
        keep = {f"{block.name}.{name}.weight": linear.weight > 0 for name, linear in block.linears.items()}
        tensors = block_tensors(block.module, block.name)
        finished.write(BlockReport(block.index, (), 0.0, 0.0, 0.0, ()), tensors, keep, "")
        masks |= keep
    written = sorted(finished.folder.glob("*.safetensors"))
    of_masks = [file for file in written if "masks" in file.name]
    assert data_bytes(*of_masks) == predicted["their masks, until the run is done"]
    weights = [file for file in written if file not in of_masks]
    assert data_bytes(*weights) == predicted["finished blocks, until the run is done"]
    save_masks(masks, tmp_path / "masks.safetensors")
    assert data_bytes(tmp_path / "masks.safetensors") == predicted["masks.safetensors"]


@pytest.mark.parametrize("dense_targets", [False, True])
def test_activations_take_what_the_block_loop_asks_for(dense_targets: bool) -> None:
    model = tiny_llama(32).requires_grad_(False)
    ids = torch.randint(0, 258, (4, 16))
    asked = []

    def allocate(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        asked.append(torch.empty(shape, dtype=dtype))
        return asked[-1]

    blocks = capture_blocks(model, ids)
    inputs = embed(model, blocks, ids, 2, allocate)
    pruner = BesaPaper(dense_targets=dense_targets)
    list(prune_blocks(blocks, inputs, pruner, Target(0.5), 2, allocate=allocate))
    size = dataclasses.replace(SIZE, hidden=HIDDEN, itemsize=4)
    predicted = at(needs(plan(size=size, samples=4, seq_len=16, dense_targets=dense_targets)), "host")
    assert predicted["activations and targets"] == sum(room.nbytes for room in asked)


STATISTICS = {
    "magnitude": (Magnitude(), 0),
    "wanda": (Wanda(), 8 * (3 * HIDDEN + FFN)),  # q, k, v share theirs, so do gate and up; o; down
    "sparsegpt": (SparseGPT(), 4 * (3 * HIDDEN**2 + FFN**2)),
    "besa": (Besa(), 8 * (3 * HIDDEN + FFN)),
    "besa_paper, by SparseGPT": (BesaPaper(metric="SparseGPT"), 4 * (3 * HIDDEN**2 + FFN**2)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_shared_statistics_are_counted_once(name: str) -> None:
    pruner, expected = STATISTICS[name]
    assert probe(pruner).cost(samples=4, seq_len=16).statistics == expected


@pytest.mark.parametrize("samples", [3, 8, 20, 128])
def test_the_steps_of_a_search_are_foretold(samples: int) -> None:
    cost = probe(Besa()).cost(samples, seq_len=8)
    assert cost.steps == pytest.approx(samples - num_probe_samples(samples), abs=0.5)
    assert cost.seconds > 0


def test_two_blocks_that_are_pruned_together_are_measured_together() -> None:
    one, two = (probe(Besa(scope=scope)).cost(samples=8, seq_len=8) for scope in ("block", "pair"))
    assert two.steps == one.steps / 2
    assert two.statistics == 2 * one.statistics
    host = at(needs(plan(streamed=True, together=2)), "host")
    assert host["weights of the block at work"] + host["weights pruned together with them"] == 2 * 2400


def test_targets_of_a_blocks_parts_are_counted_once_for_all_samples() -> None:
    found = at(needs(plan(own_targets=True)), "host")
    assert found["targets of a block's parts"] == 8 * 16 * 10 * 2
    on_disk = needs(plan(own_targets=True, activations_at="disk"))
    assert at(on_disk, "host")["targets of a block's parts"] == 8 * 16 * 10 * 2
    wanted = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512
    model = cut_down(empty_llama(hidden_size=256, intermediate_size=512), CPU)
    room = allocator("device", CPU, Path(), 0)[1]
    measured = BlockProbe(model, CPU, Besa(scope="sub_block"), Target(0.5), 4, room).cost(8, 256)
    assert measured.pruner < 10 * wanted * 3


def test_a_budget_holds_its_states_before_the_blocks_are_pruned() -> None:
    parts = needs(plan(dealing=Dealing(passes=40, states=100)))
    state = 16 * 10 * 2
    assert peak([part for part in parts if part.phases == ("budget",)], "host") == (108 * state + 300, "budget")
    assert "states" not in " ".join(part.part for part in needs(PLAN))


def test_a_budget_takes_the_time_of_its_passes_and_of_the_blocks_it_reads() -> None:
    block = BlockCost(1.0, 0.5, 3.0, 0, 0, 0, 0)
    disk, texts = DiskSpeed(0.0, 0.0, 1e-3, 0.0), Texts(8, 16, 0.0, [], [], 0.0, [])

    def pruning(**changes) -> float:
        return seconds(plan(evaluates=False, **changes), texts, 0.0, disk, block, None, 1)["prune"] or 0.0

    dealt = {"dealing": Dealing(passes=40, states=0)}
    assert pruning(**dealt) - pruning() == pytest.approx(40 * 0.5 + 2 * 3.0)
    assert pruning(streamed=True, **dealt) - pruning(streamed=True) == pytest.approx(40 * 0.5 + 2 * 3.0 + 4.4)


def test_the_fresh_process_that_loads_the_saved_model_is_waited_for_where_scoring_it_takes_less() -> None:
    disk, texts = DiskSpeed(0.0, 0.0, 1e-3, 0.0), Texts(8, 16, 0.0, [(20, 16)], [], 0.0, [])

    def save(a_token: float, verified: bool) -> float:
        costs = BlockCost(1.0, 0.5, 0.0, 0, 0, 0, 0), EvaluationCost(0.0, a_token, 16, 0)
        return seconds(plan(verified=verified), texts, 0.0, disk, *costs, 2)["save"] or 0.0

    starts_and_reads = FRESH_PROCESS + 5.4  # 2,700 weights of two bytes
    for a_token in (0.0, 0.01):
        assert save(a_token, True) - save(a_token, False) == pytest.approx(starts_and_reads - 320 * a_token)
    assert save(1.0, True) == save(1.0, False)


def test_a_search_reads_all_blocks_for_each_pass_and_holds_logits_and_a_tried_block() -> None:
    search = Dealing(passes=0, states=0, reads=21, tried_tokens=32)
    parts = at([part for part in needs(plan(dealing=search)) if part.phases == ("budget",)], "host")
    assert parts["budget: logits of a tried model"] == 5 * 32 * 50 * 4
    assert parts["budget: a tried block and its ranks"] == 1200 * 2 + 1200 * 2
    disk, texts = DiskSpeed(0.0, 0.0, 1e-3, 0.0), Texts(8, 16, 0.0, [], [], 0.0, [])
    block = BlockCost(1.0, 0.5, 0.0, 0, 0, 0, 0)
    streamed = seconds(plan(evaluates=False, streamed=True, dealing=search), texts, 0.0, disk, block, None, 1)
    without = seconds(plan(evaluates=False, streamed=True), texts, 0.0, disk, block, None, 1)
    assert (streamed["prune"] or 0) - (without["prune"] or 0) == pytest.approx(21 * 4.4)


@pytest.mark.parametrize("budget", [Atp(), EvoPress(generations=2, tokens=(1024, 2048))])
def test_what_a_search_is_expected_to_hold_is_what_it_holds(budget: Search) -> None:
    model = tiny_llama(256, vocab_size=4096, hidden_size=256, num_hidden_layers=3).requires_grad_(False)
    tokens = torch.randint(0, 4096, (16, 256), generator=torch.Generator().manual_seed(0))
    blocks = capture_blocks(model, tokens)
    inputs, outputs = (embed(model, blocks, tokens, 4) for _ in range(2))
    asked = dealing(budget, 3, 16, 256, 0.5)
    expected = plan(size=model_size(model), samples=16, seq_len=256, dealing=asked)
    there = {"budget: inputs", "budget: forward pass at work"}  # before the search, and too little to count
    parts = [part for part in needs(expected) if part.phases == ("budget",) and part.part not in there]
    give_back_memory()
    with PeakMemory(CPU) as memory:
        before = memory.now()
        trial = Trial.begin(lambda: blocks, inputs, outputs, head_of(model, blocks, tokens), 4)
        budget.search(trial, 0.5, Progress())
        held = memory.lap() - before + outputs.nbytes
    assert 0.7 < held / sum(part.size or 0 for part in parts) < 1.3


def test_what_a_budget_does_besides_its_passes_is_measured() -> None:
    with_alpha, without = (probe(Wanda(), budget=budget).cost(4, 8).budget_seconds for budget in (Alpha(), None))
    assert with_alpha > 3 * without


def test_a_search_holds_ranks_masked_weights_and_gradients_while_it_decides() -> None:
    model = empty_llama(hidden_size=512, intermediate_size=1024)
    room = allocator("device", CPU, Path(), 0)[1]
    measured = BlockProbe(cut_down(model, CPU), CPU, Besa(), Target(0.5), 4, room).cost(4, 16)
    weights = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024
    assert 10 * weights * 0.8 < measured.pruner < 10 * weights * 2  # int16 ranks, fp32 buffers, fp32 gradients


def test_the_model_that_is_measured_keeps_one_block_of_its_own_shape() -> None:
    cut = cut_down(empty_llama(), CPU)
    assert len(cut.model.layers) == 1
    assert cut.model.layers[0].mlp.down_proj.weight.shape == (HIDDEN, FFN)
    assert torch.isfinite(cut(torch.zeros(1, 8, dtype=torch.int64)).logits).all()


def test_a_place_needs_the_most_that_one_phase_holds() -> None:
    weights, activations = 2 * 2700, 40 * 16 * 10 * 2 * 2
    pruning = needs(plan(samples=40))
    assert peak(pruning, "host") == (10_000 + weights + activations + 100 + 700, "prune")
    assert peak(needs(PLAN), "host") == (10_000 + 2 * weights + 2000, "evaluate")  # the saved model beside the first
    assert peak(pruning, "device") == (0, "load")


def test_a_streamed_model_holds_a_block_and_saves_by_links() -> None:
    parts = needs(plan(streamed=True, links_blocks=True, evaluates=False))
    host = at(parts, "host")
    assert (host["weights outside the blocks"], host["weights of the block at work"]) == (1000, 2400)
    assert "weights" not in host
    assert at(parts, "disk")["saved shards"] == 1000
    of_mixture = at(needs(plan(streamed=True)), "disk")  # its experts are saved apart
    assert of_mixture["saved shards"] == SIZE.total_bytes
    assert at(needs(plan(streamed=True)), "host")["evaluation: hidden states"] == 320 * 10 * 2


def test_a_gpu_holds_weights_and_work_and_the_host_what_is_on_its_way() -> None:
    parts = needs(plan(on_cuda=True, activations_at="host"))
    assert at(parts, "device").keys() >= {"weights", "statistics of a block", "pruner and forward pass at work"}
    assert at(parts, "host").keys() == {"Python and libraries", "weights on their way", "activations and targets"}
    streamed = needs(plan(on_cuda=True, streamed=True, activations_at="disk"))
    assert at(streamed, "host") == {"Python and libraries": 10_000, "a block on its way": 2400}
    assert "activations and targets" in at(streamed, "disk")


def test_masks_alone_leave_little_but_need_the_finished_blocks_meanwhile() -> None:
    alone = plan(save_model=False)
    assert kept_bytes(PLAN) - kept_bytes(alone) == SIZE.total_bytes
    assert at(needs(alone), "disk")["finished blocks, until the run is done"] == SIZE.blocks_bytes
    assert "saved shards" not in at(needs(alone), "disk")


def test_the_largest_part_of_the_peak_is_the_first_to_be_made_smaller() -> None:
    assert remedies(needs(PLAN), "host")[0] == "model.load=streamed"
    many = needs(plan(samples=1000))
    assert remedies(many, "host")[0].startswith("activations=disk or a smaller calibration.num_samples")
    logits = needs(plan(working=dataclasses.replace(PLAN.working, evaluation=10**6)))
    assert remedies(logits, "host")[0] == "evaluator.batch_size=1"


def estimated(**changes) -> Estimate:
    times = {
        "load": 1.0,
        "calibrate": 2.0,
        "prune": 90.0,
        "save": 3.0,
        "evaluate": 4.0,
        "one block": 45.0,
        "total": 100.0,
    }
    values = {
        "settings": SETTINGS,
        "folder": Path("outputs/run"),
        "device": CPU,
        "parts": needs(PLAN),
        "kept": 4000,
        "blocks": 2,
        "seconds": times,
        "free": {"host": 10**9, "disk": 10**9},
        "notes": [],
    }
    return Estimate(**(values | changes))


def test_what_does_not_fit_is_said_with_the_remedy() -> None:
    assert all(": fits: " in line for line in verdicts(estimated()))
    pruning = needs(plan(samples=1000, save_model=False))
    host, disk = verdicts(estimated(parts=pruning, free={"host": 10_000, "disk": 100}))
    assert "memory of the host: does NOT fit" in host
    assert "try activations=disk or a smaller calibration.num_samples or .seq_len, or model.load=streamed" in host
    assert "disk of the run folder: does NOT fit" in disk
    saving = verdicts(estimated(free={"disk": 100}))[0]
    assert "try save.model=false or model.load=streamed" in saving


def test_libraries_that_are_in_memory_already_are_not_counted_against_what_is_free() -> None:
    needed = peak(needs(PLAN), "host")[0] - 10_000
    assert "does NOT fit" not in verdicts(estimated(free={"host": needed}))[0]
    assert "does NOT fit" in verdicts(estimated(free={"host": needed - 1}))[0]


def test_what_could_not_be_measured_is_called_not_estimated() -> None:
    unknown = dict.fromkeys(("load", "calibrate", "prune", "save", "evaluate", "one block", "total"))
    parts = needs(plan(working=Working(None, None, None, None)))
    shown = as_text(estimate_tables(estimated(parts=parts, seconds=unknown, notes=["why"])), 120)
    assert shown.count("not estimated") == 3 + 7
    assert "note: why" in shown


def test_a_sweep_adds_up_time_and_what_is_kept() -> None:
    jobs = [estimated(folder=Path(f"run{number}")) for number in range(3)]
    last = next(line for line in as_text(sweep_table(jobs), 120).splitlines() if "one after the other" in line)
    assert "4 min 56 s" in last  # the dense model is scored once
    assert "12 kB" in last
    assert f"{(peak(needs(PLAN), 'disk')[0] + 2 * 4000) / 1e3:,.0f} kB" in last
