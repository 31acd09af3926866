r"""How close are points (N,2) to the checkerboard? Figures of merit with known answers: pure functions of the points.

The board: uniform on the 8 cells (column + row even) of a 4x4 board over [-4, 4]^2; a cell is 2 wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT, CELLS = 4.0, 4                 # the board is CELLS x CELLS cells over [-LIMIT, LIMIT]^2


def cells(points: Tensor) -> Tensor:
    """The index 0 to 7 of the cell that each point (N,2) lies in, -1 where it lies outside the support. (N,)"""
    column, row = ((points + LIMIT) * (CELLS / (2 * LIMIT))).floor().long().unbind(-1)
    inside = (points.abs() < LIMIT).all(-1) & ((column + row) % 2 == 0)
    return torch.where(inside, row * (CELLS // 2) + torch.div(column, 2, rounding_mode="floor"), -1)


def outside_share(points: Tensor) -> float:
    """The share of points (N,2) outside the support: 0 for the true density,
    1 - its mass on the board for any other."""
    return (cells(points) < 0).float().mean().item()


def unevenness(points: Tensor) -> float:
    r"""Total variation 1/2 sum_c |n_c/n - 1/8| of the points inside:
    0 is even, 7/8 all in one cell, NaN without any."""
    index = cells(points)
    counts = torch.bincount(index[index >= 0], minlength=8).double()
    return 0.5 * (counts / counts.sum() - 1 / 8).abs().sum().item()


def spread(points: Tensor) -> float:
    r"""sqrt(mean |x|^2 / (32/3)): the root mean square distance from the centre, over that of the true density.

    1 is right; less gathers in the centre, more at or beyond the outer edge.
    """
    return math.sqrt(points.double().square().sum(-1).mean().item() / (2 * LIMIT**2 / 3))


def histogram_kl(points: Tensor, bins: int = 16) -> float:
    r"""KL(true || samples) = sum_b p_b log(p_b / q_b) over the M = bins^2/2 squares of the support;
    all beyond is one bin.

    q_b = (n_b + 1/2) / (N + (M + 1)/2), so that empty bins stay finite. Samples in the wrong place make the right ones
    rare: KL >= -log(1 - outside). True samples give about (M - 1)/(2N). ``bins``: a multiple of 4.
    """
    if bins % CELLS:
        raise ValueError(f"bins must be a multiple of {CELLS}, so that no bin straddles a cell, got {bins}")
    place = ((points.double() + LIMIT) * (bins / (2 * LIMIT))).floor().long()
    place = place[((place >= 0) & (place < bins)).all(-1)]                      # (N_in,2)
    counts = torch.bincount(place[:, 1] * bins + place[:, 0], minlength=bins * bins).double()
    i = torch.arange(bins) // (bins // CELLS)
    support = ((i[:, None] + i) % 2 == 0).flatten()                             # (bins^2,)
    m = bins * bins // 2
    q = (counts[support] + 0.5) / (len(points) + 0.5 * (m + 1))                 # (M,)
    return -((m * q).log().sum() / m).item()


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    r"""sqrt(2 mean_theta W_2(<a, theta>, <b, theta>)^2) of equally many points (N,2),
    theta evenly over the half circle.

    In one dimension W_2^2 is the mean squared difference of the sorted values. The factor 2 (the dimension) makes a
    shift of all points by d give |d| exactly.
    """
    if a.shape != b.shape:
        raise ValueError(f"the same number of points is needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    theta = torch.stack([angles.cos(), angles.sin()]).to(a)                     # (2,D)
    difference = (a @ theta).sort(0).values - (b @ theta).sort(0).values        # (N,D)
    return math.sqrt(2 * difference.double().square().mean().item())


def metrics(points: Tensor, reference: Tensor) -> dict[str, float]:
    """All metrics of points (N,2), against ``reference``, as many true samples."""
    if not torch.isfinite(points).all():
        raise ValueError(f"{int((~torch.isfinite(points)).any(-1).sum())} of {len(points)} points are not finite")
    return {
        "outside": outside_share(points), "kl": histogram_kl(points),
        "wasserstein": sliced_wasserstein(points, reference), "uneven": unevenness(points), "spread": spread(points),
    }
