r"""Spectral sampling: Gaussian noise of a given spectrum, carried to a mixture by an exact transport.

Coloured noise = Hartley transform of white noise scaled by a power spectrum; the Knothe-Rosenblatt
map then turns a standard normal at each pixel into a draw of that pixel's mixture, so spatial
correlation of the noise becomes spatial correlation of the draw (GMFlow, spectral sampling).
Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mixture import GaussianMixture, space_axes

_SQRT_HALF = math.sqrt(0.5)
_HALF_ROOT_PI = 0.5 * math.sqrt(math.pi)
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
    # A mixture of NaNs gives draws of NaNs, not an error from the eigensolver.
    covariance = mixture.covariance().detach().nan_to_num()
    axes = torch.linalg.eigh(covariance.float().cpu()).eigenvectors.flip(-1)
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return (axes * largest.sign()).to(covariance)


def _along_axes(vectors: Tensor, axes: Tensor) -> Tensor:
    """Vectors (B,K,C,*S) in the coordinates of axes (B,C,C), one column per pixel of the batch: (C,K,N)."""
    b, k, c = vectors.shape[:3]
    flat = vectors.transpose(1, 2).reshape(b, c, -1)                                    # (B,C,K*S)
    return (axes.mT @ flat).reshape(b, c, k, -1).permute(1, 2, 0, 3).reshape(c, k, -1)


def _per_pixel(values: Tensor) -> Tensor:
    """(B,n,*S) or (B,n,1,*S) as (n,N)."""
    b, n = values.shape[:2]
    return values.reshape(b, n, -1).transpose(0, 1).reshape(n, -1)


def _per_sample(columns: Tensor, like: Tensor) -> Tensor:
    """(C,N) as (B,C,*S), the shape of ``like``."""
    b, c = like.shape[:2]
    return columns.reshape(c, b, -1).transpose(0, 1).reshape(like.shape)


def gaussian_to_mixture(mixture: GaussianMixture, z: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The Knothe-Rosenblatt map: a standard normal z (B,C,*S) to a draw of the mixture (B,C,*S).

    Along axis j, with component weights given the previous axes: x_j = F_j^-1(Phi(z_j)).
    ``axes`` (B,C,C) replaces :func:`principal_axes`.
    """
    axes = principal_axes(mixture) if axes is None else axes
    std = mixture.var.sqrt()                                                            # (B,1,*1)
    offsets = mixture.means - mixture.mean().unsqueeze(1)                               # (B,K,C,*S)
    mu = _along_axes(offsets, axes / std.reshape(-1, 1, 1))                             # (C,K,N), in stds
    log_w = _per_pixel(mixture.log_weights)                                             # (K,N)
    x = []
    for mu_j, z_j in zip(mu, _per_pixel(z)):
        if x:
            log_w = _given(log_w, t)
        x.append(inverse_cdf(mu_j, log_w, z_j))
        t = x[-1] - mu_j
    x = _per_sample(torch.stack(x), z)
    return mixture.mean() + std * (axes @ x.reshape(*z.shape[:2], -1)).reshape(z.shape)


