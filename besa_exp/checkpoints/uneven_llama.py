"""A decoder whose blocks have their own number of heads and channels: `groups_by_block` and `channels_by_block` of its
config. All else is transformers' own class."""

from torch import nn
from transformers import LlamaForCausalLM


class UnevenLlamaForCausalLM(LlamaForCausalLM):
    """The widest block's widths stand in the config; each block's linears are replaced."""

    def __init__(self, config):
        super().__init__(config)
        resize_blocks(self, config)
        self.post_init()


def resize_blocks(model, config):
    """Gives each block linears of its own widths."""
    each = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    widths = zip(model.model.layers, config.groups_by_block, config.channels_by_block, strict=True)
    for layer, groups, channels in widths:
        rows = {"q_proj": groups * each, "k_proj": groups * config.head_dim, "v_proj": groups * config.head_dim}
        _resize(layer.self_attn, rows, {"o_proj": groups * each})
        _resize(layer.mlp, {"gate_proj": channels, "up_proj": channels}, {"down_proj": channels})


def _resize(module, rows, columns):
    for name in (*rows, *columns):
        old = getattr(module, name)
        sizes = (columns.get(name, old.in_features), rows.get(name, old.out_features))
        setattr(module, name, nn.Linear(*sizes, bias=old.bias is not None, dtype=old.weight.dtype))
