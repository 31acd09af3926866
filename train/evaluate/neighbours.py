r"""Nearest neighbours among features, and what is read off them: improved precision and recall, accuracy.

Float32 sorts out, float64 decides. A matrix product in float32, on the device, gives a *lower bound* of every squared
distance (:class:`Bound`). Pairs that it does not exclude are few; their distances are computed from the differences in
float64. So every answer is that of float64, ties and duplicates included, at the price of float32.

Shapes: N points, M points of a manifold, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

CPU = torch.device("cpu")
CHUNK = 1024     # rows of the float32 matrix at a time
SPARE = 8        # candidates beyond those that are asked for
UNIT = 2.0**-24  # float32's unit roundoff


@dataclass(frozen=True, eq=False)
class Bound:
    r"""Lower bounds of |a - b|^2 - r_b^2 of points a to all points b of a manifold, r_b a radius of each (or 0).

    With a and b measured from the manifold's mean and rounded to float32, |a - b|^2 is computed as |a|^2 + |b|^2 - 2 ab
    with an error of at most e = (D / 2 + 16) u (|a| + |b|)^2 <= 2 (D / 2 + 16) u (|a|^2 + |b|^2): a sum of D products
    in float32 is wrong by at most D u |a| |b| in whatever order it is added up, rounding of a, b and of the other sums
    is within 16 u. So (1 - 2 (D / 2 + 16) u) (|a|^2 + |b|^2) - 2 ab is a bound, and costs one product of matrices.
    """

    manifold: Tensor   # (M,D)
    radius: Tensor     # (M,) float64
    device: torch.device
    centre: Tensor     # (D,) float64
    shrink: float
    columns: Tensor    # (M,) float32: what a point of the manifold adds to its column
    points: Tensor     # (M,D) float32, from the centre

    @classmethod
    def of(cls, manifold: Tensor, device: torch.device, radius: Tensor | None = None) -> Bound:
        radius = torch.zeros(len(manifold), dtype=torch.float64) if radius is None else radius.double().cpu()
        centre = manifold.mean(0, dtype=torch.float64)
        shrink = 1 - 2.02 * (manifold.shape[1] / 2 + 16) * UNIT
        centred = manifold.double() - centre
        columns = shrink * centred.square().sum(1) - radius.square() * (1 + 8 * UNIT)
        return cls(manifold, radius, device, centre, shrink, columns.float().to(device), centred.float().to(device))

    def below(self, points: Tensor) -> Tensor:
        """The bounds (N,M) of points (N,D), on the device."""
        centred = points.double() - self.centre
        rows = (self.shrink * centred.square().sum(1)).float().to(self.device)
        return torch.addmm(self.columns, centred.float().to(self.device), self.points.T, alpha=-2).add_(rows[:, None])

    def distances(self, points: Tensor, index: Tensor) -> Tensor:
        """Distances of points (N,D) to some points of the manifold, index (N,m), in float64 from the differences."""
        parts = zip(points.double().split(4), index.cpu().split(4), strict=True)
        return torch.cat([(self.manifold[i].double() - a[:, None]).square().sum(2).sqrt() for a, i in parts])


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 are float32's, not those of TF32 or bfloat16: the bound is of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_chunks(points: Tensor, what: str) -> Iterator[Tensor]:
    with full_float32(), tqdm(total=len(points), desc=what, unit="point", leave=False) as bar:
        for part in points.split(CHUNK):
            yield part
            bar.update(len(part))


def nearest(points: Tensor, manifold: Tensor, k: int, device: torch.device = CPU,
            what: str = "neighbours") -> tuple[Tensor, Tensor]:
    """The k nearest points of a manifold (M,D) to each of points (N,D), near to far: distances (N,k) in float64, and
    indices (N,k). ``what`` names the progress bar.

    Candidates are the k + 8 of least bound. Where the k-th of them is nearer than the last one's bound, no other point
    can be nearer. Elsewhere (many duplicates) all distances of that point are computed in float64.
    """
    bound, found = Bound.of(manifold, device), []
    count = min(k + SPARE, len(manifold))
    for part in in_chunks(points, what):
        below, candidates = (t.cpu() for t in bound.below(part).topk(count, largest=False))
        candidates = candidates.sort(1).values  # of equal distances the first counts
        distance, place = bound.distances(part, candidates).sort(dim=1, stable=True)
        distance, index = distance[:, :k].clone(), candidates.gather(1, place[:, :k])
        if count < len(manifold):
            for row in (distance[:, -1].square() > below[:, -1].double()).nonzero()[:, 0].tolist():
                every = torch.cat([bound.distances(part[row : row + 1], some[None])[0]
                                   for some in torch.arange(len(manifold)).split(8 * CHUNK)])
                distance[row], index[row] = (t[:k] for t in every.sort(dim=0, stable=True))
        found.append((distance, index))
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, indices


def neighbour_radius(features: Tensor, k: int = 3, device: torch.device = CPU, what: str = "radii") -> Tensor:
    """The distance of each feature (N,D) to its k-th nearest neighbour among them. (N,) float64"""
    if len(features) <= k:
        raise ValueError(f"precision and recall need more than {k} samples of each kind, got {len(features)}")
    return nearest(features, features, k + 1, device, what)[0][:, k].clone()


def covered(points: Tensor, manifold: Tensor, radius: Tensor, device: torch.device = CPU,
            what: str = "coverage") -> float:
    """The share of points (N,D) within the radius (M,) of some point of a manifold (M,D), its edge included.

    The bounds exclude most balls; of the others the deepest is tried first, then all.
    """
    bound, count = Bound.of(manifold, device, radius), 0
    for part in in_chunks(points, what):
        below = bound.below(part)
        least, deepest = (t.cpu() for t in below.min(1))
        surely = bound.distances(part, deepest[:, None])[:, 0] <= bound.radius[deepest]
        rest = ((least <= 0) & ~surely).nonzero()[:, 0].tolist()
        count += int(surely.sum()) + sum(inside(bound, part[row : row + 1], below[row] <= 0) for row in rest)
    return count / len(points)


def inside(bound: Bound, point: Tensor, possible: Tensor) -> bool:
    """Whether a point (1,D) is in one of the balls that are possible (M,)."""
    parts = possible.nonzero()[:, 0].cpu().split(8 * CHUNK)
    return any(bool((bound.distances(point, i[None])[0] <= bound.radius[i]).any()) for i in parts)


def precision_recall(real: Tensor, real_radius: Tensor, fake: Tensor, k: int = 3,
                     device: torch.device = CPU) -> tuple[float, float]:
    r"""Improved precision and recall of features (N,D), (M,D) (Kynkaanniemi et al. 2019).

    Precision is the share of ``fake`` within the ball of some point of ``real`` that reaches to its k-th neighbour
    (``real_radius`` (N,), of :func:`neighbour_radius`); recall the reverse.
    """
    radius = neighbour_radius(fake, k, device, "radii of samples")
    return covered(fake, real, real_radius, device, "precision"), covered(real, fake, radius, device, "recall")


def neighbour_accuracy(real: Tensor, real_labels: Tensor, fake: Tensor, labels: Tensor, k: int = 5,
                       device: torch.device = CPU) -> float:
    """The share of samples whose class is that of most of their k nearest real images, in features."""
    index = nearest(fake, real, min(k, len(real)), device, "accuracy")[1]
    return (real_labels[index].mode(1).values == labels).double().mean().item()