def mixture_to_gaussian(mixture: GaussianMixture, x: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The inverse map: a point x (B,C,*S) of the mixture to z (B,C,*S), z_j = Phi^-1(F_j(x_j)).

    Exact far out in the tails: the CDF is taken in log space there.
    """
    axes = principal_axes(mixture) if axes is None else axes
    std = mixture.var.sqrt().reshape(-1, 1, 1)
    distances = _along_axes(x.unsqueeze(1) - mixture.means, axes / std)                 # (C,K,N), in stds
    log_w = _per_pixel(mixture.log_weights)                                             # (K,N)
    z = []
    for t in distances:
        z.append(_probit_of_cdf(t, log_w))
        log_w = _given(log_w, t)
    return _per_sample(torch.stack(z), x)


def _given(log_w: Tensor, t: Tensor) -> Tensor:
    """Log weights (K,N) given a coordinate t = x - mu_k (K,N): w_k phi(t_k), renormalised."""
    return torch.addcmul(log_w, t, t, value=-0.5).log_softmax(0)


def inverse_cdf(mu: Tensor, log_w: Tensor, z: Tensor) -> Tensor:
    r"""Solve F(x) = sum_k w_k Phi(x - mu_k) = Phi(z) for x (N,), given mu, log_w (K,N) and z (N,).

    Halley's method from the moment-matched Gaussian: two steps settle nearly every point of a mixture
    whose components overlap, a third those of the rest that were close, and :func:`_solve_bracketed`
    what is left; it always converges. Points above the median are solved mirrored: F is then a lower
    tail, which float32 holds to full relative precision for |z| < 12. Inside, coordinates are in
    units of sqrt(2), so that Phi is erfc / 2.
    """
    flip = torch.copysign(torch.full_like(z, _SQRT_HALF), -z)
    mu, z = mu * flip, z.abs() * _SQRT_HALF                                             # to solve Phi(-z) <= 1/2
    points = mu, log_w, log_w.exp(), torch.special.erfc(z).log()
    x, residual, left = _halley_steps(2, points, _moment_quantile(mu, points[2], z))
    if left.numel():
        points = tuple(v[..., left] for v in points)
        y, residual, hard = _halley_steps(1, points, x[left])
        if hard.numel():
            points = tuple(v[..., hard] for v in points)
            y = y.index_copy(0, hard, _solve_bracketed(points, z[left][hard], y[hard], residual[hard]))
        x = x.index_copy(0, left, y)
    return x * (2 * flip)


# The equation of a number of points: mu, log_w, w (K,N) and the target log(2 Phi(-z)) (N,).
_Points = tuple[Tensor, Tensor, Tensor, Tensor]


def _halley_steps(steps: int, points: _Points, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x after some steps, the residual before the last of them, and which points that one did not settle."""
    for _ in range(steps):
        x, residual, newton, bend = _halley_step(points, x)
    return x, residual, (~_settled(residual, newton, bend)).nonzero().squeeze(1)


def _halley_step(points: _Points, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Halley's method on g(x) = log(2 F(x)) - target, F as in :func:`inverse_cdf`:

        x <- x - n / (1 + c/2),  n = g/g' = g F/F',  c = -n g''/g' = g - n F''/F';

    the new x, g, n, c, all (N,). A step is at most twice Newton's and never against it.
    """
    mu, log_w, weights, target = points
    t = mu - x                                                                          # (K,N)
    kernel = torch.addcmul(log_w, t, t, value=-1).exp()                                 # (K,N)
    cdf = (weights * torch.special.erfc(t)).sum(0)                                      # 2 F
    pdf = kernel.sum(0)                                                                 # sqrt(pi) F'
    bend = (kernel * t).sum(0) / pdf                                                    # F'' / 2 F'
    residual = cdf.log() - target
    newton = residual / (pdf / cdf)                                                     # n / half_root_pi
    bend = torch.addcmul(residual, newton, bend, value=-2 * _HALF_ROOT_PI)
    x = torch.addcdiv(x, newton, (2 + bend).clamp(min=1), value=-2 * _HALF_ROOT_PI)
    return x, residual, newton, bend


def _settled(residual: Tensor, newton: Tensor, bend: Tensor) -> Tensor:
    """Whether a Halley step ended in the root: its error is about g (c^2 + 4 n^2)/4, as the components have unit width."""
    error = residual.abs() * torch.addcmul(bend.square(), newton, newton, value=4 * _HALF_ROOT_PI**2)
    return error < 32 * torch.finfo(error.dtype).eps


def _solve_bracketed(points: _Points, z: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """Halley's method that keeps the root in a bracket and bisects it where a step leaves it or fails to halve.

    The root lies between min_k mu_k - z and max_k mu_k - z. Points whose ``residual`` was large start
    again from where they would be if no components overlapped; points leave as they settle.
    """
    mu, _, weights, _ = points
    lost = ~(residual.abs() < 0.1)                                                      # or NaN
    lo, hi = mu.amin(0) - z, mu.amax(0) - z
    x = torch.where(lost, _separated_quantile(mu, weights, z), x).clamp(lo, hi)
    stride = hi - lo  # of the last step
    noise = 16 * torch.finfo(x.dtype).eps
    solution, index = x, torch.arange(x.numel(), device=x.device)
    for _ in range(_MAX_ITERATIONS):
        new, residual, newton, bend = _halley_step(points, x)
        lo, hi = torch.where(residual < 0, x, lo), torch.where(residual > 0, x, hi)
        inside = (new >= lo) & (new <= hi)                                              # False at NaN
        settled, exact = inside & _settled(residual, newton, bend), residual.abs() <= noise
        good = inside & (new != x) & ((new - x).abs() <= 0.5 * stride)
        new = torch.where(settled | good, new, 0.5 * (lo + hi))
        new = torch.where(exact & ~settled, x, new)
        solution = solution.index_copy(0, index, new)
        todo = (~(settled | exact | (new == x))).nonzero().squeeze(1)
        if not todo.numel():
            break
        points = tuple(v[..., todo] for v in points)
        index, lo, hi, stride, x = (v[todo] for v in (index, lo, hi, (new - x).abs(), new))
    return solution


def _moment_quantile(mu: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """The quantile of the moment-matched Gaussian: a first guess where components overlap. (N,)"""
    weighted = weights * mu
    mean = weighted.sum(0)
    between = torch.addcmul((weighted * mu).sum(0), mean, mean, value=-1)
    return torch.addcmul(mean, z, (1 + 2 * between).clamp(min=1).sqrt(), value=-1)


def _separated_quantile(mu: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """The quantile if no components overlapped: a first guess where they do not. (N,)

    It lies in the component k where the cumulative weight W passes Phi(-z), at (Phi(-z) - W_{k-1}) / w_k of it.
    """
    p = 0.5 * torch.special.erfc(z)
    mu, order = mu.sort(0)
    weights = weights.gather(0, order)
    cumulative = weights.cumsum(0)
    k = (cumulative < p).sum(0, keepdim=True).clamp(max=mu.shape[0] - 1)
    mu_k, w_k, above = (v.gather(0, k).squeeze(0) for v in (mu, weights, cumulative))
    share = (1 - (above - p) / w_k).clamp(1e-6, 1 - 1e-6)
    return mu_k + _SQRT_HALF * torch.special.ndtri(share)


def _probit_of_cdf(t: Tensor, log_w: Tensor) -> Tensor:
    """Phi^-1(sum_k w_k Phi(t_k)) from the smaller tail; in log space where that underflows. (N,)"""
    weights = log_w.exp()
    lower = (weights * torch.special.erfc(-_SQRT_HALF * t)).sum(0) * 0.5
    upper = (weights * torch.special.erfc(_SQRT_HALF * t)).sum(0) * 0.5
    sign = torch.where(upper < lower, -1.0, 1.0).to(t)
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
