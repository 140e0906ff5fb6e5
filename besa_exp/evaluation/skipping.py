"""Parts of a model that are skipped while it decodes; no weight changes.

FFN-SkipLLM (Jaiswal et al., arXiv 2404.03865): attention always runs, so that every token has its keys and values in
every block; the FFN of a block is skipped for a token whose state it would hardly turn. With a the state between
attention and FFN, f the FFN's part and sim = cos(a, a + f): once sim >= threshold in a block, the FFNs of the next
`span` blocks are skipped for this token. The first and last blocks never skip, nor do the first decoded tokens, nor
the prompt's. No code was published; what is not said there (span, cold blocks, warm tokens) is a setting here.

What a token skips depends on its own column and on earlier tokens' keys alone, and attention is never skipped. So a
whole sequence is computed in one pass, block by block, with the number of FFNs left to skip as a tensor over tokens:
the same numbers as token by token. Perplexity and log-likelihoods under a policy need no decoding.

ShortGPT-gen (arXiv 2403.03853): chosen blocks are skipped while the prompt is processed; their keys and values are
still made of the state that passes them by. The authors cache these keys without rotary rotation, which later queries
expect; here they are rotated, and theirs is an option.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks, embed
from besa_exp.blocks.call_arguments import Reached, hidden_of
from besa_exp.blocks.linears import replaced_forwards
from besa_exp.blocks.units import sub_blocks
from besa_exp.errors import RunError
from besa_exp.methods.structure.shortgpt import cosine

Numbers = Int[Tensor, "sample seq"]
"""Of each token its number among the decoded ones, from 0; negative: it belongs to the prompt or pads."""
ALL = 2**30  # a span up to the cold end


@runtime_checkable
class Policy(Protocol):
    """Which FFNs a token skips. `left`: how many of the next blocks' FFNs each token still skips."""

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Bool[Tensor, "sample seq"]:
        """Whether each token skips the FFN of a block."""
        ...

    def left_after(
        self, block: int, num_blocks: int, left: Numbers, numbers: Numbers, similarity: Float[Tensor, "sample seq"]
    ) -> Numbers:
        """How many are left after the block. `similarity` means nothing where it was skipped."""
        ...


@dataclass(frozen=True)
class FfnSkipping:
    """FFN-SkipLLM's greedy policy. `span`: None, up to the cold end."""

    threshold: float
    span: int | None = 1
    cold_first: int = 1
    cold_last: int = 1
    warm_tokens: int = 0

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 2:
            raise ValueError(f"skipping.threshold={self.threshold}: a cosine is at most 1; 2 never skips")
        if self.span is not None and self.span < 1:
            raise ValueError(f"skipping.span={self.span}: must be at least 1, or null for all up to the last blocks")
        for key in ("cold_first", "cold_last", "warm_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"skipping.{key}={getattr(self, key)}: must not be negative")

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Bool[Tensor, "sample seq"]:
        """Where any are left, in blocks that are not cold."""
        return self._may(block, num_blocks, numbers) & (left > 0)

    def left_after(
        self, block: int, num_blocks: int, left: Numbers, numbers: Numbers, similarity: Float[Tensor, "sample seq"]
    ) -> Numbers:
        """One fewer where it was skipped; the span where the FFN ran and hardly turned the state."""
        may = self._may(block, num_blocks, numbers)
        begins = may & (left == 0) & (similarity >= self.threshold)
        return torch.where(begins, self.span or ALL, torch.where(may & (left > 0), left - 1, left))

    def _may(self, block: int, num_blocks: int, numbers: Numbers) -> Bool[Tensor, "sample seq"]:
        is_cold = not self.cold_first <= block < num_blocks - self.cold_last
        return torch.zeros_like(numbers, dtype=torch.bool) if is_cold else numbers >= self.warm_tokens


@dataclass(frozen=True)
class StaticSkipping:
    """The FFNs of the same blocks for every decoded token."""

    blocks: tuple[int, ...]
    warm_tokens: int = 0

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Bool[Tensor, "sample seq"]:
        """Those of `blocks`."""
        return (numbers >= self.warm_tokens) & (block in self.blocks)

    def left_after(
        self, block: int, num_blocks: int, left: Numbers, numbers: Numbers, similarity: Float[Tensor, "sample seq"]
    ) -> Numbers:
        """As before."""
        return left


@dataclass(frozen=True)
class RandomSkipping:
    """Each FFN of a decoded token with the probability `fraction`, drawn by seed, block and the token's number."""

    fraction: float
    seed: int = 0
    warm_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"skipping.fraction={self.fraction}: must be in [0, 1]")

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Bool[Tensor, "sample seq"]:
        """By a hash of the three numbers, so that one pass and token by token draw alike."""
        mixed = (numbers.long() + 1) * 2_654_435_761 + (block + 1) * 40_503_551 + (self.seed + 1) * 97_531_357
        mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) % 2**32
        mixed = ((mixed ^ (mixed >> 13)) * 3_266_489_917) % 2**32
        return (numbers >= self.warm_tokens) & ((mixed ^ (mixed >> 16)) % 2**24 < self.fraction * 2**24)

    def left_after(
        self, block: int, num_blocks: int, left: Numbers, numbers: Numbers, similarity: Float[Tensor, "sample seq"]
    ) -> Numbers:
        """As before."""
        return left


