"""EvoPress (Sieberling et al., arXiv 2410.14649): levels over depth, changed at random and kept where it helps.

A model is a level for each block, 0 to begin with; a level is the same number of weights in every block:

    s_l = s + level_l * width / levels * mean(n) / n_l,    n_l the weights of block l.

A child is its parent after 1 to 3 exchanges (the smaller of two draws): one block goes a level up, another one down, so
that the total stays. Each generation makes `children`, and the best of them on a few tokens, then on more, stand
against the parent on the most; the best one is the next parent. Best is who is nearest to the dense model's
predictions (`besa_exp.methods.budgets.trial`), on samples that are drawn again for each selection.

Where we differ: the authors' levels are of linears and take their weights from a database of SparseGPT's results at
each level. A budget here decides what a block gives up: how it is shared out inside is the allocation's, which may be
learned (BESA), and would be decided twice. The database is that of one pruner, and eight models large or more; here
the models are pruned as they are tried, the same in every row of a block, by Wanda or another `importance`.

All draws of a generation come from the seed and its number, and its outcome is kept, so that a search that was killed
goes on with the generation under way and ends alike.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.budgets.trial import Sparsities, Trial
from besa_exp.rules import Count, Fraction, Seed, check_fields
from besa_exp.tensors.importance import Importance, ImportanceName

MOST_EXCHANGES = 3
DRAWS = 10  # for each child, until one is found that there is not yet
Levels = tuple[int, ...]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvoPress:
    """`tokens` and `survivors` of each selection of a generation, in order; tokens are whole samples, as many as there
    are. `width`: how far a block may be from the target, in `levels` steps."""

    generations: Count = 20
    children: Count = 8
    tokens: tuple[Count, ...] = (512, 2048)
    survivors: tuple[Count, ...] = (2, 1)
    width: Fraction = 0.2
    levels: Count = 8
    seed: Seed = 0
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "budget")
        if len(self.tokens) != len(self.survivors) or not self.tokens:
            raise ValueError(
                f"budget.tokens={[*self.tokens]}, budget.survivors={[*self.survivors]}: must be as many numbers above "
                "0 in both, one a selection; the authors use [2048,16384,65536] and [8,2,1]"
            )
        if self.survivors[-1] != 1:
            raise ValueError(f"budget.survivors={[*self.survivors]}: must end with 1, the next parent")

    def search(self, trial: Trial, sparsity: float, progress: Progress) -> Float[Tensor, " block"]:
        """All generations that are left, each kept as it ends."""
        space = Space.around(sparsity, trial.sizes, self.width, self.levels)
        found = progress.read()
        parent: Levels = tuple(found.get("levels", [0] * len(trial.sizes)))
        for generation in range(found.get("generations", 0), self.generations):
            parent, error = self._next_parent(trial, space, parent, Random(f"{self.seed} {generation}"))  # noqa: S311
            logger.info("evopress, generation %d: KL %.4g at levels %s", generation + 1, error, [*parent])
            progress.write({"generations": generation + 1, "levels": parent})
        return space.sparsities(parent)

    def _next_parent(self, trial: Trial, space: Space, parent: Levels, random: Random) -> tuple[Levels, float]:
        """The best of a generation, and how far it is from the dense model."""
        standing, errors = space.children(parent, self.children, random), [0.0]
        for stage, (tokens, survivors) in enumerate(zip(self.tokens, self.survivors, strict=True), 1):
            standing = [parent, *standing] if stage == len(self.tokens) else standing
            count = samples_of(tokens, trial.num_samples, trial.inputs.shape[1])
            samples = torch.tensor(sorted(random.sample(range(trial.num_samples), count)))
            models: list[Sparsities] = [trial.exact(space.sparsities(levels), space.sparsity) for levels in standing]
            errors = trial.divergences(models, samples) if models else []
            best = sorted(range(len(standing)), key=errors.__getitem__)[:survivors]
            standing, errors = [standing[place] for place in best], [errors[place] for place in best]
        return standing[0], errors[0]

    def work(self, num_blocks: int, num_samples: int, seq_len: int, sparsity: float) -> Work:
        """All generations, as if no two children began alike."""
        standing = [self.children, *self.survivors[:-1]]
        standing[-1] += 1  # the parent
        each = [samples_of(tokens, num_samples, seq_len) for tokens in self.tokens]
        samples = self.generations * sum(count * size for count, size in zip(standing, each, strict=True))
        return Work(num_blocks * self.generations * len(each), num_blocks * samples, samples)


def samples_of(tokens: int, num_samples: int, seq_len: int) -> int:
    """As many samples as have so many tokens: at least one, at most all."""
    return min(num_samples, max(1, tokens // seq_len))


@dataclass(frozen=True)
class Space:
    """The levels that there are: a block's `steps` of sparsity, from `low` to `high`."""

    sparsity: float
    steps: Float[Tensor, " block"]
    low: float
    high: float

    @staticmethod
    def around(sparsity: float, sizes: Sequence[int], width: float, levels: int) -> Space:
        """Blocks stay `width` near the target, above nothing and below all."""
        weights = torch.tensor(sizes, dtype=torch.float64)
        low, high = max(sparsity - width, 0.1 * sparsity), min(sparsity + width, 0.5 * (1 + sparsity))
        return Space(sparsity, width / levels * weights.mean() / weights, low - 1e-9, high + 1e-9)

    def sparsities(self, levels: Levels) -> Float[Tensor, " block"]:
        """What the blocks give up at these levels; the same in all whatever the levels, where they sum to 0."""
        return self.sparsity + self.steps * torch.tensor(levels, dtype=torch.float64)

    def children(self, parent: Levels, count: int, random: Random) -> list[Levels]:
        """Different from each other and the parent; fewer than `count` where no more are found."""
        found = {parent: None}
        for _ in range(DRAWS * count):
            if len(found) <= count:
                found[self.child(parent, random)] = None
        return [*found][1:]

    def child(self, parent: Levels, random: Random) -> Levels:
        """The parent after a few exchanges; itself where no block can move."""
        levels = [*parent]
        for _ in range(min(random.randint(1, MOST_EXCHANGES), random.randint(1, MOST_EXCHANGES))):
            up = self._movable(levels, 1)
            down = self._movable(levels, -1)
            pairs = [(one, other) for one in up for other in down if one != other]
            if pairs:
                one, other = random.choice(pairs)
                levels[one] += 1
                levels[other] -= 1
        return tuple(levels)

    def _movable(self, levels: list[int], by: int) -> list[int]:
        """The blocks that may go a level up or down."""
        places = self.sparsity + self.steps * (torch.tensor(levels, dtype=torch.float64) + by)
        return [number for number, place in enumerate(places.tolist()) if self.low <= place <= self.high]
