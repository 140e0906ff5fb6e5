"""The block loop of a run: each block is kept on the disk before the next begins, and what an earlier attempt of the
same run has kept is taken from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from besa_exp.blocks.activations import OF_ALL_BLOCKS, Allocate, activation_bytes, allocator
from besa_exp.blocks.block import Block, Hidden, capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.blocks.ignored import Ignored
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.pruner import PrunedBlock, Pruner, Refinement, Task, Traits, pruned_by_masks
from besa_exp.blocks.replay_check import check_replay
from besa_exp.blocks.reports import BlockReport, ModelStep, Step
from besa_exp.blocks.units import by_block, found_of_blocks, of_unit, units, with_linears
from besa_exp.blocks.whole_model import Found, KeepMasks, Weights, Whole
from besa_exp.checkpoints.files import load_masks, masks_description, weights_sha256
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.machine.background import ahead, one_at_a_time
from besa_exp.machine.device import compute_dtype, on_host
from besa_exp.methods.budgets.budget import Budget, exact_goals
from besa_exp.methods.budgets.trial import DepthSearch, Trial
from besa_exp.methods.budgets.uniform import SameForAll
from besa_exp.methods.updates.updated import with_update
from besa_exp.run_folder.finished_blocks import FinishedBlocks, block_tensors, load_block_tensors
from besa_exp.runs.cpu_units import as_stored
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.pattern import indivisible


def check_blocks(loaded: LoadedModel, input_ids: Tensor, batch_size: int, ignored: Ignored, pattern: str) -> None:
    """The self-check, through all blocks, before any long work: on the last two samples, with the arguments of the
    first. RunError: the model cannot be pruned block by block; what it does that forbids it. ConfigurationError: what
    is `ignored` is nothing, or everything, or a row cannot be divided into the pattern's groups."""
    blocks = capture_blocks(loaded.model, input_ids)
    if problems := ignored.check(blocks) or indivisible(inputs_of(map(ignored.rest, blocks)), pattern):
        raise ConfigurationError(*problems)
    check_replay(loaded.model, blocks, input_ids[-min(2, batch_size) :], loaded.resident)


def inputs_of(blocks: Iterable[Block]) -> dict[str, int]:
    """How many inputs each linear has, by its name in the model."""
    return {f"{block.name}.{name}": one.weight.shape[1] for block in blocks for name, one in block.linears.items()}