@dataclass(frozen=True)
class Passed:
    """What went through one block: the states after it, which tokens skipped its FFN, and cos(a, a + f), of which those
    of tokens that skipped it are only there where the FFN ran for others."""

    outputs: Hidden
    skipped: Bool[Tensor, "sample seq"]
    similarity: Float[Tensor, "sample seq"]
    left: Numbers


def middle_of(block: Block, inputs: Hidden) -> str:
    """The path, inside a block, of the module that is given the state between attention and FFN. RunError: there is
    none, as in blocks that run them side by side."""
    try:
        until: Any = sub_blocks(block, inputs)[-2][0].module
    except RunError as error:
        raise RunError(
            f"skipping: {block.name} has no state between attention and FFN, as in blocks that run them side by side; "
            "set skipping=none"
        ) from error
    _, end = until.block_and_end
    return next(name for name, module in block.module.named_modules() if module is end)


def middle_of_model(model: nn.Module, input_ids: Int[Tensor, "sample seq"]) -> str:
    """The same for all blocks of a model, found in the first."""
    blocks = capture_blocks(model, input_ids[:1])
    return middle_of(blocks[0], embed(model, blocks, input_ids[:1], 1))


def through_block(
    forward: Callable[[], Any],
    middle: nn.Module,
    policy: Policy,
    block: int,
    num_blocks: int,
    left: Numbers,
    numbers: Numbers,
    may_end: bool = True,
) -> Passed:
    """One block under a policy. `forward` runs it; where it `may_end`, it is ended before the FFN as soon as all tokens
    skip that: this asks the device."""
    skipped = policy.skips(block, num_blocks, left, numbers)
    between: list[Tensor] = []
    none_runs = may_end and bool(skipped.all())

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        between.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        if none_runs:
            raise Reached

    hook = middle.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        outputs = hidden_of(forward())
    except Reached:
        outputs = between[0].reshape(*numbers.shape, -1)
    finally:
        hook.remove()
    state = between[0].reshape(outputs.shape)
    similarity = cosine(state, outputs)
    left = policy.left_after(block, num_blocks, left, numbers, similarity)
    outputs = torch.where(skipped[..., None], state, outputs)
    return Passed(outputs, skipped, similarity, left)


@torch.no_grad()
def pass_under(
    blocks: Iterable[Block],
    num_blocks: int,
    middle: str,
    inputs: Hidden,
    policy: Policy,
    numbers: Numbers,
    batch_size: int,
) -> Iterator[tuple[Bool[Tensor, "sample seq"], Float[Tensor, "sample seq"]]]:
    """Teacher-forced sequences through the blocks in one pass, each read once: of each block which tokens skipped its
    FFN, and cos(a, a + f). `inputs`, those of the first block, are overwritten."""
    left = torch.zeros_like(numbers)
    for block in blocks:
        parts = []
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            passed = through_block(
                lambda rows=rows, block=block: block(inputs[rows]),
                block.module.get_submodule(middle),
                policy,
                block.index,
                num_blocks,
                left[rows],
                numbers[rows],
            )
            inputs[rows], left[rows] = passed.outputs, passed.left
            parts.append(passed)
        yield torch.cat([part.skipped for part in parts]), torch.cat([part.similarity for part in parts])


