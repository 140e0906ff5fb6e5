"""A colour for how much was lost against the dense model: green for little, yellow, red for much."""

from __future__ import annotations

LITTLE, MUCH = 0.05, 0.20  # of a perplexity, relative
LITTLE_ACCURACY, MUCH_ACCURACY = 0.01, 0.05  # of an accuracy, in itself


def colour_of_loss(loss: float, accuracy: bool = False) -> str:
    """Rich's name of the colour."""
    little, much = (LITTLE_ACCURACY, MUCH_ACCURACY) if accuracy else (LITTLE, MUCH)
    return "green" if loss <= little else "yellow" if loss <= much else "red"
