"""A model folder in, a model folder out."""