@dataclass
class BlockLoop:
    """Prunes the blocks of `loaded` after the `done` first ones, which `finished` holds.

    Of several ranks each has its own samples in `input_ids`; the first keeps the blocks. `keeps_dense`: the weights
    that pruning overwrites in a model that is loaded whole are held in `dense`, for `refined`."""

    loaded: LoadedModel
    input_ids: Tensor
    batch_size: int
    finished: FinishedBlocks
    done: int
    allocate: Allocate
    compute_dtype: torch.dtype | None = None
    keeps_dense: bool = False
    ignored: Ignored = field(default_factory=Ignored)
    dense_sha256: dict[int, str] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        settings: RunSettings, loaded: LoadedModel, input_ids: Tensor, finished: FinishedBlocks, done: int,
        kept: tuple[int, ...] = (),
    ) -> BlockLoop:  # fmt: skip
        """As the settings ask for it. `kept`: of the dense model's blocks those that are left, where some went."""
        traits, (samples, length) = with_update(settings.pruner, settings.update).traits, input_ids.shape
        hidden, itemsize = loaded.model.config.get_text_config().hidden_size, loaded.model.dtype.itemsize
        needed = activation_bytes(samples, length, hidden, itemsize, traits.dense_targets)
        _, allocate = allocator(settings.activations, loaded.model.device, finished.folder.parent, needed)
        dtype, ignored = compute_dtype(settings), Ignored(settings.ignore, kept)
        batch_size, keeps_dense = settings.calibration.batch_size, bool(traits.refinements)
        return BlockLoop(loaded, input_ids, batch_size, finished, done, allocate, dtype, keeps_dense, ignored)

    def again(self, done: int) -> BlockLoop:
        """The second walk, which writes what `refined` decided."""
        refined = self.finished.refined
        return replace(self, finished=refined, done=done, keeps_dense=False, dense_sha256={}, dense={})

    def run(
        self,
        pruner: Pruner,
        goal: Goal,
        budget: Budget | DepthSearch | SameForAll | None,
        on_step: Callable[[Step], None],
        on_block: Callable[[BlockReport], None],
    ) -> None:
        """Every block is in `finished` afterwards. `budget` deals `goal` out to the blocks; None: each has the same.
        `on_block` is given the report of each new one when it is on the disk."""
        blocks = self._blocks()
        together = pruner.traits.blocks_together
        goals: Goal | list[Goal] = goal
        if budget is not None and not isinstance(budget, SameForAll):
            goals = self._goals(blocks, goal, budget, together)
        grouped = units(blocks, together)
        pruning = prune_blocks(
            self._hashed(grouped),
            self._embed(blocks),
            pruner,
            goals,
            self.batch_size,
            on_step,
            self._restore,
            self.allocate,
        )
        with one_at_a_time() as begin:
            for report, pruned in pruning:
                for block, own, decided in by_block(grouped[report.index // together], report, pruned):
                    if distributed.is_first():
                        begin(self._write(block, own, decided))
                    on_block(own)
                del pruned, decided  # they would stay, a quarter of a block or more, until the next one is pruned

    def refined(
        self, refinements: Sequence[Refinement], before: Sequence[BlockReport], on_step: Callable[[ModelStep], None]
    ) -> Decided:
        """What the refinements, one after the other, make of all blocks together, which are all finished now and of
        which `before` holds the reports: a pruner for a loop of its own. The model is dense again."""
        blocks = self._blocks()
        shown = with_linears(blocks)
        distributed.barrier()  # rank 0 has written them
        found: Sequence[Found] = [self._found(unit) for unit in shown]
        state = self.loaded.model.state_dict()
        for name, weight in self.dense.items():
            state[name].copy_(weight)
        self.dense.clear()  # a second model
        whole = self._whole(blocks, shown)
        done = 0

        def on_later_step(step: ModelStep) -> None:
            on_step(replace(step, step=step.step + done))

        for refinement in refinements:
            found = refinement.refine(whole, found, on_later_step)
            done += refinement.steps
        of_units = zip(shown, found, strict=True)
        return Decided([own for unit, one in of_units for own in found_of_blocks(unit, one)], before)

    def _blocks(self) -> list[Block]:
        """Without what is ignored."""
        blocks = map(self.ignored.rest, capture_blocks(self.loaded.model, self.input_ids))
        return [replace(block, compute_dtype=self.compute_dtype) for block in blocks]

    def _whole(self, blocks: list[Block], shown: list[Block]) -> Whole:
        """The dense model, its blocks as they are `shown`."""
        outputs = self._embed(blocks)
        for block in self.loaded.resident(blocks):
            block.outputs(outputs, self.batch_size, out=outputs)

        def resident(backwards: bool) -> Iterable[Block]:
            return self.loaded.resident(shown[::-1] if backwards else shown)

        head = head_of(self.loaded.model, blocks, self.input_ids)
        return Whole(resident, self._embed(blocks), outputs, head, self.batch_size, self._room)

    def _room(self, needed: int) -> Allocate:
        folder = self.finished.folder.parent
        return allocator("auto", self.loaded.model.device, folder, needed, OF_ALL_BLOCKS)[1]

    def _found(self, unit: Block) -> Found:
        """What its finished blocks hold, read each time that it is asked for."""

        def keep_masks(block: Block) -> KeepMasks:
            masks = load_masks(self.finished.mask_file(block.index))
            return {name: masks[f"{block.name}.{name}.weight"] for name in block.linears}

        def weights(block: Block) -> Weights:
            tensors = self.finished.tensors(block.index)
            return {n: linear.part_of(tensors[f"{block.name}.{linear.path}"]) for n, linear in block.linears.items()}

        files = (self.finished.mask_file(block.index) for block in unit.layers)
        moved = any(masks_description(file)["weights_updated"] for file in files)
        return Found(partial(of_unit, unit, keep_masks), partial(of_unit, unit, weights) if moved else None)

    def _embed(self, blocks: list[Block]) -> Hidden:
        return embed(self.loaded.model, blocks, self.input_ids, self.batch_size, self.allocate)

    def _goals(self, blocks: list[Block], goal: Goal, budget: Budget | DepthSearch, together: int) -> list[Goal]:
        """Each block's own, or that of the blocks it is pruned together with. The budget does not see blocks that stay
        dense."""
        if isinstance(budget, DepthSearch):
            sparsities, sizes = self._searched(budget, blocks, goal.sparsity)
        else:
            sparsities, sizes = self._measured(budget, blocks, goal.sparsity)
        own = zip(exact_goals(sparsities, sizes, goal.sparsity), sizes, strict=True)
        counts = [(round(t.sparsity * size), size) for t, size in own]
        counted = [counts.pop(0) if block.linears else (0, 0) for block in blocks]
        groups = [counted[start : start + together] for start in range(0, len(blocks), together)]
        totals = [[sum(part) for part in zip(*group, strict=True)] for group in groups]
        return [
            Goal(pruned / max(1, size), exact=True)
            for group, (pruned, size) in zip(groups, totals, strict=True)
            for _ in group
        ]

    def _measured(self, budget: Budget, blocks: list[Block], sparsity: float) -> tuple[Tensor, list[int]]:
        """The sparsity that each block is to have, and its number of weights: the budget sees the dense blocks and a
        copy of their inputs."""
        sizes: list[int] = []

        def measured() -> Iterable[Block]:
            for block in self.loaded.resident(with_linears(blocks)):
                sizes.append(block.num_weights)
                yield block

        return budget.sparsities(measured(), self._embed(blocks), sparsity, self.batch_size), sizes

    def _searched(self, budget: DepthSearch, blocks: list[Block], sparsity: float) -> tuple[Tensor, list[int]]:
        """The sparsity that each block is to have, and its number of weights: the budget tries whole models, and goes
        on where an earlier attempt was."""
        head = head_of(self.loaded.model, blocks, self.input_ids)
        inputs, outputs, pruned = self._embed(blocks), self._embed(blocks), with_linears(blocks)
        dense = partial(self.loaded.resident, pruned)
        trial = Trial.begin(dense, inputs, outputs, head, self.batch_size, budget.importance)
        return budget.search(trial, sparsity, self.finished.search), [*trial.sizes]

    def _hashed(self, blocks: list[Block]) -> Iterable[Block]:
        """The blocks in order, each with its weights. On rank 0 `dense_sha256` holds the hash of a block's dense
        weights before it comes out; it is computed while the block before is out."""
        if not distributed.is_first():
            return self.loaded.resident(blocks)
        if self.loaded.weights:
            return self.loaded.weights.resident(blocks, self._hash)
        return ahead(self._hash_block, blocks)

    def _hash_block(self, block: Block) -> Block:
        for layer in block.layers:
            self._hash(layer, on_host(self._stored_tensors(layer)))
        return block

    def _hash(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        self.dense_sha256[block.index] = weights_sha256(tensors)

    def _restore(self, block: Block) -> bool:
        """Whether the block was finished before; then it has its pruned weights now."""
        for layer in block.layers:
            if self.keeps_dense and not self.loaded.weights:
                self.dense |= {name: tensor.clone() for name, tensor in self._stored_tensors(layer).items()}
            if layer.index < self.done:
                tensors = self.finished.tensors(layer.index, self.dense_sha256.get(layer.index))
                load_block_tensors(layer.module, layer.name, tensors)
        return block.index < self.done

    def _stored_tensors(self, block: Block) -> dict[str, Tensor]:
        return as_stored(block_tensors(block.module, block.name), self.loaded.stored)

    def _write(self, block: Block, report: BlockReport, pruned: PrunedBlock) -> Callable[[], None]:
        """What writes the block as it is now, when it is called."""
        keep_masks, permutations = (
            {f"{block.name}.{name}.weight": value for name, value in values.items()}
            for values in (pruned.keep_masks, pruned.permutations)
        )
        return partial(
            self.finished.write,
            report,
            self._stored_tensors(block),
            keep_masks,
            self.dense_sha256.pop(block.index),
            pruned.weights is not None or bool(pruned.norms),
            permutations,
        )


@dataclass(frozen=True)
class Decided:
    """A pruner whose masks, and weights where they moved, were decided before, for all blocks together. `before`: the
    report of each block by the search that came first, whose course is reported again; `dense_targets` as that search
    had them, so that a block's two losses are against the same."""

    found: Sequence[Found]
    before: Sequence[BlockReport]
    dense_targets: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(blind=True, dense_targets=self.dense_targets)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        block = task.block
        before, found = self.before[block.index], self.found[block.index]
        for step in before.steps:
            task.on_step(step)
        pruned = pruned_by_masks({name: mask.to(block.device) for name, mask in found.keep_masks().items()})
        weights = found.weights() if found.weights else None
        return replace(pruned, weights=weights, loss_before=before.loss_before, steps=before.steps)
