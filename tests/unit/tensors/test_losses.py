"""The losses against literal fp64 formulas, and what a massive token does to them."""

import pytest
import torch

from besa_exp.tensors.losses import channel_loss, differentiate, token_loss, weighted_loss


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_token_loss_is_the_mean_relative_squared_error_of_the_tokens():
    targets, outputs = states(3, 7, 5), states(3, 7, 5, seed=1)
    y, yhat = targets.double().reshape(-1, 5), outputs.double().reshape(-1, 5)
    expected = sum(((y[t] - yhat[t]) ** 2).sum() / (y[t] ** 2).sum() for t in range(21)) / 21
    assert float(token_loss(outputs, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_the_channel_loss_is_the_papers_formula():
    targets, outputs = states(3, 7, 5), states(3, 7, 5, seed=1)
    y, yhat = targets.double().reshape(-1, 5), outputs.double().reshape(-1, 5)
    expected = sum(((y[:, c] - yhat[:, c]) ** 2).sum() / (y[:, c] ** 2).sum() for c in range(5)) / 5
    assert float(channel_loss(outputs, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_the_weighted_loss_is_each_tokens_relative_error_times_its_size_window_by_window():
    targets, outputs = states(3, 7, 5), states(3, 7, 5, seed=1)
    targets[:, 2] *= 50
    y, yhat = targets.double(), outputs.double()
    windows = []
    for n in range(3):
        sizes = [y[n, t].norm() for t in range(7)]
        windows.append(sum(((y[n, t] - yhat[n, t]) ** 2).sum() / sizes[t] for t in range(7)) / sum(sizes))
    assert float(weighted_loss(outputs, targets)) == pytest.approx(float(sum(windows) / 3), rel=1e-5)


def test_a_massive_token_that_vanishes_is_seen_by_the_weighted_loss_alone():
    targets = states(2, 512, 8)
    targets[:, 0] *= 100
    outputs = targets.clone()
    outputs[:, 0] = 0
    assert float(token_loss(outputs, targets)) == pytest.approx(1 / 512)
    assert 0.1 < float(weighted_loss(outputs, targets)) < 0.3
    outputs[:, 1:] = 0  # and the others are not hidden by it
    outputs[:, 0] = targets[:, 0]
    assert 0.7 < float(weighted_loss(outputs, targets)) < 0.9


def test_a_massive_token_hides_the_others_from_the_channel_loss_alone():
    targets = states(2, 16, 8)
    targets[:, 0] *= 1e3
    ordinary = targets.clone()
    ordinary[:, 1:] = 0  # all that the ordinary tokens say is lost
    assert float(channel_loss(ordinary, targets)) < 1e-3
    assert float(token_loss(ordinary, targets)) == pytest.approx(15 / 16)


def test_a_tokens_own_size_does_not_change_its_part_of_the_token_loss():
    targets, outputs = states(2, 6, 8), states(2, 6, 8, seed=1)
    sizes = 10 ** (4 * states(2, 6, 1, seed=2))
    assert float(token_loss(outputs * sizes, targets * sizes)) == pytest.approx(float(token_loss(outputs, targets)))


@pytest.mark.parametrize("loss", [token_loss, weighted_loss, channel_loss])
def test_a_token_or_channel_of_zeros_leaves_the_loss_finite(loss):
    targets = states(2, 6, 8)
    targets[0, 0], targets[..., 3] = 0, 0
    assert torch.isfinite(loss(targets.clone(), targets))
    assert float(loss(targets.clone(), targets)) == 0


def mean_square(outputs):
    return outputs.square().mean() * 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_handed_on_as_it_is_where_products_are_not_fp16(dtype):
    outputs = states(2, 6, 8).to(dtype)
    loss, gradient, scale = differentiate(mean_square, outputs, dtype)
    assert float(scale) == 1
    assert float(loss) == pytest.approx(float(mean_square(outputs.float())))
    assert torch.equal(gradient, (outputs.float() * (2e-12 / outputs.numel())).to(dtype))


def test_in_fp16_a_gradient_below_its_smallest_number_is_handed_on_as_a_power_of_two_times_itself():
    outputs = states(2, 6, 8).half()
    _, gradient, scale = differentiate(mean_square, outputs, torch.float16)
    true = outputs.double() * (2e-12 / outputs.numel())
    assert true.half().count_nonzero() == 0
    assert torch.log2(scale) == torch.log2(scale).round()
    assert 0.5 < float(gradient.abs().max()) <= 1
    torch.testing.assert_close(gradient.double() / float(scale), true, rtol=2e-3, atol=0)