def decoded_numbers(shape: torch.Size | tuple[int, int], prompt_tokens: int) -> Numbers:
    """Of sequences whose first tokens are a prompt, and that hold no paddings."""
    return (torch.arange(shape[1]) - prompt_tokens).expand(shape).clone()


@dataclass
class Course:
    """What happened under `skipping`: FFNs of decoded tokens that were skipped, of all; and, call by call and block by
    block, which ran [sample seq], where that is asked for."""

    skipped: int = 0
    counted: int = 0
    keep: bool = False
    ran: list[list[Tensor]] = field(default_factory=list)
    similarity: list[list[Tensor]] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """Of the FFNs of decoded tokens, how many were skipped."""
        return self.skipped / max(1, self.counted)


@contextmanager
def skipping(
    model: nn.Module,
    policy: Policy,
    middle: str,
    prompt_tokens: int | None = None,
    keep: bool = False,
    padding: int | None = None,
) -> Iterator[Course]:
    """The model computes under a policy for as long as this lasts, called as it is, with a cache or without, by
    perplexity, lm-eval or `generate`. `prompt_tokens`: so many first tokens of each sequence are its prompt; None: all
    tokens that a call without a filled cache is given, as in generation. Paddings are nobody's tokens: those that the
    attention mask leaves out, and, where there is no mask, ids at the end that are `padding`."""
    _, modules = discover_blocks(model)
    course, state = Course(keep=keep), _Call(prompt_tokens, padding)
    forwards = [
        _under(module, module.forward, module.get_submodule(middle), place, len(modules), policy, state, course)
        for place, module in enumerate(modules)
    ]
    hook = model.register_forward_pre_hook(state.begin, with_kwargs=True)
    try:
        with replaced_forwards(modules, forwards):
            yield course
    finally:
        hook.remove()


@dataclass
class _Call:
    """One forward pass of the model: its tokens' numbers, and what they still skip."""

    prompt_tokens: int | None
    padding: int | None = None
    given: Tensor | None = None  # tokens of each row's prompt, as the first call of a generation showed them
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    left: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Numbers the tokens of a call."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device)
            if self.padding is not None and past == 0:
                mask = (ids != self.padding).long().flip(1).cummax(dim=1).values.flip(1)
        if mask.dim() != 2:
            raise RunError("skipping: the model was called with an attention mask that does not name single tokens")
        if self.prompt_tokens is not None:
            self.given = torch.full((len(ids), 1), self.prompt_tokens, device=ids.device)
        elif past == 0:
            self.given = mask.sum(dim=1, keepdim=True)
        assert self.given is not None, "a generation begins with its prompt"
        numbers = mask.long().cumsum(dim=1) - 1 - self.given
        self.numbers = torch.where(mask.bool(), numbers, -1)[:, -ids.shape[1] :]
        self.left = torch.zeros_like(self.numbers)


def _under(
    module: nn.Module,
    forward: Callable[..., Any],
    middle: nn.Module,
    place: int,
    num_blocks: int,
    policy: Policy,
    call: _Call,
    course: Course,
) -> Callable[..., Any]:
    """A block's forward under the policy. Whether it returns a tuple is seen when it first runs as a whole."""
    returned: list[int] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        def dense() -> Any:
            output = forward(*args, **kwargs)
            returned[:] = [len(output) if isinstance(output, tuple) else 0]
            return output

        passed = through_block(dense, middle, policy, place, num_blocks, call.left, call.numbers, bool(returned))
        call.left = passed.left
        decoded = call.numbers >= 0
        course.skipped += int((passed.skipped & decoded).sum())
        course.counted += int(decoded.sum())
        if course.keep:
            if place == 0:
                course.ran.append([])
                course.similarity.append([])
            course.ran[-1].append(~passed.skipped)
            course.similarity[-1].append(passed.similarity)
        return (passed.outputs, *[None] * (returned[0] - 1)) if returned[0] else passed.outputs

    return run


