"""What a model costs beside its quality: counted once, and tokens a second measured on the device where it lies.

    FLOPs a token = 2 * (weights of the linears that a token passes, the head's with them) + 4 * C * (query channels)

summed over blocks, at a context of C tokens: the second part is attention's two products of queries with C keys and of
weights with C values. Zeros count: dense products compute them. Of a mixture's experts those that run count.

    cache bytes a token = size of a number * (rows of the linears that give keys and values), summed over blocks

Prefill is one pass over a prompt with a cache being filled, decoding one token after the other with it; both greedy,
for 1 and 8 sequences at a time. Times are medians of few repeats and say something of this machine alone.

The speed of 2:4 weights is that of the dense product against the semi-structured one, for each kind of linear:
`torch.sparse.to_sparse_semi_structured` packs a weight in which two of every four consecutive inputs are zero; devices
from compute capability 8.0 on multiply it in hardware, in half precision. Timed is `linear(hidden, weight)` for
`TOKENS` tokens at once, each way, on the device where the model lies. Everywhere else this is n/a, with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.blocks.block import Block, capture_blocks
from besa_exp.blocks.sparsity_table import linear_type
from besa_exp.errors import Unavailable
from besa_exp.machine.device import seconds_of

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

BATCHES = (1, 8)
PROMPT, DECODED = 128, 16  # tokens; of a model with a shorter context what has room
REPEATS, ENOUGH = 3, 10.0  # repeats of a measurement after one to warm up; seconds after which no further one begins
PAIRS = 15  # of those that take turns
FUSED = ("qkv_proj", "query_key_value", "c_attn")  # linears that give queries, keys and values
TOKENS, PRODUCTS, WARM_UP = 2048, 20, 5  # of a 2:4 product: tokens, those that are timed, those before
CAPABILITY, HALVES = (8, 0), (torch.float16, torch.bfloat16)


def counts_of(model: Any, context: int) -> dict[str, Any]:
    """`parameters`, `bytes`, `dtype`, `flops_per_token` at `prompt_tokens`, `cache_bytes_per_token`: of the model as it
    is, from shapes alone. `context`: the longest that it takes. Tied weights count once, and the head's products
    whether they are tied or not."""
    prompt, held = min(PROMPT, context // 2), [*model.parameters()]
    blocks = capture_blocks(model, torch.empty(0, 0, dtype=torch.long))  # none is called
    head = model.get_output_embeddings()
    linears = sum(_passed_weights(block, model.config) for block in blocks) + (head.weight.numel() if head else 0)
    attention = sum(_query_channels(block, model.config) for block in blocks)
    return {
        "parameters": sum(parameter.numel() for parameter in held),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in held),
        "flops_per_token": 2 * round(linears) + 4 * prompt * attention,
        "cache_bytes_per_token": model.dtype.itemsize * sum(_cached_channels(block, model.config) for block in blocks),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": prompt,
    }


@torch.no_grad()
def speeds_of(loaded: LoadedModel, context: int) -> dict[str, Any]:
    """By batch size `prefill_tokens_per_second` and `decode_tokens_per_second`, and on what. Unavailable: the model is
    streamed."""
    if loaded.weights is not None:
        raise Unavailable("the model is streamed: its files are timed, not its products; set model.load=whole")
    model: Any = loaded.model
    prompt = min(PROMPT, context // 2)
    decoded = min(DECODED, context - prompt)
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    prefill, decode = {}, {}
    for batch in BATCHES:
        any_text = torch.arange(batch * prompt, device=device) % embedding.num_embeddings  # all take equal time
        ids = any_text.view(batch, prompt)
        taken = [_timed(model, ids, decoded) for _ in _repeats()][1:]
        first, second = (statistics.median(times) for times in zip(*taken, strict=True))
        prefill[str(batch)], decode[str(batch)] = batch * prompt / first, batch * decoded / second
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "decoded_tokens": decoded,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }


@dataclass(frozen=True)
class Paired:
    """Tokens a second of a model as it is and under a policy, medians over repeats that took turns, and the median of
    the repeats' quotients."""

    plain: float
    under: float
    quotient: float


@torch.no_grad()
def paired_speeds(
    model: Any, policy: Callable[[], AbstractContextManager[Any]], ids: Int[Tensor, "sample seq"], decoded: int
) -> tuple[Paired, Paired]:
    """Of prefill and of decoding, with and without `policy`, on the same prompts."""
    plain, under = [], []
    for _ in _repeats(PAIRS):
        plain.append(_timed(model, ids, decoded))
        with policy():
            under.append(_timed(model, ids, decoded))
    (prefill, decode), (prefill_under, decode_under) = (zip(*taken[1:], strict=True) for taken in (plain, under))
    return _paired(prefill, prefill_under, ids.numel()), _paired(decode, decode_under, len(ids) * decoded)


