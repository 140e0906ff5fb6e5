"""Scores of a model: perplexity and zero-shot accuracy. Empty, so that `checks` is had without torch."""