def cold_ends(mean_similarity: Sequence[float], bound: float) -> tuple[int, int]:
    """How many first and last blocks are cold: those before the first and after the last whose FFN turns states so
    little that their mean similarity is at least `bound`; all where there is none."""
    warm = [place for place, value in enumerate(mean_similarity) if value >= bound]
    return (warm[0], len(mean_similarity) - 1 - warm[-1]) if warm else (len(mean_similarity), 0)


def threshold_for(
    wanted: float, fraction_of: Callable[[float], float], low: float = -1.0, high: float = 1.0, tries: int = 14
) -> tuple[float, float]:
    """The threshold under which nearest to the `wanted` fraction of FFNs is skipped, of those that bisection tried, and
    that fraction. `fraction_of` computes a pass. The fraction need not fall with the threshold: what is skipped changes
    what comes after; so the nearest of all tried is taken."""
    if not 0 <= wanted <= 1:
        raise ValueError(f"skipping.fraction={wanted}: must be in [0, 1]")
    tried = {bound: fraction_of(bound) for bound in (low, high)}
    for _ in range(tries):
        between = (low + high) / 2
        tried[between] = fraction_of(between)
        low, high = (between, high) if tried[between] > wanted else (low, between)
    best = min(tried, key=lambda bound: (abs(tried[bound] - wanted), -bound))
    return best, tried[best]


@contextmanager
def passing_prompts(
    model: nn.Module, blocks: Sequence[int], prompt_tokens: int, padding: int | None = None
) -> Iterator[Course]:
    """ShortGPT-gen in one pass over whole sequences: the states of the first `prompt_tokens` tokens pass `blocks` by,
    and these blocks give later tokens the keys and values that they make of them. The course counts the blocks that
    prompt tokens passed by, of all theirs."""
    _, modules = discover_blocks(model)
    course, state = Course(), _Call(prompt_tokens, padding)

    def passed_by(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden, *args, **kwargs)
            in_prompt = state.numbers < 0
            course.counted += int(in_prompt.sum())
            if place not in blocks:
                return output
            course.skipped += int(in_prompt.sum())
            after = torch.where(in_prompt[..., None], hidden, hidden_of(output))
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return run

    hook = model.register_forward_pre_hook(state.begin, with_kwargs=True)
    try:
        with replaced_forwards(modules, [passed_by(place, module.forward) for place, module in enumerate(modules)]):
            yield course
    finally:
        hook.remove()


@contextmanager
def prefill_skipping(model: nn.Module, blocks: Sequence[int], rotated: bool = True) -> Iterator[None]:
    """ShortGPT-gen: `blocks` pass on their states as they are while more than one token is processed, and run for
    single ones. `rotated=False` caches their keys as the authors' code does. RunError: another kind of attention."""
    _, modules = discover_blocks(model)
    chosen = [modules[block] for block in blocks]
    with replaced_forwards(chosen, [_passed_by(module, module.forward, rotated) for module in chosen]):
        yield


def _passed_by(module: Any, forward: Callable[..., Any], rotated: bool) -> Callable[..., Any]:
    attention: Any = getattr(module, "self_attn", None)
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    wanted = ("k_proj", "v_proj", "head_dim", "layer_idx")
    if rotate is None or not all(hasattr(attention, name) for name in wanted) or not hasattr(module, "input_layernorm"):
        raise RunError(
            f"skipping=shortgpt_gen: how {type(module).__name__} makes its keys is not known here; a Llama-like block "
            "(input_layernorm, self_attn with k_proj and v_proj) is"
        )

    def run(hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1] == 1:
            return forward(hidden, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            normed = module.input_layernorm(hidden)
            shape = (*hidden.shape[:2], -1, attention.head_dim)
            key = attention.k_proj(normed).view(shape)
            key = attention.k_norm(key) if hasattr(attention, "k_norm") else key
            key, value = key.transpose(1, 2), attention.v_proj(normed).view(shape).transpose(1, 2)
            if rotated:
                _, key = rotate(key, key, *kwargs["position_embeddings"])
            cache.update(key, value, attention.layer_idx)
        return hidden

    return run
