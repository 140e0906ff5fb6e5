"""A model without its weights, and its sizes; those of the paper's models are known where neither a folder nor the hub
has their config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from besa_exp.blocks.block import discover_blocks, discover_linears
from besa_exp.checkpoints.fetch import cached_folder
from besa_exp.checkpoints.load import config_folder, model_path, unpacked_gguf
from besa_exp.checkpoints.transformers_config import dtype_of, read_config
from besa_exp.errors import ConfigurationError, first_line
from besa_exp.settings import ModelSettings

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = {  # by these keys, and the context
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32, 2048),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 40, 2048),
    "huggyllama/llama-30b": (6656, 17920, 60, 52, 52, 2048),
    "huggyllama/llama-65b": (8192, 22016, 80, 64, 64, 2048),
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 4096),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40, 4096),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8, 4096),
}


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model as it is computed with and saved: of each block, of what is outside them (tied weights once), of
    a mask of every linear at one bit a weight, and of a token's hidden state."""

    blocks: list[int]
    outside: int
    masks: int
    state: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.outside


def model_size(model: PreTrainedModel) -> ModelSize:
    modules, itemsize = discover_blocks(model)[1], model.dtype.itemsize
    inside = {parameter for module in modules for parameter in module.parameters()}
    linears = [linear.weight.numel() for module in modules for linear in discover_linears(module).values()]
    return ModelSize(
        blocks=[itemsize * sum(value.numel() for value in module.state_dict().values()) for module in modules],
        outside=itemsize * sum(value.numel() for value in model.parameters() if value not in inside),
        masks=sum(-(-count // 8) for count in linears),
        state=itemsize * model.config.get_text_config().hidden_size,
    )


def model_without_weights(settings: ModelSettings, offline: bool) -> PreTrainedModel:
    """The whole model on the meta device. ConfigurationError: its config cannot be loaded or is not known."""
    known, trusted = SIZES.get(settings.path) if local_folder(settings) is None else None, settings.trust_remote_code
    folder = Path() if known else config_folder(settings, offline)
    try:
        if known:
            sizes = dict(zip((*KEYS, "max_position_embeddings"), known, strict=True))
            config = LlamaConfig.from_dict({"vocab_size": 32000, "dtype": "float16", **sizes})
        else:
            config = read_config(folder, trusted)[0]
        with init_empty_weights():
            dtype = dtype_of(config, settings.dtype, folder)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model.path={settings.path}: no model can be built from its config ({first_line(error)}); it must be a "
            "decoder-only model that transformers knows"
        ) from error
    model.tie_weights()
    return model.eval()


def local_folder(settings: ModelSettings) -> Path | None:
    """Where the model's files lie on this machine; None: they are not there."""
    path = unpacked_gguf(settings) or Path(model_path(settings))
    return path if path.is_dir() else cached_folder(settings)
