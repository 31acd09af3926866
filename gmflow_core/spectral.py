r"""Spectral sampling: Gaussian noise of a given spectrum, carried to a mixture by an exact transport.

Coloured noise = Hartley transform of white noise scaled by a power spectrum; the Knothe-Rosenblatt
map then turns a standard normal at each pixel into a draw of that pixel's mixture, so spatial
correlation of the noise becomes spatial correlation of the draw (paper, Section 4.4 and Appendix B).
Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mixture import GaussianMixture, space_axes

_SQRT_HALF = math.sqrt(0.5)
_MAX_ITERATIONS = 100  # a bound: bisection alone closes a float32 bracket in fewer


def hartley(x: Tensor) -> Tensor:
    r"""Orthonormal discrete Hartley transform over space, Re F(x) + Im F(x); its own inverse."""
    f = torch.fft.fftn(x, dim=space_axes(x, 2), norm="ortho")
    return f.real + f.imag


def color_noise(white: Tensor, log_power: Tensor) -> Tensor:
    r"""Noise of spectrum exp(log_power) from white noise: Hartley(exp(log_power / 2) white). (B,C,*S)"""
    return hartley(white * (0.5 * log_power).exp())


def principal_axes(mixture: GaussianMixture) -> Tensor:
    """Eigenvectors of the space-averaged covariance as columns, descending: (B,C,C).

    Each column's sign makes its largest entry positive, so that a draw does not depend on the
    linear algebra library. Computed on the CPU, in float32: some devices have no eigendecomposition.
    """
    covariance = mixture.covariance().detach()
    axes = torch.linalg.eigh(covariance.float().cpu()).eigenvectors.flip(-1)
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return (axes * largest.sign()).to(covariance)


def _axis_coordinates(mixture: GaussianMixture, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Component means along the axes, in stds from the pixel's mean; and log weights. (C,K,N), (K,N)"""
    b, k, c, *space = mixture.means.shape
    scale = (-mixture.log_std).exp()
    offsets = ((mixture.means - mixture.mean().unsqueeze(1)) * scale).flatten(3)         # (B,K,C,S)
    along = torch.matmul(axes.mT.unsqueeze(1), offsets)                                 # (B,K,C,S)
    return along.permute(2, 1, 0, 3).reshape(c, k, -1), mixture.log_weights.flatten(2).transpose(0, 1).reshape(k, -1)


def _to_pixels(coordinates: Tensor, mixture: GaussianMixture, axes: Tensor) -> Tensor:
    """(C,N) coordinates along the axes, in stds from the mean, back to (B,C,*S) points."""
    b, _, c, *space = mixture.means.shape
    flat = coordinates.reshape(c, b, -1).transpose(0, 1)                                # (B,C,S)
    offset = torch.matmul(axes, flat).reshape(b, c, *space)
    return mixture.mean() + offset * mixture.var.sqrt()


