"""A pruner that searches: N:M masks by a straight-through Gumbel choice, after MaskLLM (Fang et al., arXiv 2409.17481).

Each M consecutive weights keep one of the (M choose N) masks. Its logits are learned: the block is computed with the
mask of the largest logit + noise, and the gradient goes back through the softmax of the same at a temperature. They
begin where Wanda's masks are chosen, and the probe samples decide which state is kept, so that the result is never
worse on them than Wanda. MaskLLM learns all masks at once, by the loss of the whole model on two billion tokens; here
each block learns its own by its reconstruction loss on the calibration samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from besa_exp.blocks.block import samples_at
from besa_exp.blocks.course import Course
from besa_exp.blocks.probe import num_learned, probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.blocks.whole_model import batches
from besa_exp.machine import distributed
from besa_exp.rules import Count, Positive, Seed, check_fields
from besa_exp.tensors.importance import Wanda
from besa_exp.tensors.losses import differentiate, gradients, token_loss
from besa_exp.tensors.pattern import fixes_sparsity
from besa_exp.tensors.statistics import InputNorm


@dataclass(frozen=True)
class ChosenMasks:
    """`temperature` of the softmax; the noise is as much smaller than the logits as `prior` is large."""

    steps: Count = 16
    batch_size: Count = 4
    checks: Count = 4  # how often the probe judges
    lr: Positive = 0.1
    prior: Positive = 8.0
    temperature: Positive = 1.0
    seed: Seed = 0

    traits = Traits(InputNorm)  # what Wanda's scores are made of

    def __post_init__(self) -> None:
        check_fields(self, "pruner")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """N:M alone."""
        if fixes_sparsity(pattern):
            return []
        return [f"pattern={pattern}: pruner=chosen_masks chooses among the masks of N:M; set pattern=2:4"]

    def prune_block(self, task: Task) -> PrunedBlock:
        """The state that the probe samples like best, Wanda's masks among them."""
        assert task.goal.pattern is not None
        candidates = _masks_of(*task.goal.pattern).to(task.block.device)
        logits = {name: self._begun(task, name, candidates).requires_grad_() for name in task.weights}
        optimizer, course = torch.optim.Adam([*logits.values()], lr=self.lr), Course(task.block, task.on_step)
        masks = {name: _chosen(one, candidates) for name, one in logits.items()}
        before = best = self._judged(task, masks)
        noise = torch.Generator(task.block.device).manual_seed(self.seed + task.block.index)
        learn = num_learned(distributed.total(len(task.inputs)))  # the others are the probe
        numbered = zip(range(1, self.steps + 1), batches(learn, self.batch_size, self.seed), strict=False)
        for number, samples in numbered:
            self._step(task, logits, candidates, noise, samples, course)
            optimizer.step()
            optimizer.zero_grad()
            if number % max(1, self.steps // self.checks) == 0:
                now = {name: _chosen(one, candidates) for name, one in logits.items()}
                if (loss := self._judged(task, now)) < best:
                    masks, best = now, loss
        course.wait()
        found = pruned_by_masks({name: mask.view_as(task.weights[name]) for name, mask in masks.items()})
        return replace(found, loss_before=before, steps=tuple(course.steps))

    def _begun(self, task: Task, name: str, candidates: Tensor) -> Tensor:
        """[group, mask]: what each mask keeps of Wanda's scores, in units of their mean."""
        scores = task.score(Wanda(), name)
        return self.prior * (scores / scores.mean()).reshape(-1, candidates.shape[1]) @ candidates.T

    def _step(
        self, task: Task, logits: Mapping[str, Tensor], candidates: Tensor, noise: torch.Generator, samples: Tensor,
        course: Course,
    ) -> None:  # fmt: skip
        """The gradient of the samples of these numbers, of which this process may own none."""
        own = distributed.own_places(samples)
        weights = {}
        for name, weight in task.weights.items():
            one = logits[name]
            drawn = -torch.empty_like(one).exponential_(generator=noise).log()
            soft = torch.softmax((one + drawn) / self.temperature, dim=-1)
            hard = torch.nn.functional.one_hot(soft.argmax(dim=-1), len(candidates)).to(soft.dtype)
            mask = (hard + soft - soft.detach()) @ candidates
            weights[name] = (weight.float() * mask.view_as(weight)).to(weight.dtype)
        outputs = task.block(samples_at(task.inputs, own), weights)  # with these in place of its own
        targets = samples_at(task.targets, own)
        loss, upstream, multiple = differentiate(
            lambda reached: token_loss(reached, targets), outputs, task.block.product_dtype
        )
        for one, gradient in zip(logits.values(), gradients(outputs, [*logits.values()], upstream), strict=True):
            one.grad = distributed.all_sum(gradient / multiple)  # of the samples of all processes
        course.add(loss, task.goal.sparsity)

    def _judged(self, task: Task, masks: Mapping[str, Tensor]) -> float:
        weights = {name: weight * masks[name].view_as(weight) for name, weight in task.weights.items()}
        return probe_loss(task.block, task.inputs, task.targets, weights)


def _masks_of(kept: int, group: int) -> Tensor:
    """[mask, group]: all that keep so many of a group."""
    return torch.stack(
        [torch.zeros(group).index_fill(0, torch.tensor(one), 1) for one in combinations(range(group), kept)]
    )


def _chosen(logits: Tensor, candidates: Tensor) -> Tensor:
    """[group, place]: the mask with the largest logit."""
    return candidates[logits.argmax(dim=-1)].bool()
