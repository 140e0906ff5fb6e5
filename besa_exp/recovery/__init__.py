"""A pruned model in, the same zeros and better weights out."""
