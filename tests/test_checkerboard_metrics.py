"""The figures of merit of the checkerboard, on points whose answer is known."""

import math

import pytest
import torch

from train.data.checkerboard import Checkerboard
from train.evaluate.checkerboard_metrics import (
    cells,
    histogram_kl,
    metrics,
    outside_share,
    sliced_wasserstein,
    spread,
    unevenness,
)

N = 20_000


@pytest.fixture
def true(rng):
    return Checkerboard.load().batch(N, rng)[0]


def centres() -> torch.Tensor:
    """The centres of all 16 cells, those of the support first."""
    all_16 = [(2 * c - 3.0, 2 * r - 3.0) for r in range(4) for c in range(4)]
    return torch.tensor(sorted(all_16, key=lambda p: int(p[0] + p[1] + 6) // 2 % 2))


def test_cells_are_numbered_once_each():
    index = cells(centres())
    assert sorted(index[:8].tolist()) == list(range(8))
    assert (index[8:] == -1).all()


def test_true_samples_are_good(true, rng):
    found = metrics(true, Checkerboard.load().batch(N, rng)[0])
    assert found["outside"] == 0
    assert 0.5 < found["kl"] / (127 / (2 * N)) < 1.5  # the bias of finite samples and nothing else
    assert found["wasserstein"] < 0.1
    assert found["uneven"] < 0.01
    assert found["spread"] == pytest.approx(1, abs=0.01)


def test_a_gaussian_blob_is_bad(true, rng):
    blob = torch.randn(N, 2, generator=rng)
    found = metrics(blob, true)
    assert found["outside"] == pytest.approx(0.5, abs=0.02)  # half of every ring is on the support
    assert found["kl"] > 1 and found["wasserstein"] > 1 and found["uneven"] > 0.3


def test_points_beyond_the_board_are_outside():
    assert outside_share(torch.tensor([[-5.0, -5.0], [-3.0, -3.0], [9.0, 1.0], [4.0, 3.0]])) == 0.75


def test_outside_share_of_the_whole_square(rng):
    assert outside_share(8 * torch.rand(N, 2, generator=rng) - 4) == pytest.approx(0.5, abs=0.02)


def test_kl_of_the_whole_square_is_log_2(rng):
    square = 8 * torch.rand(N, 2, generator=rng) - 4
    assert histogram_kl(square) == pytest.approx(math.log(2), abs=0.05)


def test_kl_of_half_the_cells(true):
    """q = 2p on half of the cells and next to nothing on the other half: the smoothing keeps it finite."""
    half = true[cells(true) < 4]
    n = len(half)
    empty = 0.5 * math.log((1 / 128) / (0.5 / (n + 64.5)))
    assert histogram_kl(half) == pytest.approx(0.5 * math.log(0.5) + empty, abs=0.05)


def test_kl_needs_bins_that_fit():
    with pytest.raises(ValueError, match="multiple of 4"):
        histogram_kl(torch.zeros(3, 2), bins=30)


def test_unevenness(true):
    assert unevenness(torch.full((10, 2), -3.0)) == pytest.approx(7 / 8)
    assert unevenness(true[cells(true) < 4]) == pytest.approx(0.5, abs=0.01)
    assert math.isnan(unevenness(torch.full((10, 2), 9.0)))


def test_spread_of_a_scale_and_of_the_centre(true):
    assert spread(1.25 * true) == pytest.approx(1.25 * spread(true), rel=1e-5)
    assert spread(torch.zeros(5, 2)) == 0


@pytest.mark.parametrize("shift", [(0.5, 0.0), (0.3, -0.4), (0.0, 2.0)])
def test_sliced_wasserstein_of_a_shift_is_its_length(true, shift):
    moved = true + torch.tensor(shift)
    assert sliced_wasserstein(moved, true) == pytest.approx(math.hypot(*shift), rel=1e-4)


def test_sliced_wasserstein_of_a_scale(true):
    """W_2^2 = (s - 1)^2 E[<x, theta>^2], and twice its mean over theta is (s - 1)^2 E|x|^2."""
    expected = 0.25 * true.square().sum(1).mean().sqrt().item()
    assert sliced_wasserstein(1.25 * true, true) == pytest.approx(expected, rel=1e-4)


def test_sliced_wasserstein_does_not_care_for_order(true, rng):
    assert sliced_wasserstein(true, true[torch.randperm(N, generator=rng)]) == 0


def test_sliced_wasserstein_needs_equal_numbers(true):
    with pytest.raises(ValueError, match="same number"):
        sliced_wasserstein(true, true[:10])


def test_points_that_are_not_finite_are_refused(true):
    bad = true.clone()
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 20000 points"):
        metrics(bad, true)
