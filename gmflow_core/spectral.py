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

from .gaussian import turn, turn_back
from .mixture import Mixture, TurnedMixture, space_axes
from .portable import portable

_SQRT_HALF = math.sqrt(0.5)
_LOG2_E = math.log2(math.e)
_HALF_ROOT_PI = 0.5 * math.sqrt(math.pi)
_MAX_ITERATIONS = 100  # a bound: bisection alone closes a float32 bracket in fewer


@portable
def hartley(x: Tensor) -> Tensor:
    r"""Orthonormal discrete Hartley transform over space, Re F(x) + Im F(x); its own inverse."""
    f = torch.fft.fftn(x, dim=space_axes(x, 2), norm="ortho")
    return f.real + f.imag


def color_noise(white: Tensor, log_power: Tensor) -> Tensor:
    r"""Noise of spectrum exp(log_power) from white noise: Hartley(exp(log_power / 2) white). (B,C,*S)"""
    return hartley(white * (0.5 * log_power).exp())


def principal_axes(mixture: Mixture) -> Tensor:
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


def _in_stds(vectors: Tensor, axes: Tensor, std: Tensor) -> Tensor:
    """Vectors (B,K,C,*S) along axes (B,C,C) after each channel is divided by its std: (C,K,N).

    Divided so, the components have unit variance along any axes: the map is exact along all of them.
    """
    if std[0].numel() == 1:  # dividing the axes is cheaper
        return _along_axes(vectors, axes / std.reshape(-1, 1, 1))
    return _along_axes(vectors / std.unsqueeze(1), axes)


def _per_pixel(values: Tensor) -> Tensor:
    """(B,n,*S) or (B,n,1,*S) as (n,N)."""
    b, n = values.shape[:2]
    return values.reshape(b, n, -1).transpose(0, 1).reshape(n, -1)


def _per_sample(columns: Tensor, like: Tensor) -> Tensor:
    """(C,N) as (B,C,*S), the shape of ``like``."""
    b, c = like.shape[:2]
    return columns.reshape(c, b, -1).transpose(0, 1).reshape(like.shape)


