"""Which whole parts of a model stay: blocks, groups of heads, channels."""
