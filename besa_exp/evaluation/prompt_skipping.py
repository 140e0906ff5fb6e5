"""ShortGPT-gen (Men et al., arXiv 2403.03853): chosen blocks are skipped while a prompt is processed; each token that
is decoded afterwards runs all of them, with keys and values that these blocks made of the states that passed them by.

The authors cache these keys without rotary rotation, which later queries expect; here they are rotated. Of a whole
sequence that is given, one pass computes what prefill and decoding would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import Hidden, discover_blocks
from besa_exp.blocks.call_arguments import hidden_of
from besa_exp.blocks.linears import replaced_forwards
from besa_exp.errors import RunError
from besa_exp.evaluation.skipping import Call, Course

NEAR = 0.02  # of two ways to make the same keys, in half precision


@contextmanager
def passing_prompts(
    model: nn.Module, blocks: Sequence[int], prompt_tokens: int, padding: int | None = None
) -> Iterator[Course]:
    """One pass over whole sequences: the states of the first `prompt_tokens` tokens pass `blocks` by. The course counts
    the blocks that prompt tokens passed by, of all theirs."""
    _, modules = discover_blocks(model)
    course, call = Course(), Call(prompt_tokens, padding)

    def passed_by(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden, *args, **kwargs)
            in_prompt = call.numbers < 0
            course.counted += in_prompt.numel() - call.decoded
            if place not in blocks:
                return output
            course.skipped += in_prompt.numel() - call.decoded
            after = torch.where(in_prompt[..., None], hidden, hidden_of(output))
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return run

    forwards = [passed_by(place, module.forward) for place, module in enumerate(modules)]
    with call.counting(model), replaced_forwards(modules, forwards):
        yield course


@contextmanager
def prefill_skipping(model: nn.Module, blocks: Sequence[int]) -> Iterator[Course]:
    """`blocks` pass on their states as they are while more than one token is processed, and run for single ones; the
    course counts as that of `passing_prompts`. RunError: another kind of attention, here or, where it shows in its keys
    alone, at the first prompt."""
    _, modules = discover_blocks(model)
    chosen, course = [modules[block] for block in blocks], Course()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] > 1:
            course.skipped += ids.numel() * len(blocks)
            course.counted += ids.numel() * len(modules)

    forwards = [_passed_by(module, module.forward) for module in chosen]
    with model.register_forward_pre_hook(count, with_kwargs=True), replaced_forwards(chosen, forwards):
        yield course


def _passed_by(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    attention: Any = getattr(module, "self_attn", None)
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    wanted = ("k_proj", "v_proj", "head_dim", "layer_idx")
    if rotate is None or not all(hasattr(attention, name) for name in wanted) or not hasattr(module, "input_layernorm"):
        raise _unknown(module)
    checked = False

    def made(normed: Hidden, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        shape = (*normed.shape[:2], -1, attention.head_dim)
        key = attention.k_proj(normed).view(shape)
        key = attention.k_norm(key) if hasattr(attention, "k_norm") else key
        key, value = key.transpose(1, 2), attention.v_proj(normed).view(shape).transpose(1, 2)
        return rotate(key, key, *kwargs["position_embeddings"])[1], value

    def run(hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if hidden.shape[1] == 1:
            return forward(hidden, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            normed = module.input_layernorm(hidden)
            if not checked and cache.get_seq_length(attention.layer_idx) == 0:
                _check_keys(module, normed, kwargs, made)
                checked = True
            cache.update(*made(normed, kwargs), attention.layer_idx)
        return hidden

    return run


def _check_keys(
    module: Any,
    normed: Hidden,
    kwargs: Mapping[str, Any],
    made: Callable[[Hidden, Mapping[str, Any]], tuple[Tensor, Tensor]],
) -> None:
    """RunError: keys or values are not those that the block's attention caches, as where it leaves some unrotated."""
    from transformers import DynamicCache  # which what reads no model does without

    own = DynamicCache()
    module.self_attn(normed, **{**kwargs, "past_key_values": own})
    held = own.layers[module.self_attn.layer_idx]
    try:
        found = made(normed, kwargs)
    except RuntimeError as error:  # shapes of another kind of attention
        raise _unknown(module) from error
    for one, other in zip(found, (held.keys, held.values), strict=True):
        if one.shape != other.shape or float((one - other).norm()) > NEAR * float(other.norm()):
            raise _unknown(module)


def _unknown(module: nn.Module) -> RunError:
    return RunError(
        f"skipping=shortgpt_gen: how {type(module).__name__} makes its keys is not known here; a Llama-like block "
        "(input_layernorm, self_attn with k_proj and v_proj, keys rotated whole) is"
    )