def gaussian_to_mixture(mixture: GaussianMixture, z: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The Knothe-Rosenblatt map: a standard normal z (B,C,*S) to a draw of the mixture (B,C,*S).

    Along axis j, with component weights given the previous axes: x_j = F_j^-1(Phi(z_j)).
    ``axes`` (B,C,C) replaces :func:`principal_axes`.
    """
    axes = principal_axes(mixture) if axes is None else axes
    mu, log_w = _axis_coordinates(mixture, axes)
    targets = z.flatten(2).transpose(0, 1).reshape(mu.shape[0], -1)                     # (C,N)
    points = []
    for j in range(mu.shape[0]):
        x = inverse_cdf(mu[j], log_w, targets[j])
        points.append(x)
        if j + 1 < mu.shape[0]:
            log_w = (log_w - 0.5 * (x - mu[j]).square()).log_softmax(0)
    return _to_pixels(torch.stack(points), mixture, axes)


def mixture_to_gaussian(mixture: GaussianMixture, x: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The inverse map: a point x (B,C,*S) of the mixture to z (B,C,*S), z_j = Phi^-1(F_j(x_j)).

    Exact far out in the tails: the CDF is taken in log space there.
    """
    axes = principal_axes(mixture) if axes is None else axes
    mu, log_w = _axis_coordinates(mixture, axes)
    b, _, c, *space = mixture.means.shape
    offset = ((x - mixture.mean()) / mixture.var.sqrt()).flatten(2)                     # (B,C,S)
    points = torch.matmul(axes.mT, offset).transpose(0, 1).reshape(c, -1)               # (C,N)
    z = []
    for j in range(c):
        z.append(_probit_of_cdf(mu[j], log_w, points[j]))
        log_w = (log_w - 0.5 * (points[j] - mu[j]).square()).log_softmax(0)
    return torch.stack(z).reshape(c, b, -1).transpose(0, 1).reshape(b, c, *space)


def inverse_cdf(mu: Tensor, log_w: Tensor, z: Tensor) -> Tensor:
    r"""Solve F(x) = sum_k w_k Phi(x - mu_k) = Phi(z) for x (N,), given mu, log_w (K,N) and z (N,).

    Newton in probit space, x <- x - (Phi^-1(F(x)) - z) phi(Phi^-1(F(x))) / F'(x), which solves a
    single Gaussian in one step. The root lies between z + min_k mu_k and z + max_k mu_k; a step
    that leaves the bracket becomes a bisection, so it always converges. Points above the median are
    solved mirrored: F is then a lower tail, which float32 holds to full relative precision for |z| < 12.
    """
    sign = torch.where(z > 0, -1.0, 1.0).to(z)
    mu, z = mu * sign, z * sign                                                         # Phi(z) <= 1/2
    weights = log_w.exp()
    p = 0.5 * torch.special.erfc(-_SQRT_HALF * z)
    lo, hi = z + mu.amin(0), z + mu.amax(0)
    x = _moment_quantile(mu, weights, z).clamp(lo, hi)
    tolerance = 32 * torch.finfo(x.dtype).eps * p                                       # of F
    solution = torch.empty_like(x)
    index = None  # of the points still being solved
    for _ in range(_MAX_ITERATIONS):
        cdf, pdf = _cdf_pdf(mu, weights, x)
        lo, hi = torch.where(cdf < p, x, lo), torch.where(cdf > p, x, hi)
        probit = torch.special.ndtri(cdf)
        newton = x - (probit - z) * torch.exp(-0.5 * probit.square()) / (math.sqrt(2 * math.pi) * pdf)
        new = torch.where((newton > lo) & (newton < hi), newton, 0.5 * (lo + hi))       # NaN bisects
        done = ((cdf - p).abs() <= tolerance) | (new == x)
        new = torch.where(done, x, new)
        solution = new if index is None else solution.index_copy(0, index, new)
        x = new
        # Most points are done after a few steps; the stragglers go on alone.
        todo = (~done).nonzero().squeeze(1)
        if not todo.numel():
            break
        if todo.numel() < 0.75 * x.numel():
            index = todo if index is None else index[todo]
            mu, weights = mu[:, todo], weights[:, todo]
            x, lo, hi, p, z, tolerance = (v[todo] for v in (x, lo, hi, p, z, tolerance))
    return solution * sign


def _cdf_pdf(mu: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    t = _SQRT_HALF * (x - mu)                                                           # (K,N)
    cdf = (weights * torch.special.erfc(-t)).sum(0) * 0.5
    pdf = (weights * torch.exp(-t.square())).sum(0) / math.sqrt(2 * math.pi)
    return cdf, pdf


def _moment_quantile(mu: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """The quantile of the moment-matched Gaussian: a first guess. (N,)"""
    mean = (weights * mu).sum(0)
    var = 1 + (weights * (mu - mean).square()).sum(0)
    return mean + var.sqrt() * z


def _probit_of_cdf(mu: Tensor, log_w: Tensor, x: Tensor) -> Tensor:
    """Phi^-1(sum_k w_k Phi(x - mu_k)) from the smaller tail; in log space where that underflows. (N,)"""
    t, weights = x - mu, log_w.exp()
    lower = (weights * torch.special.erfc(-_SQRT_HALF * t)).sum(0) * 0.5
    upper = (weights * torch.special.erfc(_SQRT_HALF * t)).sum(0) * 0.5
    sign = torch.where(upper < lower, -1.0, 1.0).to(x)
    tail = torch.minimum(lower, upper)
    z = torch.special.ndtri(tail)
    far = (tail < 1e-30).nonzero().squeeze(1)
    if far.numel():
        log_tail = (log_w[:, far] + torch.special.log_ndtr(t[:, far] * sign[far])).logsumexp(0)
        z = z.index_copy(0, far, _log_ndtri(log_tail))
    return z * sign


def _log_ndtri(log_p: Tensor) -> Tensor:
    """Solve log Phi(z) = log_p for log_p << 0 by Newton from -sqrt(-2 log_p), which is within 1 of z."""
    z = -(-2 * log_p).sqrt()
    for _ in range(5):
        value = torch.special.log_ndtr(z)
        hazard = torch.exp(-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - value)
        z = z - (value - log_p) / hazard
    return z
