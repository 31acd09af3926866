"""Figures of merit of images, against closed forms, scipy, scikit-learn and colorsys."""

import colorsys
import math

import numpy as np
import pytest
import torch

from train.evaluate.image_metrics import frechet_distance, moments, mottling, overshoot, quantise, saturation
from train.evaluate.neighbours import covered, nearest, neighbour_radius, precision_recall


def gaussian(rng, size, scale=1.0):
    a = torch.randn(size, size, generator=rng, dtype=torch.float64)
    return torch.randn(size, generator=rng, dtype=torch.float64), scale * (a @ a.T / size + 0.1 * torch.eye(size))


def test_fid_is_the_textbook_formula(rng):
    from scipy.linalg import sqrtm

    one, two = gaussian(rng, 12), gaussian(rng, 12, 3.0)
    root = sqrtm((one[1] @ two[1]).numpy()).real
    want = ((one[0] - two[0]) ** 2).sum() + one[1].trace() + two[1].trace() - 2 * np.trace(root)
    assert frechet_distance(one, two) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_fid_of_commuting_gaussians(rng):
    """Diagonal covariances: |m_1 - m_2|^2 + sum (s_1 - s_2)^2. Also where they are singular."""
    s_1, s_2 = torch.rand(6, generator=rng).double(), torch.rand(6, generator=rng).double()
    s_1[0] = s_2[1] = 0
    want = 4 * 6 + (s_1 - s_2).square().sum().item()
    zero = torch.zeros(6, dtype=torch.float64)
    distance = frechet_distance((zero, s_1.square().diag()), (zero + 2, s_2.square().diag()))
    assert distance == pytest.approx(want, rel=1e-6)


def test_fid_agrees_with_torchmetrics(rng):
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid

    a, b = torch.randn(200, 16, generator=rng), 0.5 + 2 * torch.randn(300, 16, generator=rng)
    (m_1, c_1), (m_2, c_2) = moments(a), moments(b)
    assert frechet_distance((m_1, c_1), (m_2, c_2)) == pytest.approx(_compute_fid(m_1, c_1, m_2, c_2).item(), rel=1e-6)


def test_moments(rng):
    x = torch.randn(50, 4, generator=rng)
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T))


def test_precision_and_recall_by_hand():
    """On a line with k = 1: the balls of 0, 1, 10 reach 1, 1 and 9 far; those of 1.5, 3, 30 reach 1.5, 1.5 and 27."""
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [3.0], [30.0]])
    radius = neighbour_radius(real, 1)
    assert radius.tolist() == [1, 1, 9]
    assert covered(fake, real, radius) == pytest.approx(2 / 3)          # 30 lies in no ball
    precision, recall = precision_recall(real, radius, fake, 1)
    assert (precision, recall) == pytest.approx((2 / 3, 1.0))           # 0 lies in the ball of 1.5, 10 in that of 30


def test_precision_and_recall_are_scikit_learns_neighbours(rng):
    neighbors = pytest.importorskip("sklearn.neighbors")
    real, fake = torch.randn(300, 8, generator=rng), 0.7 * torch.randn(200, 8, generator=rng) + 0.3

    def balls(x):
        return neighbors.NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x)[0][:, 3]

    def share(points, manifold):
        distance = np.linalg.norm(points[:, None] - manifold[None], axis=-1)
        return (distance <= balls(manifold)).any(1).mean()

    a, b = real.double().numpy(), fake.double().numpy()
    assert precision_recall(real, neighbour_radius(real), fake) == pytest.approx((share(b, a), share(a, b)))


def test_extremes(rng):
    real = torch.randn(400, 8, generator=rng)
    radius = neighbour_radius(real)
    assert precision_recall(real, radius, real) == (1, 1)
    assert precision_recall(real, radius, real + 100) == (0, 0)
    one, recall = precision_recall(real, radius, real[:1] + 1e-6 * torch.randn(50, 8, generator=rng))
    assert one == 1 and recall < 0.02
    with pytest.raises(ValueError, match="more than 3 samples"):
        neighbour_radius(real[:3])


def test_close_neighbours_far_from_the_origin():
    """Features of large norm: distances of 1e-3 beside norms of 1e3."""
    x = 1000 + 1e-3 * torch.arange(5, dtype=torch.float64)[:, None].expand(5, 4)
    assert nearest(x, x, 2)[0][0].tolist() == pytest.approx([0, 2e-3], rel=1e-3)


def test_saturation_is_colorsys(rng):
    pixels = torch.randint(0, 256, (2, 3, 5, 5), generator=rng).to(torch.uint8)
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0, 7
    for image, got in zip(pixels, saturation(pixels).tolist(), strict=True):
        want = [colorsys.rgb_to_hsv(*(p.tolist()))[1] for p in image.double().flatten(1).T / 255]
        assert got == pytest.approx(sum(want) / len(want), rel=1e-9)


def test_overshoot_and_quantise():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 3.0, 1.0]).view(1, 3, 1, 2)
    assert overshoot(x).item() == pytest.approx(math.sqrt((0.25 + 4) / 6))
    assert quantise(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_mottling_is_the_deviation_of_noise_and_nothing_in_flat_pictures(rng):
    """The median of |N(0, 2 s^2)| is 0.9539 s; an edge is a few pixels, which a median does not see."""
    flat = torch.full((2, 3, 64, 64), 100.0)
    flat[..., 32:] = 200
    assert mottling(flat.to(torch.uint8)).tolist() == [0, 0]
    noise = torch.randn(flat.shape, generator=rng)
    found = mottling((flat + 20 * noise).round().to(torch.uint8))
    assert found.tolist() == pytest.approx([0.9539 * 20] * 2, rel=0.06)
