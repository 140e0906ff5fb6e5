"""What is asked of skipping (`skipping=ffn`), decided for one model: a threshold, or blocks, for a wanted fraction.

`ffn`: the threshold by bisection, each try one pass of the calibration tokens through the blocks. `static`: the FFNs
that turn states least, by mean cosine over decoded tokens. `shortgpt_gen`: the blocks of least influence. A dense and a
pruned model have each their own.

Scored text is teacher-forced. Its first `prompt_tokens` tokens are the prompt, every later one counts as decoded, those
of a question as those of its choices; all of them are predicted and scored, as without a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import Block, capture_blocks, embed
from besa_exp.errors import RunError, Unavailable
from besa_exp.evaluation.prompt_skipping import passing_prompts, prefill_skipping
from besa_exp.evaluation.skipping import Course, middle_of, pass_under, skipping
from besa_exp.evaluation.skipping_rules import (
    FfnSkipping,
    Policy,
    RandomSkipping,
    StaticSkipping,
    decoded_numbers,
    threshold_for,
)
from besa_exp.machine import distributed
from besa_exp.methods.structure.shortgpt import least_influential, passage
from besa_exp.settings import SkippingSettings
from besa_exp.texts.tokens import tokens_sha256

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

BATCH = 8  # calibration windows that pass through a block together
NEVER = FfnSkipping(2.0, cold_first=0, cold_last=0)
STREAMED = (
    "skipping: the model is streamed, one block in memory at a time; a policy needs it whole: set model.load=whole"
)


@dataclass(frozen=True)
class Skipping:
    """What is asked, and the calibration tokens; None where nothing is found on any."""

    settings: SkippingSettings
    tokens: Int[Tensor, "sample seq"] | None = None

    @property
    def request(self) -> dict[str, Any]:
        """All that decides the policy of a given model, as plain values."""
        digest = {} if self.tokens is None else {"tokens_sha256": tokens_sha256(self.tokens)}
        return self.settings.asked | digest


@dataclass(frozen=True)
class Decided:
    """A policy of one model, or the blocks that prompts pass by; `record` says what was asked and found."""

    settings: SkippingSettings
    middle: str
    policy: Policy | None
    passed: tuple[int, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)

    def on(self, model: nn.Module, padding: int | None = None) -> AbstractContextManager[Course]:
        """The model computes under the policy for as long as this lasts; see `skipping`."""
        prompt = self.settings.prompt_tokens
        if self.policy is None:
            return passing_prompts(model, self.passed, prompt, padding)
        return skipping(model, self.policy, self.middle, prompt, padding=padding)

    def generating(self, model: nn.Module) -> AbstractContextManager[Course]:
        """The same while the model generates with its cache: what its first call is given is the prompt."""
        if self.policy is None:
            return prefill_skipping(model, self.passed)
        return skipping(model, self.policy, self.middle)

    def record(self, course: Course) -> dict[str, Any]:
        """What was asked and found, and the fraction that was skipped."""
        skipped, counted = distributed.total(course.skipped), distributed.total(course.counted)
        return {**self.settings.asked, "found": dict(self.found), "skipped": skipped / max(1, counted)}


def decide(loaded: LoadedModel, wanted: Skipping) -> Decided:
    """The policy of this model. Unavailable: it cannot skip."""
    if loaded.weights is not None:
        raise Unavailable(STREAMED)
    settings, model = wanted.settings, loaded.model
    device = next(model.parameters()).device
    sample = torch.zeros(1, 2, dtype=torch.long, device=device) if wanted.tokens is None else wanted.tokens
    sample = sample[: settings.num_samples].to(device)
    all_blocks = capture_blocks(model, sample)
    with torch.no_grad():
        calibrated = _Calibrated(settings, all_blocks, embed(model, all_blocks, sample, BATCH))
    count = len(all_blocks)
    if beyond := [block for block in settings.blocks if not 0 <= block < count]:
        raise Unavailable(f"skipping.blocks names block {beyond[0]}; the model has {count}, counted from 0")
    if settings.name == "shortgpt_gen":
        blocks = settings.blocks or calibrated.least_influential()
        return Decided(settings, "", None, tuple(blocks), {} if settings.blocks else {"blocks": list(blocks)})
    try:
        middle = middle_of(all_blocks[0], calibrated.inputs)
    except RunError as error:
        raise Unavailable(str(error)) from error
    if settings.name == "random":
        assert settings.fraction is not None
        return Decided(settings, middle, RandomSkipping(settings.fraction, settings.seed, settings.warm_tokens))
    if settings.name == "static":
        blocks = settings.blocks or calibrated.least_turning(middle)
        found = {} if settings.blocks else {"blocks": list(blocks)}
        return Decided(settings, middle, StaticSkipping(tuple(blocks), settings.warm_tokens), found=found)
    if settings.threshold is not None:
        return Decided(settings, middle, _greedy(settings, settings.threshold))
    assert settings.fraction is not None
    bound, fraction = threshold_for(settings.fraction, partial(calibrated.skipped, middle))
    return Decided(settings, middle, _greedy(settings, bound), found={"threshold": bound, "skipped": fraction})


def skipping_of(settings: SkippingSettings | None, tokens: Callable[[], Int[Tensor, "sample seq"]]) -> Skipping | None:
    """What is asked, with the calibration tokens, which are asked for only where something is found on them."""
    if settings is None:
        return None
    return Skipping(settings, tokens()[: settings.num_samples] if settings.is_calibrated else None)


def check_skips(loaded: LoadedModel, settings: SkippingSettings | None) -> None:
    """RunError: the model cannot skip; raised before it is pruned."""
    if settings is None:
        return
    if loaded.weights is not None:
        raise RunError(STREAMED)
    try:
        decide(loaded, Skipping(replace(settings, fraction=0.0, threshold=2.0, blocks=settings.blocks or (0,))))
    except Unavailable as error:
        raise RunError(str(error)) from error


def _greedy(settings: SkippingSettings, threshold: float) -> FfnSkipping:
    return FfnSkipping(threshold, settings.span, settings.cold_first, settings.cold_last, settings.warm_tokens)


@dataclass(frozen=True)
class _Calibrated:
    """The blocks, and the first one's inputs of the calibration tokens."""

    settings: SkippingSettings
    blocks: list[Block]
    inputs: Float[Tensor, "sample seq hidden"]

    def skipped(self, middle: str, threshold: float) -> float:
        """The fraction of the FFNs of decoded tokens that is skipped under a threshold."""
        decoded = self._numbers() >= 0
        counts = [int((block & decoded).sum()) for block, _ in self._pass(middle, _greedy(self.settings, threshold))]
        return sum(counts) / max(1, int(decoded.sum()) * len(counts))

    def least_turning(self, middle: str) -> list[int]:
        """The blocks whose FFNs turn decoded tokens least, the cold ones aside, in order."""
        decoded = self._numbers() >= 0
        turning = [-float(similarity[decoded].double().mean()) for _, similarity in self._pass(middle, NEVER)]
        return self._least(torch.tensor(turning))

    def least_influential(self) -> list[int]:
        """The blocks of least influence, the cold ones aside, in order."""
        return self._least(passage(self.blocks, self.inputs.clone(), BATCH).influence)

    def _least(self, influence: Float[Tensor, " block"]) -> list[int]:
        settings, count = self.settings, len(self.blocks)
        assert settings.fraction is not None
        cold = [*range(settings.cold_first), *range(count - settings.cold_last, count)]
        return sorted(least_influential(influence, round(settings.fraction * count), cold))

    def _pass(self, middle: str, policy: Policy) -> Iterator[tuple[Tensor, Tensor]]:
        return pass_under(self.blocks, len(self.blocks), middle, self.inputs.clone(), policy, self._numbers(), BATCH)

    def _numbers(self) -> Int[Tensor, "sample seq"]:
        return decoded_numbers(self.inputs.shape[:2], self.settings.prompt_tokens).to(self.inputs.device)
