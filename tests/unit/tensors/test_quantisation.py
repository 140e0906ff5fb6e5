"""The quantiser against a literal fp64 formula, its clipping's gradient against differences, and zeros."""

from __future__ import annotations

import math

import pytest
import torch

from besa_exp.tensors.importance import rounded_importance, wanda_importance
from besa_exp.tensors.quantisation import Quantiser, clipping_gradient, quantise

BITS_AND_GROUPS = [(bits, size) for bits in (2, 3, 4, 8) for size in (None, 1, 7, 16, 100)]


def draw(rows: int = 6, columns: int = 23) -> torch.Tensor:
    """Ordinary rows, one all positive, one all negative, one of zeros, one with zeros in between."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    weight[1], weight[2], weight[3] = weight[1].abs() + 0.1, -weight[2].abs() - 0.1, 0
    weight[4, ::2] = 0
    return weight


def draw_logits(weight: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    logits = quantiser.logits(weight, 0.9)
    return logits + 0.7 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(8))


def literal(row: list[float], bits: int, size: int | None, strengths: list[tuple[float, float]]) -> list[float]:
    """The formula, number by number; `strengths` are (lower end, upper end) of each group."""
    size, result = size or len(row), []
    for number, start in enumerate(range(0, len(row), size)):
        part = row[start : start + size]
        low, high = min(0.0, *part) * strengths[number][0], max(0.0, *part) * strengths[number][1]
        levels = 2**bits - 1
        scale = (high - low) / levels or 1.0
        zero = round(-low / scale)
        result += [(min(max(round(value / scale) + zero, 0), levels) - zero) * scale for value in part]
    return result


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("bits", "size"), BITS_AND_GROUPS)
def test_rounding_is_the_literal_formula(bits, size, clipped):
    weight, quantiser = draw(), Quantiser(bits, size)
    logits = draw_logits(weight, quantiser) if clipped else None
    groups = math.ceil(weight.shape[1] / (size or weight.shape[1]))
    strengths = torch.ones(2, len(weight), groups) if logits is None else logits.double().sigmoid()
    expected = [
        literal(row.tolist(), bits, size, [tuple(pair) for pair in strengths[:, number].T.tolist()])
        for number, row in enumerate(weight.double())
    ]
    rounded = quantise(weight, quantiser, logits)
    torch.testing.assert_close(rounded.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "size"), BITS_AND_GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_exact_and_a_group_has_no_more_values_than_its_bits_allow(bits, size, dtype):
    weight, quantiser = draw().to(dtype), Quantiser(bits, size)
    for logits in (None, draw_logits(weight, quantiser)):
        rounded = quantise(weight, quantiser, logits)
        assert rounded.dtype == dtype
        assert rounded[weight == 0].eq(0).all()
        for row in rounded:
            for group in row.split(size or len(row)):
                assert len(group.unique()) <= 2**bits


def test_without_clipping_no_weight_moves_by_more_than_half_a_step_and_the_half_of_the_zero_point():
    weight = draw()
    step = (weight.amax(dim=1).clamp(min=0) - weight.amin(dim=1).clamp(max=0)) / 15
    assert ((quantise(weight, Quantiser(4)) - weight).abs() <= step[:, None] + 1e-6).all()


@pytest.mark.parametrize(("bits", "size"), [(2, None), (3, 7), (4, None), (4, 16), (8, 5)])
def test_the_gradient_of_the_clipping_is_that_of_the_straight_through_surrogate(bits, size):
    """The surrogate holds what rounding adds, the zero point, and who is clipped, as they are where the gradient is."""
    weight, quantiser = draw(), Quantiser(bits, size)
    logits = draw_logits(weight, quantiser)
    slopes = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    width = size or weight.shape[1]
    group = torch.arange(weight.shape[1]) // width

    def parts(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and lower end of the group of every weight, in fp64."""
        chunks = weight.double().split(width, dim=1)
        low = torch.stack([chunk.amin(dim=1).clamp(max=0) for chunk in chunks], dim=1) * at[0].sigmoid()
        high = torch.stack([chunk.amax(dim=1).clamp(min=0) for chunk in chunks], dim=1) * at[1].sigmoid()
        scale = (high - low) / (2**bits - 1)
        return torch.where(scale > 0, scale, 1.0)[:, group], low[:, group]

    scale, low = parts(logits.double())
    zero = (-low / scale).round()
    added = (weight.double() / scale).round() - weight.double() / scale
    rounded = (weight.double() / scale).round() + zero
    clipped = rounded.clamp(0, 2**bits - 1)

    def surrogate(at: torch.Tensor) -> torch.Tensor:
        steps = parts(at)[0]
        places = torch.where(clipped == rounded, weight.double() / steps + added + zero, clipped)
        return (slopes.double() * (places - zero) * steps).sum()

    found = clipping_gradient(weight, slopes, quantiser, logits)
    shift = 1e-7
    for index in torch.cartesian_prod(*(torch.arange(length) for length in logits.shape)):
        up, down = logits.double().clone(), logits.double().clone()
        up[tuple(index)] += shift
        down[tuple(index)] -= shift
        expected = (surrogate(up) - surrogate(down)) / (2 * shift)
        assert float(found[tuple(index)]) == pytest.approx(float(expected), rel=2e-3, abs=2e-4), index


def test_the_importance_of_rounded_weights_is_wandas_without_rounding_and_none_where_they_round_to_zero():
    weight, norm = draw(), torch.rand(23, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rounded_importance(weight, weight, norm), wanda_importance(weight, norm).square())
    rounded = quantise(weight, Quantiser(2))
    importance = rounded_importance(weight, rounded, norm)
    spared = (weight.double().square() - (weight.double() - rounded.double()).square()) * norm.double()
    torch.testing.assert_close(importance.double(), spared, rtol=1e-4, atol=1e-6)
    assert importance[rounded == 0].eq(0).all()
    assert (importance[rounded != 0] > 0).all()


@pytest.mark.parametrize(
    ("values", "named"), [({"bits": 1}, "bits=1"), ({"bits": 9}, "bits=9"), ({"group_size": 0}, "size=0")]
)
def test_a_quantiser_that_cannot_be_is_refused_by_key_and_value(values, named):
    with pytest.raises(ValueError, match=named):
        Quantiser(**values)
