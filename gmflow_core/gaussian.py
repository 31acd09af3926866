r"""Gaussians of a pixel, as densities and as factors, and orthonormal axes of its channels.

Shapes: B batch, C channels, ``*S`` space (any number of axes, (H, W) for images), ``*1`` as many ones as there are
space axes, n any number of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GaussianFactor:
    r"""An unnormalised Gaussian in natural parameters, exp(h.x - x.Lambda x / 2).

    Lambda is lambda I, or has a lambda for each channel, or for each of a pixel's own orthonormal ``axes``:
    Lambda = axes diag(lambda) axes^T. Factors multiply by adding; the zero factor is one everywhere. ``precision`` may
    be negative: a ratio of Gaussians is a factor too.
    """

    precision: Tensor           # (B,1,*1), (B,1,*S) or (B,C,*S): lambda
    shift: Tensor               # (B,C,*S): h, of the channels whatever the axes are
    axes: Tensor | None = None  # (B,C,C,*S), one column an axis; None: the channels themselves

    def __add__(self, other: GaussianFactor) -> GaussianFactor:
        shift = self.shift + other.shift
        if self.axes is other.axes or self.is_isotropic or other.is_isotropic:
            axes = self.axes if other.axes is None else other.axes
            return GaussianFactor(self.precision + other.precision, shift, axes)
        precision, axes = diagonalise(self.matrix() + other.matrix())
        return GaussianFactor(precision, shift, axes)

    def __sub__(self, other: GaussianFactor) -> GaussianFactor:
        if self.axes is None and other.axes is None:
            return GaussianFactor(self.precision - other.precision, self.shift - other.shift)
        return self + -other

    def __neg__(self) -> GaussianFactor:
        return GaussianFactor(-self.precision, -self.shift, self.axes)

    @property
    def is_isotropic(self) -> bool:
        """Whether Lambda is lambda I."""
        return self.axes is None and self.precision.shape[1] == 1

    def matrix(self) -> Tensor:
        """Lambda, (B,C,C,*S)."""
        if self.axes is None:
            return diagonal(self.precision.expand_as(self.shift))
        return torch.einsum("bcj...,bj...,bdj...->bcd...", self.axes, self.precision, self.axes)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """An isotropic Gaussian per pixel."""

    mean: Tensor  # (B,C,*S)
    var: Tensor   # (B,1,*1) or (B,1,*S)

    def factor(self) -> GaussianFactor:
        r"""The density as a factor, up to its constant: lambda = 1/v, h = m/v."""
        precision = self.var.reciprocal()
        return GaussianFactor(precision, self.mean * precision)


# ---- axes of a pixel's channels ------------------------------------------------------------------

def turn(x: Tensor, axes: Tensor) -> Tensor:
    """Coordinates along axes (B,C,C,*S) of vectors x (B,C,*S) or (B,n,C,*S): axes^T x, like x."""
    if x.ndim < axes.ndim:
        return torch.einsum("bcj...,bc...->bj...", axes, x).contiguous()
    return torch.einsum("bcj...,bnc...->bnj...", axes, x).contiguous()


def turn_back(y: Tensor, axes: Tensor) -> Tensor:
    """Vectors of coordinates y (B,C,*S) or (B,n,C,*S) along axes (B,C,C,*S): axes y, like y."""
    if y.ndim < axes.ndim:
        return torch.einsum("bcj...,bj...->bc...", axes, y).contiguous()
    return torch.einsum("bcj...,bnj...->bnc...", axes, y).contiguous()


def axes_along(direction: Tensor) -> Tensor:
    r"""Orthonormal axes (B,C,C,*S) of which the first is along a unit direction d (B,C,*S), up to its sign:
    Householder's reflection I - 2 u u^T / |u|^2 with u = d + sign(d_1) e_1."""
    u = direction.clone()
    u[:, 0] += torch.where(direction[:, 0] < 0, -1.0, 1.0).to(u)
    outer = u.unsqueeze(1) * u.unsqueeze(2)                                     # (B,C,C,*S)
    return diagonal(torch.ones_like(u)) - outer * (2 / u.square().sum(1)).unsqueeze(1).unsqueeze(1)


def diagonal(values: Tensor) -> Tensor:
    """Matrices (B,C,C,*S) with values (B,C,*S) on the diagonal."""
    c, space = values.shape[1], (1,) * (values.ndim - 2)
    return torch.eye(c, dtype=values.dtype, device=values.device).reshape(1, c, c, *space) * values.unsqueeze(1)


def diagonalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B,C,*S) and eigenvectors as columns (B,C,C,*S) of symmetric matrices (B,C,C,*S).

    On the CPU: some devices have no eigendecomposition.
    """
    values, vectors = torch.linalg.eigh(matrix.movedim((1, 2), (-2, -1)).cpu())
    return values.movedim(-1, 1).to(matrix), vectors.movedim((-2, -1), (1, 2)).to(matrix)


def solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """matrix^-1 rhs for positive definite matrices (B,C,C,*S) and rhs (B,C,*S), by Gauss-Jordan elimination.

    Plain arithmetic over the channels, of which there are few: it runs on every device, and asks none for its results.
    """
    rows = torch.cat([matrix, rhs.unsqueeze(2)], dim=2)                         # (B,C,C+1,*S)
    for j in range(matrix.shape[1]):
        pivot = rows[:, j : j + 1] / rows[:, j : j + 1, j : j + 1]              # (B,1,C+1,*S)
        rows = rows - rows[:, :, j : j + 1] * pivot
        rows[:, j] = pivot[:, 0]
    return rows[:, :, -1]
