"""The model's head: what it makes of the last block's output, and how far apart two models' predictions are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, embed
from besa_exp.blocks.call_arguments import NotAlone, other_tokens
from besa_exp.blocks.linears import replaced_forwards

Logits = Float[Tensor, "sample seq vocabulary"]
Head = Callable[[Hidden], Logits]
FEW = 64  # tokens that show what logits depend on
TOKENS = 2048  # that pass the head together: their logits are the largest thing that is held


def head_of(model: nn.Module, blocks: Sequence[Block], input_ids: Int[Tensor, "sample seq"]) -> Head:
    """A function from the last block's outputs, of at most as many samples as `input_ids` has, to logits.
    Differentiable in the outputs. NotAlone: logits depend on the tokens too."""
    modules = [block.module for block in blocks]
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    one = input_ids[:1, :FEW]
    with torch.no_grad():
        state = embed(model, [*blocks], one, 1)
        logits, others = (head_logits(model, modules, ids, state) for ids in (one, other_tokens(model, one)))
    if not torch.equal(logits, others):
        raise NotAlone(
            f"{type(model).__name__} computes its logits from the tokens as well as from the last block's output: a "
            "budget or a search that tries whole models cannot be used"
        )

    def head(hidden: Hidden) -> Logits:
        return head_logits(model, modules, input_ids[: len(hidden)], hidden.to(device))

    return head


def head_logits(model: nn.Module, modules: list[nn.Module], ids: Int[Tensor, "sample seq"], hidden: Hidden) -> Logits:
    """The model's own forward pass with stand-ins for the blocks, which return a tensor, or a tuple where the model
    wants one. Of `ids` the shape alone matters."""
    results: tuple[Any, ...] = (hidden, (hidden, None))
    for result in results:
        stand_ins = [lambda *args, result=result, **kwargs: result] * len(modules)
        with replaced_forwards(modules, stand_ins):
            try:
                logits = model(input_ids=ids, use_cache=False).logits
            except (TypeError, AttributeError, IndexError, RuntimeError, ValueError):
                if result is results[-1]:
                    raise
                continue
        if logits.shape[:2] == ids.shape:
            return logits
    raise AssertionError("the model makes no logits of its last block's output")


def divergence(expected: Logits, found: Logits) -> Float[Tensor, "sample seq"]:
    """KL(p || q) of each token in fp32, p the distribution of the next token by `expected`, q by `found`."""
    p = expected.float().log_softmax(dim=-1)
    gap = p - found.float().log_softmax(dim=-1)
    return (p.exp_() * gap).sum(dim=-1)  # in place: logits are the largest thing that is held


def summed_divergences(head: Head, dense: Hidden, tried: Sequence[Hidden]) -> Float[Tensor, " model"]:
    """The sum over the own tokens of KL(p || q), p after the dense model's last block, q after each tried one's."""
    return _summed(head, tried, lambda rows: partial(divergence, head(dense[rows])))


def summed_entropies(
    head: Head, input_ids: Int[Tensor, "sample seq"], tried: Sequence[Hidden]
) -> Float[Tensor, " model"]:
    """The sum over samples and i = 2 .. seq of -log p(token_i | the tokens before it), of each tried model."""

    def losses_on(rows: slice) -> Callable[[Logits], Tensor]:
        following = input_ids[rows, 1:].flatten()
        return lambda logits: nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), following.to(logits.device, non_blocking=True), reduction="none"
        )

    return _summed(head, tried, losses_on)


def _summed(
    head: Head, tried: Sequence[Hidden], losses_on: Callable[[slice], Callable[[Logits], Tensor]]
) -> Float[Tensor, " model"]:
    """Of each tried model the sum of what `losses_on` makes of its logits on TOKENS tokens, or a sample, at a time."""
    count = max(1, TOKENS // tried[0].shape[1])
    totals = [torch.zeros((), dtype=torch.float64)] * len(tried)
    for start in range(0, len(tried[0]), count):
        rows = slice(start, start + count)
        losses_of = losses_on(rows)
        for number, states in enumerate(tried):
            totals[number] = totals[number] + losses_of(head(states[rows])).double().sum()
    return torch.stack(totals).cpu()