def _paired(plain: Sequence[float], under: Sequence[float], tokens: int) -> Paired:
    quotients = [one / other for one, other in zip(plain, under, strict=True)]
    return Paired(tokens / statistics.median(plain), tokens / statistics.median(under), statistics.median(quotients))


def _passed_weights(block: Block, config: Any) -> float:
    """Weights of a block's linears that a token passes: of experts chosen by a router, their share."""
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = getattr(text, "num_experts_per_tok", 1) / experts if experts else 1.0
    return float(sum(linear.weight.numel() * (share if linear.of_mixture else 1) for linear in block.linears.values()))


def _query_channels(block: Block, config: Any) -> int:
    """Heads times the size of a head, from what gives the queries alone, else from the config."""
    rows = [len(linear.weight) for name, linear in block.linears.items() if name.endswith("q_proj")]
    text = config.get_text_config()
    heads = text.num_attention_heads
    return rows[0] if rows else heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)


def _cached_channels(block: Block, config: Any) -> int:
    """Rows of what gives keys and values; of a linear that gives the queries too those that are not theirs."""
    rows = {name: len(linear.weight) for name, linear in block.linears.items()}
    fused = sum(count for name, count in rows.items() if name.endswith(FUSED))
    if fused:
        return fused - _query_channels(block, config)
    return sum(count for name, count in rows.items() if name.endswith(("k_proj", "v_proj")))


def _timed(model: Any, ids: Int[Tensor, "sample seq"], decoded: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding, all sequences together."""
    held: list[Any] = []

    def prefill() -> None:
        held[:] = [model(ids, use_cache=True)]

    def decode() -> None:
        output = held[0]
        for _ in range(decoded):
            following = output.logits[:, -1:].argmax(dim=-1)
            output = model(following, past_key_values=output.past_key_values, use_cache=True)

    return seconds_of(ids.device, prefill), seconds_of(ids.device, decode)


def _repeats(most: int = REPEATS) -> Iterator[int]:
    """One to warm up, one that counts, and further ones while there is time."""
    begun = time.perf_counter()
    for number in range(1 + most):
        if number < 2 or time.perf_counter() - begun < ENOUGH:
            yield number


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Unavailable: this device has no semi-structured products, or not for this dtype."""
    if device.type != "cuda":
        raise Unavailable(f"the device is {device.type}; 2:4 products need a CUDA device of compute capability 8.0")
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise Unavailable(f"compute capability {found[0]}.{found[1]}; 2:4 products need 8.0")
    if dtype not in HALVES:
        raise Unavailable(f"the weights are {str(dtype).removeprefix('torch.')}; set model.dtype=bfloat16 or float16")


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of a row [out in] are not zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(-1, 4) != 0).sum(dim=1).le(2).all())


@torch.no_grad()
def measure_model(loaded: LoadedModel) -> dict[str, Any]:
    """`linears`: by linear type, of the first one, `dense_seconds` and `sparse_seconds` (medians over PRODUCTS) and
    `speed_up`, their quotient; `device` and `tokens` say where and of what. Unavailable: it cannot be measured here."""
    device = next(loaded.model.get_input_embeddings().parameters()).device
    check_device(device, loaded.model.dtype)
    linears: dict[str, dict[str, float]] = {}
    for block in loaded.resident(loaded.blocks()[:1]):
        for name, linear in block.linears.items():
            weight = linear.weight
            if not is_two_of_four(weight):
                raise Unavailable(f"{block.name}.{name} is not 2:4; prune with pattern=2:4, without pruner.permute")
            if linear_type(name) not in linears:
                linears[linear_type(name)] = _measured(weight.contiguous(), f"{block.name}.{name}")
    return {"device": torch.cuda.get_device_name(device), "tokens": TOKENS, "linears": linears}


def _measured(weight: Tensor, name: str) -> dict[str, float]:
    hidden = torch.randn(TOKENS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight)
        dense, sparse = _seconds(hidden, weight), _seconds(hidden, packed)
    except RuntimeError as error:  # shapes that the hardware does not take
        raise Unavailable(f"{name} {list(weight.shape)}: {str(error).splitlines()[0]}") from error
    return {"dense_seconds": dense, "sparse_seconds": sparse, "speed_up": dense / sparse}


def _seconds(hidden: Tensor, weight: Tensor) -> float:
    times = []
    for _ in range(WARM_UP + PRODUCTS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.nn.functional.linear(hidden, weight)
        end.record()
        torch.cuda.synchronize(hidden.device)
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[WARM_UP:])
