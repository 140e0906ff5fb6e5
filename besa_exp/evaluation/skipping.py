"""A model that skips FFNs while it decodes; no weight changes. Which, say the rules of `skipping_rules`.

Attention always runs, so that every token has its keys and values in every block. What a token skips depends on its own
column and on earlier tokens' keys alone. So a whole sequence is computed in one pass, block by block, with the number
of FFNs left to skip as a tensor over tokens: the same numbers as token by token. Perplexity and log-likelihoods under a
policy need no decoding. An FFN that all tokens of a call skip is not computed: while a sequence is decoded, token by
token, each skipped FFN is work saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, discover_blocks
from besa_exp.blocks.call_arguments import Reached, hidden_of
from besa_exp.blocks.linears import replaced_forwards
from besa_exp.blocks.units import sub_blocks
from besa_exp.errors import RunError
from besa_exp.evaluation.skipping_rules import FfnSkipping, Numbers, Policy, Skipped
from besa_exp.methods.structure.shortgpt import cosine


@dataclass(frozen=True)
class Passed:
    """What went through one block: the states after it, which tokens skipped its FFN, how many those are, and, under
    FFN-SkipLLM's rule in blocks that are not cold, cos(a, a + f), which means nothing where the FFN was skipped."""

    outputs: Hidden
    skipped: Skipped
    count: int
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
    count = int(skipped.sum())
    ends = may_end and count == skipped.numel()
    similarity = torch.zeros(numbers.shape, dtype=torch.float64, device=numbers.device)
    greedy = policy if isinstance(policy, FfnSkipping) and not policy.is_cold(block, num_blocks) else None
    if greedy is None and not count:
        return Passed(hidden_of(forward()), skipped, 0, similarity, left)
    between: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        between.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        if ends:
            raise Reached

    with middle.register_forward_pre_hook(catch, with_kwargs=True):
        try:
            outputs = hidden_of(forward())
        except Reached:
            outputs = between[0].reshape(*numbers.shape, -1)
    state = between[0].reshape(outputs.shape)
    if greedy is not None:
        similarity = similarity if ends else cosine(state, outputs)
        left = greedy.left_after(block, num_blocks, left, numbers, similarity)
    if count and not ends:
        outputs = torch.where(skipped[..., None], state, outputs)
    return Passed(outputs, skipped, count, similarity, left)


@torch.no_grad()
def pass_under(
    blocks: Iterable[Block],
    num_blocks: int,
    middle: str,
    inputs: Hidden,
    policy: Policy,
    numbers: Numbers,
    batch_size: int,
) -> Iterator[tuple[Skipped, Float[Tensor, "sample seq"]]]:
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


@dataclass
class Course:
    """What happened under a policy: FFNs of decoded tokens (ShortGPT-gen: blocks of prompt tokens) that were skipped,
    of all."""

    skipped: int = 0
    counted: int = 0

    @property
    def fraction(self) -> float:
        return self.skipped / max(1, self.counted)


@contextmanager
def skipping(
    model: nn.Module,
    policy: Policy,
    middle: str,
    prompt_tokens: int | None = None,
    padding: int | None = None,
) -> Iterator[Course]:
    """The model computes under a policy for as long as this lasts, called as it is, with a cache or without, by
    perplexity, lm-eval or `generate`. `prompt_tokens`: so many first tokens of each sequence are its prompt; None: all
    tokens that a call without a filled cache is given, as in generation. Paddings are nobody's tokens: those that the
    attention mask leaves out, and, where there is no mask, ids at the end that are `padding`."""
    _, modules = discover_blocks(model)
    course, call = Course(), Call(prompt_tokens, padding)
    forwards = [
        _under(module, module.get_submodule(middle), place, len(modules), policy, call, course)
        for place, module in enumerate(modules)
    ]
    with call.counting(model), replaced_forwards(modules, forwards):
        yield course


@dataclass
class Call:
    """One forward pass of the model: its tokens' numbers, how many of them are decoded, and what they still skip."""

    prompt_tokens: int | None
    padding: int | None = None
    given: Tensor | None = None  # tokens of each row's prompt, as the first call of a generation showed them
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    left: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    decoded: int = 0

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """The tokens of each pass of the model are numbered for as long as this lasts."""
        with model.register_forward_pre_hook(self._begin, with_kwargs=True):
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        self.decoded = int((self.numbers >= 0).sum())
        self.left = torch.zeros_like(self.numbers)


def _under(
    module: nn.Module, middle: nn.Module, place: int, num_blocks: int, policy: Policy, call: Call, course: Course
) -> Callable[..., Any]:
    """A block's forward under the policy. Whether it returns a tuple is seen when it first runs as a whole."""
    forward, returned = module.forward, list[int]()

    def run(*args: Any, **kwargs: Any) -> Any:
        def dense() -> Any:
            output = forward(*args, **kwargs)
            returned[:] = [len(output) if isinstance(output, tuple) else 0]
            return output

        if not call.decoded:
            return dense()
        passed = through_block(dense, middle, policy, place, num_blocks, call.left, call.numbers, bool(returned))
        call.left = passed.left
        course.skipped += passed.count
        course.counted += call.decoded
        return (passed.outputs, *[None] * (returned[0] - 1)) if returned[0] else passed.outputs

    return run
