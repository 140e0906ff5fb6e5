"""What a model costs beside its quality: counted once, and tokens a second measured on the device where it lies.

    FLOPs a token = 2 * (weights of the linears that a token passes, the head's with them) + 4 * C * (query channels)

summed over blocks, at a context of C tokens: the second part is attention's two products of queries with C keys and of
weights with C values. Zeros count: dense products compute them. Of a mixture's experts those that run count.

Prefill is one pass over a prompt with a cache being filled, decoding one token after the other with it; both greedy,
for 1 and 8 sequences at a time. Times are medians of few repeats and say something of this machine alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import Block, capture_blocks
from besa_exp.errors import Unavailable

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

BATCHES = (1, 8)
PROMPT, DECODED = 128, 16  # tokens; of a model with a shorter context what has room
REPEATS, ENOUGH = 3, 10.0  # repeats of a measurement after one to warm up; seconds after which no further one begins


@torch.no_grad()
def cost_of(loaded: LoadedModel, context: int) -> dict[str, Any]:
    """`parameters`, `bytes`, `flops_per_token` at `prompt_tokens`, `cache_bytes_per_token`, and by batch size
    `prefill_tokens_per_second` and `decode_tokens_per_second`. Unavailable: the model is streamed."""
    if loaded.weights is not None:
        raise Unavailable("the model is streamed: its files are timed, not its products; set model.load=whole")
    model: Any = loaded.model
    prompt = min(PROMPT, context // 2)
    decoded = min(DECODED, context - prompt)
    device = model.get_input_embeddings().weight.device
    values = counts_of(model, prompt) | {"cache_bytes_per_token": cache_bytes(model, prompt)}
    prefill, decode = {}, {}
    for batch in BATCHES:
        prefill[str(batch)], decode[str(batch)] = _speeds(model, batch, prompt, decoded)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return values | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": name,
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt,
        "decoded_tokens": decoded,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }


def counts_of(model: Any, context: int) -> dict[str, int]:
    """Of the model as it is: tied weights count once, and the head's products whether they are tied or not."""
    held = [*model.parameters()]
    blocks = capture_blocks(model, torch.empty(0, 0, dtype=torch.long))  # none is called
    head = model.get_output_embeddings()
    linears = sum(_passed_weights(block, model.config) for block in blocks) + (head.weight.numel() if head else 0)
    attention = sum(_query_channels(block, model.config) for block in blocks)
    return {
        "parameters": sum(parameter.numel() for parameter in held),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in held),
        "flops_per_token": 2 * round(linears) + 4 * context * attention,
    }


def _passed_weights(block: Block, config: Any) -> float:
    """Weights of a block's linears that a token passes: of experts chosen by a router, their share."""
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = getattr(text, "num_experts_per_tok", 1) / experts if experts else 1.0
    return float(sum(linear.weight.numel() * (share if linear.of_mixture else 1) for linear in block.linears.values()))


def _query_channels(block: Block, config: Any) -> int:
    """Heads times the size of a head, from what gives the queries, else the model's hidden size."""
    rows = [len(linear.weight) for name, linear in block.linears.items() if name.endswith("q_proj")]
    return rows[0] if rows else config.get_text_config().hidden_size


@torch.no_grad()
def cache_bytes(model: Any, tokens: int) -> float:
    """What a token adds to the cache of keys and values: read off the one that a prompt of so many tokens fills."""
    held = model(_ids(model, 1, tokens), use_cache=True).past_key_values
    tensors = [t for layer in held.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / tokens


def _ids(model: nn.Module, batch: int, tokens: int) -> Tensor:
    """Of any text: products take equal time for all."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, device = embedding.num_embeddings, embedding.weight.device
    return (torch.arange(batch * tokens, device=device) % vocabulary).view(batch, tokens)


def _speeds(model: Any, batch: int, prompt: int, decoded: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, all sequences together."""
    ids = _ids(model, batch, prompt)
    held: list[Any] = []

    def prefill() -> None:
        held[:] = [model(ids, use_cache=True)]

    def decode() -> None:
        output = held[0]
        for _ in range(decoded):
            following = output.logits[:, -1:].argmax(dim=-1)
            output = model(following, past_key_values=output.past_key_values, use_cache=True)

    taken = [(_seconds(prefill, ids.device), _seconds(decode, ids.device)) for _ in _repeats()]
    first, second = (statistics.median(times) for times in zip(*taken[1:], strict=True))
    return batch * prompt / first, batch * decoded / second


def _repeats() -> Any:
    """One to warm up, one that counts, and further ones while there is time."""
    begun = time.perf_counter()
    for number in range(1 + REPEATS):
        if number < 2 or time.perf_counter() - begun < ENOUGH:
            yield number


def _seconds(act: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