def gaussian_to_mixture(mixture: Mixture, z: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The Knothe-Rosenblatt map: a standard normal z (B,C,*S) to a draw of the mixture (B,C,*S).

    Along axis j, with component weights given the previous axes: x_j = F_j^-1(Phi(z_j)).
    ``axes`` (B,C,C) replaces :func:`principal_axes`.
    """
    if isinstance(mixture, TurnedMixture):
        return turn_back(gaussian_to_mixture(mixture.inner, z, axes), mixture.axes)
    axes = principal_axes(mixture) if axes is None else axes
    std = mixture.var.sqrt()                                                            # (B,1|C,*1|*S)
    mu = _in_stds(mixture.means - mixture.mean().unsqueeze(1), axes, std)               # (C,K,N)
    log_w = _per_pixel(mixture.log_weights)                                             # (K,N)
    x = []
    for j, (mu_j, z_j) in enumerate(zip(mu, _per_pixel(z), strict=True)):
        if j:
            log_w = _given(log_w, x[-1] - mu[j - 1])
        x.append(inverse_cdf(mu_j, log_w, z_j))
    x = _per_sample(torch.stack(x), z)
    return mixture.mean() + std * (axes @ x.reshape(*z.shape[:2], -1)).reshape(z.shape)


def mixture_to_gaussian(mixture: Mixture, x: Tensor, axes: Tensor | None = None) -> Tensor:
    r"""The inverse map: a point x (B,C,*S) of the mixture to z (B,C,*S), z_j = Phi^-1(F_j(x_j)).

    Exact far out in the tails: the CDF is taken in log space there.
    """
    if isinstance(mixture, TurnedMixture):
        return mixture_to_gaussian(mixture.inner, turn(x, mixture.axes), axes)
    axes = principal_axes(mixture) if axes is None else axes
    distances = _in_stds(x.unsqueeze(1) - mixture.means, axes, mixture.var.sqrt())      # (C,K,N)
    log_w = _per_pixel(mixture.log_weights)                                             # (K,N)
    z = []
    for t in distances:
        z.append(_probit_of_cdf(t, log_w))
        log_w = _given(log_w, t)
    return _per_sample(torch.stack(z), x)


def _given(log_w: Tensor, t: Tensor) -> Tensor:
    """Log weights (K,N) given a coordinate t = x - mu_k (K,N): w_k phi(t_k), renormalised."""
    return torch.addcmul(log_w, t, t, value=-0.5).log_softmax(0)


@portable
def inverse_cdf(mu: Tensor, log_w: Tensor, z: Tensor) -> Tensor:
    r"""Solve F(x) = sum_k w_k Phi(x - mu_k) = Phi(z) for x (N,), given mu, log_w (K,N) and z (N,).

    Halley's method from the moment-matched Gaussian: two steps settle nearly every point of a mixture
    whose components overlap, two more nearly all of the rest. What is left goes to :func:`_solve_bracketed`,
    which always converges. Points below the median are mirrored, so that what is solved is the upper
    tail, sum_k w_k Phi(mu_k - x) = Phi(-z) <= 1/2, which float32 holds to full relative precision for
    z < 12. Inside, coordinates are in units of sqrt(2), so that Phi(-t) is erfc(t) / 2.
    """
    flip = torch.copysign(torch.full_like(z, _SQRT_HALF), z)
    mu, z = mu * flip, z * flip                                                         # z >= 0
    log2_w = log_w * _LOG2_E
    points = mu, log2_w, log2_w.exp2(), torch.special.erfc(z).log()
    x, left, residual = _halley_steps(points, _moment_quantile(mu, points[2], z))
    if 0 < left.numel() < x.numel() // 8:
        y, still, residual = _halley_steps(_select(points, left), x[left])
        x, left = x.index_copy(0, left, y), left[still]
    if left.numel():
        x = x.index_copy(0, left, _solve_bracketed(_select(points, left), z[left], x[left], residual))
    return x / flip


# The equations of a number of points: mu, log2 w, w (K,N) and the target log(2 Phi(-z)) (N,).
# Powers of two, because PyTorch's exp2 is up to three times as fast as its exp on a CPU.
_Points = tuple[Tensor, Tensor, Tensor, Tensor]


def _select(points: _Points, index: Tensor) -> _Points:
    mu, log2_w, w, target = (v.index_select(-1, index) for v in points)
    return mu, log2_w, w, target


def _halley_steps(points: _Points, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x after two steps, the indices of the points that the second did not settle, and their residuals before it."""
    for _ in range(2):
        x, residual, newton, bend = _halley_step(points, x)
    left = (~_settled(residual, newton, bend)).nonzero().squeeze(1)
    return x, left, residual[left]


def _halley_step(points: _Points, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Halley's method on g(x) = log T(x) - target, with the tail T = sum_k w_k erfc(x - mu_k):

        x <- x + n / (1 + c/2),  n = -g/g' = -g T/T',  c = n g''/g' = n T''/T' + g;

    the new x, g, n, c, all (N,). A step is at most twice Newton's and never against it.
    """
    mu, log2_w, weights, target = points
    t = x - mu                                                                          # (K,N)
    kernel = torch.addcmul(log2_w, t, t, value=-_LOG2_E).exp2()                         # (K,N), w exp(-t^2)
    tail = (weights * torch.special.erfc(t)).sum(0)                                     # T
    pdf = kernel.sum(0)                                                                 # -sqrt(pi)/2 T'
    turn = (kernel * t).sum(0) / pdf                                                    # -T'' / 2 T'
    residual = tail.log() - target
    newton = residual / (pdf / tail)                                                    # n / half_root_pi
    bend = torch.addcmul(residual, newton, turn, value=-2 * _HALF_ROOT_PI)
    x = torch.addcdiv(x, newton, (2 + bend).clamp(min=1), value=2 * _HALF_ROOT_PI)
    return x, residual, newton * _HALF_ROOT_PI, bend


def _settled(residual: Tensor, newton: Tensor, bend: Tensor) -> Tensor:
    """Whether a Halley step ended in the root: its error is about g (c^2/4 + n^2),
    as the components have unit width."""
    error = residual.abs() * torch.addcmul(newton.square(), bend, bend, value=0.25)
    return error < 8 * torch.finfo(error.dtype).eps


def _solve_bracketed(points: _Points, z: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """Halley's method that keeps the root in a bracket and bisects it where a step leaves it or fails to halve.

    The root lies between z + min_k mu_k and z + max_k mu_k. Points whose ``residual`` was large start
    again from where they would be if no components overlapped; points leave as they settle.
    """
    mu, _, weights, _ = points
    lost = ~(residual.abs() < 0.1)                                                      # or NaN
    lo, hi = z + mu.amin(0), z + mu.amax(0)
    x = torch.where(lost, _separated_quantile(mu, weights, z), x).clamp(lo, hi)
    stride = hi - lo  # of the last step
    noise = 16 * torch.finfo(x.dtype).eps
    solution, index = x, torch.arange(x.numel(), device=x.device)
    for _ in range(_MAX_ITERATIONS):
        new, residual, newton, bend = _halley_step(points, x)
        lo, hi = torch.where(residual > 0, x, lo), torch.where(residual < 0, x, hi)
        inside = (new >= lo) & (new <= hi)                                              # False at NaN
        settled, exact = inside & _settled(residual, newton, bend), residual.abs() <= noise
        good = inside & (new != x) & ((new - x).abs() <= 0.5 * stride)
        new = torch.where(settled | good, new, 0.5 * (lo + hi))
        new = torch.where(exact & ~settled, x, new)
        solution = solution.index_copy(0, index, new)
        todo = (~(settled | exact | (new == x))).nonzero().squeeze(1)
        if not todo.numel():
            break
        points = _select(points, todo)
        index, lo, hi, stride, x = (v[todo] for v in (index, lo, hi, (new - x).abs(), new))
    return solution


def _moment_quantile(mu: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """The quantile of the moment-matched Gaussian: a first guess where components overlap. (N,)"""
    weighted = weights * mu
    mean = weighted.sum(0)
    between = torch.addcmul((weighted * mu).sum(0), mean, mean, value=-1)
    return torch.addcmul(mean, z, (1 + 2 * between).clamp(min=1).sqrt())


def _separated_quantile(mu: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """The quantile if no components overlapped: a first guess where they do not. (N,)

    From the top, it lies in the component k where the cumulative weight W passes p = Phi(-z): at (p - W_{k-1}) / w_k of
    it.
    """
    p = 0.5 * torch.special.erfc(z)
    mu, order = mu.sort(0, descending=True)
    weights = weights.gather(0, order)
    cumulative = weights.cumsum(0)
    k = (cumulative < p).sum(0, keepdim=True).clamp(max=mu.shape[0] - 1)
    mu_k, w_k, beyond = (v.gather(0, k).squeeze(0) for v in (mu, weights, cumulative))
    share = (1 - (beyond - p) / w_k).clamp(1e-6, 1 - 1e-6)
    return mu_k - _SQRT_HALF * torch.special.ndtri(share)


@portable
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
