r"""Isotropic Gaussian mixtures, one per pixel, and the one operation on them: ``tilt``.

Shapes: B batch, K components, C channels, ``*S`` space (any number of axes, (H, W) for images),
``*1`` as many ones as there are space axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)

# Up to this many channels an inner product runs as that many fused multiply-adds, which read the
# means once and allocate nothing of their size; past it, one broadcast product is cheaper.
_UNROLL = 16


def per_sample(value: float | Tensor, like: Tensor) -> Tensor:
    """Shape a number or a (B,) tensor so that it broadcasts over ``like`` (B, ...)."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(value.shape[:1] + (1,) * (like.ndim - 1)) if value.ndim else value


def space_axes(x: Tensor, leading: int) -> tuple[int, ...]:
    """The axes of ``x`` behind its ``leading`` ones: its space."""
    return tuple(range(leading, x.ndim))


@dataclass(frozen=True, eq=False)
class GaussianFactor:
    r"""An unnormalised Gaussian in natural parameters, exp(h.x - lambda |x|^2 / 2).

    Factors multiply by adding; the zero factor is one everywhere. ``precision`` may be negative: a
    ratio of Gaussians is a factor too.
    """

    precision: Tensor  # (B,1,*1) or (B,1,*S): lambda
    shift: Tensor      # (B,C,*S): h

    def __add__(self, other: GaussianFactor) -> GaussianFactor:
        return GaussianFactor(self.precision + other.precision, self.shift + other.shift)

    def __sub__(self, other: GaussianFactor) -> GaussianFactor:
        return GaussianFactor(self.precision - other.precision, self.shift - other.shift)

    def __neg__(self) -> GaussianFactor:
        return GaussianFactor(-self.precision, -self.shift)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """An isotropic Gaussian per pixel."""

    mean: Tensor  # (B,C,*S)
    var: Tensor   # (B,1,*1) or (B,1,*S)

    def factor(self) -> GaussianFactor:
        r"""The density as a factor, up to its constant: lambda = 1/v, h = m/v."""
        precision = self.var.reciprocal()
        return GaussianFactor(precision, self.mean * precision)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""sum_k w_k N(mean_k, exp(2 log_std) I) over a C-vector at every pixel.

    One standard deviation per sample, shared by components and pixels. ``log_weights`` must be
    normalised over K; build from raw logits with :meth:`from_logits`.
    """

    means: Tensor        # (B,K,C,*S)
    log_weights: Tensor  # (B,K,1,*S)
    log_std: Tensor      # (B,1,1,*1)

    def __post_init__(self) -> None:
        if self.means.ndim < 3:
            raise ValueError(f"means must be (B, K, C, *S), got {tuple(self.means.shape)}")
        b, k, _, *space = self.means.shape
        for name, want in (
            ("log_weights", (b, k, 1, *space)),
            ("log_std", (b, 1, 1) + (1,) * len(space)),
        ):
            got = tuple(getattr(self, name).shape)
            if got != want:
                raise ValueError(f"{name} must be {want} beside means {tuple(self.means.shape)}, got {got}")

    @classmethod
    def from_logits(cls, means: Tensor, logits: Tensor, log_std: Tensor) -> GaussianMixture:
        """A mixture with weights softmax(logits) over K."""
        return cls(means, logits.log_softmax(dim=1), log_std)

    # ---- shape ---------------------------------------------------------------------------------

    @property
    def components(self) -> int:
        return self.means.shape[1]

    @property
    def channels(self) -> int:
        return self.means.shape[2]

    def map(self, f) -> GaussianMixture:
        """Apply ``f`` to the three tensors: a dtype, a device, a slice of the batch."""
        return GaussianMixture(f(self.means), f(self.log_weights), f(self.log_std))

    # ---- moments -------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Tensor:
        return self.log_weights.exp()                                           # (B,K,1,*S)

    @cached_property
    def var(self) -> Tensor:
        """v = exp(2 log_std), shaped for (B,C,*S) tensors."""
        return (2 * self.log_std).exp().squeeze(1)                              # (B,1,*1)

    @cached_property
    def _half_norms(self) -> Tensor:
        """-|mean_k|^2 / 2, kept because every substep of a solver asks for it."""
        return -0.5 * _inner(self.means, self.means)                            # (B,K,1,*S)

    @cached_property
    def _mean(self) -> Tensor:
        return _weighted_sum(self.weights, self.means)

    def mean(self) -> Tensor:
        """m = sum_k w_k mean_k, shape (B,C,*S)."""
        return self._mean

    def moments(self) -> Gaussian:
        r"""The isotropic Gaussian of equal mean and total variance at each pixel:
        var = sum_k w_k |mean_k - m|^2 / C + v, shape (B,1,*S)."""
        offsets = self.means - self.mean().unsqueeze(1)                         # (B,K,C,*S)
        between = (self.weights * _inner(offsets, offsets)).sum(1) / self.channels
        return Gaussian(self.mean(), between + self.var)

    def covariance(self) -> Tensor:
        r"""Space-averaged covariance of a pixel, sum_k w_k (mean_k - m)(mean_k - m)^T + v I: (B,C,C)."""
        b, _, c, *space = self.means.shape
        flat = (self.means - self.mean().unsqueeze(1)).transpose(1, 2).reshape(b, c, -1)    # (B,C,K*S)
        between = (flat * self.weights.reshape(b, 1, -1)) @ flat.mT / math.prod(space)
        return between + torch.eye(c, dtype=flat.dtype, device=flat.device) * self.var.reshape(b, 1, 1)

    # ---- density -------------------------------------------------------------------------------

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean_k, v I) of x (B,C,*S) for every component, shape (B,K,1,*S)."""
        offsets = (x.unsqueeze(1) - self.means) * (-self.log_std).exp()         # in units of the std
        return -0.5 * (_inner(offsets, offsets) + self.channels * (LOG_2PI + 2 * self.log_std))

    def log_prob(self, x: Tensor) -> Tensor:
        """log sum_k w_k N(x; mean_k, v I) of x (B,C,*S), shape (B,*S): summed over C, per pixel."""
        return (self.log_weights + self.component_log_prob(x)).logsumexp(dim=1).squeeze(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probability of each component given x (B,C,*S), shape (B,K,1,*S)."""
        return (self.log_weights + self.component_log_prob(x)).softmax(dim=1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One independent draw at every pixel, shape (B,C,*S): a component, then its Gaussian."""
        rand = dict(generator=generator, dtype=self.means.dtype, device=self.means.device)
        b, k, c, *space = self.means.shape
        weights = self.weights.movedim(1, -1).reshape(-1, k)
        index = torch.multinomial(weights, 1, generator=generator).reshape(b, 1, 1, *space)
        mean = self.means.gather(1, index.expand(b, 1, c, *space)).squeeze(1)
        return mean + self.var.sqrt() * torch.randn((b, c, *space), **rand)

    # ---- the one operation ---------------------------------------------------------------------

    def tilt(self, factor: GaussianFactor) -> GaussianMixture:
        r"""Multiply by exp(h.x - lambda |x|^2 / 2) and renormalise.

            mean_k <- (mean_k + v h) / (1 + lambda v)
            v      <- v / (1 + lambda v)
            log w_k <- log w_k + (h.mean_k - lambda |mean_k|^2 / 2) / (1 + lambda v), renormalised

        Needs 1 + lambda v > 0. The variance is one number per sample, so lambda must be (B,1,*1).
        """
        if any(n != 1 for n in factor.precision.shape[2:]):
            raise ValueError("tilt needs one precision per sample (B,1,*1); tilted_mean takes one per pixel")
        shrink = (1 + factor.precision * self.var).reciprocal()                 # (B,1,*1)
        offset = (self.var * shrink) * factor.shift                             # (B,C,*S)
        means = torch.addcmul(offset.unsqueeze(1), self.means, shrink.unsqueeze(1))
        log_std = self.log_std + 0.5 * shrink.log().unsqueeze(1)
        return GaussianMixture(means, self._tilted_logits(factor, shrink).log_softmax(dim=1), log_std)

    def tilted_mean(self, factor: GaussianFactor) -> Tensor:
        """``tilt(factor).mean()`` without the tilted means: one inner product and one weighted sum of the given ones."""
        shrink = (1 + factor.precision * self.var).reciprocal()                 # (B,1,*1|*S)
        weights = self._tilted_logits(factor, shrink).softmax(dim=1)            # (B,K,1,*S)
        return torch.addcmul(_weighted_sum(weights, self.means), self.var, factor.shift) * shrink

    def _tilted_logits(self, factor: GaussianFactor, shrink: Tensor) -> Tensor:
        precision, shift = factor.precision * shrink, factor.shift * shrink     # (B,1,*1|*S), (B,C,*S)
        logits = torch.addcmul(self.log_weights, precision.unsqueeze(1), self._half_norms)
        return _inner(self.means, shift.unsqueeze(1), logits)

    def temperature(self, t: float) -> GaussianMixture:
        r"""Sharpen (t < 1) or flatten (t > 1): log w <- log w / t renormalised, v <- t v.

        Equals p(x)^(1/t) renormalised where the components do not overlap; t = 1 is the identity.
        """
        if not t > 0:
            raise ValueError(f"temperature must be > 0, got {t}")
        if t == 1:
            return self
        return GaussianMixture.from_logits(self.means, self.log_weights / t, self.log_std + 0.5 * math.log(t))


def _inner(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + sum_c a_c b_c over the channel axis of (B,K|1,C,*S) tensors, shape (B,K,1,*S). ``start`` is overwritten."""
    if a.shape[2] > _UNROLL:
        total = (a * b).sum(2, keepdim=True)
        return total if start is None else start + total
    (a_0, *a_rest), (b_0, *b_rest) = a.unbind(2), b.unbind(2)
    total = a_0 * b_0 if start is None else start.squeeze(2).addcmul_(a_0, b_0)
    for a_c, b_c in zip(a_rest, b_rest):
        total.addcmul_(a_c, b_c)
    return total.unsqueeze(2)


def _weighted_sum(weights: Tensor, means: Tensor) -> Tensor:
    """sum_k w_k mean_k of (B,K,1,*S) and (B,K,C,*S), shape (B,C,*S)."""
    return (weights * means).sum(1)
