"""Neighbours, precision and recall: against all distances in float64 by NumPy, ties and duplicates included."""

import numpy as np
import pytest
import torch

from train.evaluate import neighbours
from train.evaluate.neighbours import Bound, covered, nearest, neighbour_accuracy, neighbour_radius, precision_recall

CPU = torch.device("cpu")


def dense(a, b):
    """Every distance (N,M), from differences in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    return np.stack([np.sqrt(((b - row) ** 2).sum(1)) for row in a])


def share(points, manifold, radius):
    return (dense(points, manifold) <= radius).any(1).mean()


def oracle(real, fake, k=3):
    radii = [np.sort(dense(x, x), 1)[:, k] for x in (real, fake)]
    return share(fake, real, radii[0]), share(real, fake, radii[1])


def near_ties(rng):
    """Points of a lattice, moved by 1e-7 of a step: to a product in float32 all of a shell are equally far. Far away
    from the origin, where its products are coarse."""
    lattice = torch.randint(0, 3, (240, 12), generator=rng).double()
    return 50 + lattice + 1e-7 * torch.randn(lattice.shape, generator=rng, dtype=torch.float64)


CLOUDS = {
    "features": lambda rng: torch.randn(300, 40, generator=rng).relu(),
    "lattice": lambda rng: torch.randint(0, 3, (300, 6), generator=rng).float(),          # ties everywhere
    "duplicates": lambda rng: torch.randn(12, 20, generator=rng).repeat_interleave(25, 0),  # more than candidates
    "collapsed": lambda rng: torch.ones(40, 5),
    "near ties": near_ties,
    "far": lambda rng: 1e4 + torch.randn(200, 8, generator=rng),
    "outlier": lambda rng: torch.cat([1e-3 * torch.randn(200, 8, generator=rng), torch.full((1, 8), 1e4)]),
    "few": lambda rng: torch.randn(5, 3, generator=rng),
}


@pytest.fixture(params=[7, 1024])
def chunk(request, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", request.param)


@pytest.mark.parametrize("kind", CLOUDS)
def test_neighbours_are_those_of_float64(rng, chunk, kind):
    x = CLOUDS[kind](rng)
    k = 4
    distance, index = nearest(x, x, k)
    every = dense(x, x)
    np.testing.assert_allclose(distance, np.sort(every, 1)[:, :k], rtol=1e-12, atol=0)
    np.testing.assert_allclose(np.take_along_axis(every, index.numpy(), 1), distance, rtol=1e-12, atol=0)
    assert all(len(set(row)) == k for row in index.tolist())
    np.testing.assert_allclose(neighbour_radius(x), np.sort(every, 1)[:, 3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", CLOUDS)
def test_precision_and_recall_are_those_of_float64(rng, chunk, kind):
    """Half of the points of a cloud against the others, and against copies of themselves."""
    x = CLOUDS[kind](rng)
    x = x[torch.randperm(len(x), generator=rng)].repeat(2 if kind == "few" else 1, 1)
    real, fake = x[: len(x) // 2], x[len(x) // 2 :]
    for a, b in ((real, fake), (fake, real), (real, torch.cat([fake, real[::3]]))):
        assert precision_recall(a, neighbour_radius(a), b) == oracle(a, b)


def test_the_edge_of_a_ball_belongs_to_it(rng):
    """Points on the sphere of a ball whose radius is an exact distance; a millionth of a millionth further out."""
    centre, direction = torch.randn(30, generator=rng).double(), torch.randn(30, generator=rng).double()
    ball, edge = centre[None], (centre + direction)[None]
    radius = (edge - ball).square().sum(1).sqrt()
    out = (centre + (1 + 1e-12) * direction)[None]
    assert covered(edge, ball, radius) == 1 and covered(out, ball, radius) == 0
    assert covered(edge, ball.repeat(2, 1), torch.cat([radius * (1 - 1e-12), radius])) == 1  # to float32 both are one


def test_a_bound_is_one_and_tight_enough_to_be_of_use(rng):
    """Never above the truth; of features like Inception's within a hundredth of their nearest distances."""
    features = torch.randn(500, 2048, generator=rng).relu() + 0.3
    below = Bound.of(features[100:], CPU).below(features[:100]).double().numpy()
    true = dense(features[:100], features[100:]) ** 2
    assert (below <= true).all() and (true - below).max() < 0.01 * true.min()
    radius = torch.rand(400, generator=rng).double() * 60
    below = Bound.of(features[100:], CPU, radius).below(features[:100]).double().numpy()
    gap = true - radius.square().numpy() - below
    assert gap.min() >= 0 and gap.max() < 0.01 * true.min()
    points, radius = torch.randn(50, 2, generator=rng), 1000 + torch.rand(50, generator=rng).double()
    assert (Bound.of(points, CPU, radius).below(points).double() <= -radius.square()).diag().all()


def test_a_bound_holds_where_all_roundings_go_one_way():
    """A long sum of one product: float32 adds it up too small, by more than the other terms of the bound allow."""
    v = torch.full((1, 1 << 18), 0.1)
    assert (v @ v.T).item() < (1 - 100 * neighbours.UNIT) * v.double().square().sum().item()
    assert (Bound.of(torch.cat([v, -v]), CPU).below(v)[0, 0] <= 0).all()


def test_most_points_need_no_more_than_their_candidates(rng, monkeypatch):
    """Of ordinary features, wherever they lie, float64 sees k + 8 candidates a point and never all."""
    seen = []
    plain = Bound.distances
    monkeypatch.setattr(Bound, "distances", lambda self, points, index: seen.append(index.shape) or
                        plain(self, points, index))
    nearest(1e3 + torch.randn(400, 64, generator=rng), 1e3 + torch.randn(500, 64, generator=rng), 4)
    assert seen == [(400, 12)]


def test_products_are_float32s_own(rng):
    """Whatever was set for products before is set again after."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        seen = [torch.get_float32_matmul_precision() for _ in neighbours.in_chunks(torch.zeros(3, 2), "points")]
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_progress_is_told(rng, capsys):
    x = torch.randn(30, 4, generator=rng)
    precision_recall(x, neighbour_radius(x), x)
    said = capsys.readouterr().err
    assert all(f"{what}: " in said for what in ("radii", "radii of samples", "precision", "recall"))
    assert "0/30" in said


def test_accuracy_of_nearest_neighbours():
    real, labels = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]]), torch.tensor([0, 0, 0, 1, 1, 1])
    fake = torch.tensor([[0.05], [9.05], [8.0], [1.0]])
    assert neighbour_accuracy(real, labels, fake, torch.tensor([0, 1, 1, 1]), k=3) == 0.75
