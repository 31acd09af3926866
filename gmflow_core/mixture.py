r"""Gaussian mixtures, one per pixel, and the one operation on them: ``tilt``.

Shapes: B batch, K components, C channels, ``*S`` space (any number of axes, (H, W) for images),
``*1`` as many ones as there are space axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from .gaussian import Gaussian, GaussianFactor, diagonal, turn, turn_back
from .portable import portable

T = TypeVar("T")

LOG_2PI = math.log(2 * math.pi)

# Sums over C, and over up to this many components, are that many fused multiply-adds: nothing of the
# size of the means is allocated. Past it, one broadcast product takes fewer calls.
_UNROLL = 16


def per_sample(value: float | Tensor, like: Tensor) -> Tensor:
    """Shape a number or a (B,) tensor so that it broadcasts over ``like`` (B, ...)."""
    if isinstance(value, (int, float)):
        return like.new_full((), value)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(value.shape[:1] + (1,) * (like.ndim - 1)) if value.ndim else value


def space_axes(x: Tensor, leading: int) -> tuple[int, ...]:
    """The axes of ``x`` behind its ``leading`` ones: its space."""
    return tuple(range(leading, x.ndim))


class kept(cached_property[T]):
    """A property computed when first read and kept, unless the gradient that its mixture needs is switched off."""

    def __get__(self, mixture: Mixture, owner: type | None = None) -> T:
        if mixture is None or torch.is_grad_enabled() or not mixture._needs_grad:
            return super().__get__(mixture, owner)
        return self.func(mixture)


class Mixture:
    r"""sum_k w_k N(mean_k, exp(2 log_std)) over a C-vector at every pixel: what all mixtures share.

    The standard deviation is shared by the components. A network's is one per sample; evidence leaves one per pixel, or
    per pixel and channel. A subclass is a value that holds or works out the three tensors: :class:`GaussianMixture`
    holds them.
    """

    means: Tensor        # (B,K,C,*S)
    log_weights: Tensor  # (B,K,1,*S), normalised over K
    log_std: Tensor      # (B,1,1,*1), (B,1,1,*S) or (B,1,C,*S)

    # ---- shape ---------------------------------------------------------------------------------

    @property
    def components(self) -> int:
        return self.means.shape[1]

    @property
    def channels(self) -> int:
        return self.means.shape[2]

    @property
    def _needs_grad(self) -> bool:
        raise NotImplementedError

    def map(self, f) -> GaussianMixture:
        """Apply ``f`` to the three tensors: a dtype, a device, a slice of the batch."""
        return GaussianMixture(f(self.means), f(self.log_weights), f(self.log_std))

    # ---- moments -------------------------------------------------------------------------------

    @kept
    def weights(self) -> Tensor:
        return self.log_weights.exp()                                           # (B,K,1,*S)

    @kept
    def var(self) -> Tensor:
        """v = exp(2 log_std), shaped for (B,C,*S) tensors."""
        return (2 * self.log_std).exp().squeeze(1)                              # (B,1,*1), (B,1,*S) or (B,C,*S)

    @kept
    def _half_norms(self) -> Tensor:
        """-|mean_k|^2 / 2, kept because every substep of a solver asks for it."""
        return _sum_of_squares(self._by_channel).mul_(-0.5)                     # (B,K,*S)

    @kept
    def _by_channel(self) -> tuple[Tensor, ...]:
        return self.means.unbind(2)                                             # C of (B,K,*S)

    @kept
    def _by_component(self) -> tuple[Tensor, ...]:
        return self.means.unbind(1)                                             # K of (B,C,*S)

    @kept
    def _mean(self) -> Tensor:
        return self._weighted_sum(self.weights)

    def mean(self) -> Tensor:
        """m = sum_k w_k mean_k, shape (B,C,*S)."""
        return self._mean

    def moments(self) -> Gaussian:
        r"""The isotropic Gaussian of equal mean and total variance at each pixel:
        var = sum_k w_k |mean_k - m|^2 / C + v (over channels its mean), shape (B,1,*S)."""
        centre = self.mean().unsqueeze(1).unbind(2)
        offsets = (mean_c - m_c for mean_c, m_c in zip(self._by_channel, centre, strict=True))
        distances = _sum_of_squares(offsets)                                    # (B,K,*S)
        between = (self.weights.squeeze(2) * distances).sum(1, keepdim=True) / self.channels
        return Gaussian(self.mean(), between + _over_channels(self.var))

    def isotropic(self) -> Mixture:
        """The same means and weights, and of the variance its mean over channels: itself where it has one for all."""
        if self.var.shape[1] == 1:
            return self
        return GaussianMixture(self.means, self.log_weights, 0.5 * _over_channels(self.var).log().unsqueeze(1))

    def pixel_covariance(self) -> Tensor:
        r"""sum_k w_k (mean_k - m)(mean_k - m)^T + v of every pixel, (B,C,C,*S)."""
        offsets = self.means - self.mean().unsqueeze(1)
        between = torch.einsum("bkc...,bkd...->bcd...", self.weights * offsets, offsets)
        return between + diagonal(self.var.expand_as(self.mean()))

    def channel_var(self) -> Tensor:
        """The diagonal of :meth:`pixel_covariance`, (B,C,*S)."""
        return (self.weights * (self.means - self.mean().unsqueeze(1)).square()).sum(1) + self.var

    def covariance(self) -> Tensor:
        r"""Space-averaged covariance of a pixel, sum_k w_k (mean_k - m)(mean_k - m)^T + v I: (B,C,C)."""
        b, _, c, *space = self.means.shape
        flat = (self.means - self.mean().unsqueeze(1)).transpose(1, 2).reshape(b, c, -1)    # (B,C,K*S)
        between = (flat * self.weights.reshape(b, 1, -1)) @ flat.mT / math.prod(space)
        within = self.var.reshape(b, self.var.shape[1], -1).mean(-1, keepdim=True)                 # (B,1|C,1)
        return between + torch.eye(c, dtype=flat.dtype, device=flat.device) * within

    def variance_along(self, direction: Tensor) -> Tensor:
        r"""b^T Sigma b = sum_k w_k ((mean_k - m).b)^2 + v |b|^2 of each pixel for b (B,C,*S), shape (B,1,*S)."""
        offsets = torch.zeros_like(self._by_channel[0])                         # (B,K,*S), (mean_k - m).b
        parts = zip(self._by_channel, self.mean().unsqueeze(1).unbind(2), direction.unsqueeze(1).unbind(2), strict=True)
        for mean_c, m_c, b_c in parts:
            offsets.addcmul_(mean_c - m_c, b_c)
        between = (self.weights.squeeze(2) * offsets.square()).sum(1, keepdim=True)
        if self.var.shape[1] > 1:
            return between + (self.var * direction.square()).sum(1, keepdim=True)
        return between + self.var * direction.square().sum(1, keepdim=True)

    # ---- density -------------------------------------------------------------------------------

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean_k, v) of x (B,C,*S) for every component, shape (B,K,1,*S)."""
        per_std = (-self.log_std).exp()                                         # (B,1,1|C,*1|*S)
        per_std = per_std.expand(-1, -1, self.channels, *per_std.shape[3:]).unbind(2)
        x_cs = x.unsqueeze(1).unbind(2)
        offsets = ((x_c - mean_c) * std_c for mean_c, x_c, std_c in zip(self._by_channel, x_cs, per_std, strict=True))
        distances = _sum_of_squares(offsets).unsqueeze(2)                       # (B,K,1,*S), in stds
        return -0.5 * (distances + self.channels * (LOG_2PI + 2 * self.log_std.mean(2, keepdim=True)))

    def log_prob(self, x: Tensor) -> Tensor:
        """log sum_k w_k N(x; mean_k, v I) of x (B,C,*S), shape (B,*S): summed over C, per pixel."""
        return (self.log_weights + self.component_log_prob(x)).logsumexp(dim=1).squeeze(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probability of each component given x (B,C,*S), shape (B,K,1,*S)."""
        return (self.log_weights + self.component_log_prob(x)).softmax(dim=1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One independent draw at every pixel, shape (B,C,*S): a component, then its Gaussian."""
        b, k, c, *space = self.means.shape
        weights = self.weights.movedim(1, -1).reshape(-1, k)
        index = _choose(weights, generator=generator).reshape(b, 1, 1, *space)
        mean = self.means.gather(1, index.expand(b, 1, c, *space)).squeeze(1)
        z = torch.randn((b, c, *space), generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.var.sqrt() * z

    # ---- the one operation ---------------------------------------------------------------------

    def tilt(self, factor: GaussianFactor) -> Mixture:
        """Multiply by exp(h.x - x.Lambda x / 2) and renormalise: see :class:`TiltedMixture`.

        A factor with axes of its own makes a :class:`TurnedMixture` of it.
        """
        if factor.axes is None:
            return TiltedMixture(self, factor)
        if self.var.shape[1] > 1:
            raise ValueError("a mixture with another variance for each channel cannot be tilted along other axes")
        turned = GaussianMixture(turn(self.means, factor.axes), self.log_weights, self.log_std)
        along = GaussianFactor(factor.precision, turn(factor.shift, factor.axes))
        return TurnedMixture(TiltedMixture(turned, along), factor.axes)

    def tilted_mean(self, factor: GaussianFactor) -> Tensor:
        """``tilt(factor).mean()``."""
        return self.tilt(factor).mean()

    def shifted(self, by: Tensor) -> Mixture:
        """Every component moved by a vector (B,C,*S)."""
        return GaussianMixture(self.means + by.unsqueeze(1), self.log_weights, self.log_std)

    def _tilted_logits(self, precision: Tensor, shift: Tensor) -> Tensor:
        """log w_k + h.mean_k - lambda |mean_k|^2 / 2, (B,K,*S), where both have been divided by 1 + lambda v."""
        if precision.shape[1] > 1:
            return self._tilted_logits_by_channel(precision, shift)
        logits = torch.addcmul(self.log_weights.squeeze(2), precision, self._half_norms)
        for mean_c, shift_c in zip(self._by_channel, shift.unsqueeze(1).unbind(2), strict=True):
            logits.addcmul_(mean_c, shift_c)
        return logits

    def _tilted_logits_by_channel(self, precision: Tensor, shift: Tensor) -> Tensor:
        """log w_k + sum_c (h_c - lambda_c mean_kc / 2) mean_kc, (B,K,*S)."""
        logits = self.log_weights.squeeze(2).clone()
        factors = precision.unsqueeze(1).unbind(2), shift.unsqueeze(1).unbind(2)
        for mean_c, precision_c, shift_c in zip(self._by_channel, *factors, strict=True):
            logits.addcmul_(mean_c, torch.addcmul(shift_c, precision_c, mean_c, value=-0.5))
        return logits

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_k w_k mean_k with weights (B,K,1,*S), shape (B,C,*S)."""
        if self.components > _UNROLL:
            return (weights * self.means).sum(1)
        (w_0, *w_rest), (mean_0, *mean_rest) = weights.unbind(1), self._by_component
        total = w_0 * mean_0
        for w_k, mean_k in zip(w_rest, mean_rest, strict=True):
            total.addcmul_(w_k, mean_k)
        return total

    def _tilted_mean(self, weights: Tensor, shrink: Tensor, shift: Tensor) -> Tensor:
        """The mean with the tilted weights (B,K,1,*S); ``shift`` has been divided by 1 + lambda v."""
        return self._weighted_sum(weights).mul_(shrink).addcmul_(self.var, shift)

    def temperature(self, t: float) -> Mixture:
        r"""Sharpen (t < 1) or flatten (t > 1): log w <- log w / t renormalised, v <- t v.

        Equals p(x)^(1/t) renormalised where the components do not overlap; t = 1 is the identity.
        """
        if not 0 < t < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {t}")
        if t == 1:
            return self
        return GaussianMixture.from_logits(self.means, self.log_weights / t, self.log_std + 0.5 * math.log(t))


@dataclass(frozen=True, eq=False)
class GaussianMixture(Mixture):
    """A mixture of given tensors. ``log_weights`` must be normalised over K;
    build from raw logits with :meth:`from_logits`."""

    means: Tensor        # (B,K,C,*S)
    log_weights: Tensor  # (B,K,1,*S)
    log_std: Tensor      # (B,1,1,*1), (B,1,1,*S) or (B,1,C,*S)

    def __post_init__(self) -> None:
        if self.means.ndim < 3:
            raise ValueError(f"means must be (B, K, C, *S), got {tuple(self.means.shape)}")
        b, k, c, *space = self.means.shape
        for name, allowed in (
            ("log_weights", [(b, k, 1, *space)]),
            ("log_std", [(b, 1, 1) + (1,) * len(space), (b, 1, 1, *space), (b, 1, c, *space)]),
        ):
            got = tuple(getattr(self, name).shape)
            if got not in allowed:
                want = " or ".join(map(str, dict.fromkeys(allowed)))
                raise ValueError(f"{name} must be {want} beside means {tuple(self.means.shape)}, got {got}")

    @classmethod
    def from_logits(cls, means: Tensor, logits: Tensor, log_std: Tensor) -> GaussianMixture:
        """A mixture with weights softmax(logits) over K."""
        return cls(means, logits.log_softmax(dim=1), log_std)

    @property
    def _needs_grad(self) -> bool:
        return self.means.requires_grad or self.log_weights.requires_grad or self.log_std.requires_grad


@dataclass(frozen=True, eq=False)
class TiltedMixture(Mixture):
    r"""``base`` times ``factor``, renormalised; each tensor is computed when it is first read.

        mean_k <- (mean_k + v h) / (1 + lambda v)
        v      <- v / (1 + lambda v)
        log w_k <- log w_k + (h.mean_k - lambda |mean_k|^2 / 2) / (1 + lambda v), renormalised,

    channel by channel where lambda or v has a number for each. What is read needs 1 + lambda v > 0. Tilts add, so
    ``base`` is never tilted itself; the mean takes one inner product and one weighted sum of the base's means, not the
    tilted ones.
    """

    base: Mixture
    factor: GaussianFactor

    @property
    def _needs_grad(self) -> bool:
        factor = self.factor
        return self.base._needs_grad or factor.precision.requires_grad or factor.shift.requires_grad

    def tilt(self, factor: GaussianFactor) -> Mixture:
        return self.base.tilt(self.factor + factor)

    @property
    def components(self) -> int:
        return self.base.components

    @property
    def channels(self) -> int:
        return self.base.channels

    @kept
    def _shrink(self) -> Tensor:
        return (1 + self.factor.precision * self.base.var).reciprocal()         # (B,1,*1|*S) or (B,C,*S)

    @kept
    def _shift(self) -> Tensor:
        return self.factor.shift * self._shrink                                  # (B,C,*S)

    @kept
    def _logits(self) -> Tensor:
        """The log weights before they are renormalised."""
        return self.base._tilted_logits(self.factor.precision * self._shrink, self._shift)     # (B,K,*S)

    @kept
    def weights(self) -> Tensor:
        return self._logits.softmax(dim=1).unsqueeze(2)

    @kept
    def log_weights(self) -> Tensor:
        return self._logits.log_softmax(dim=1).unsqueeze(2)

    @kept
    def log_std(self) -> Tensor:
        return self.base.log_std + 0.5 * self._shrink.log().unsqueeze(1)

    @kept
    def means(self) -> Tensor:
        return torch.addcmul((self.base.var * self._shift).unsqueeze(1), self.base.means, self._shrink.unsqueeze(1))

    @kept
    def _mean(self) -> Tensor:
        return self.base._tilted_mean(self.weights, self._shrink, self._shift)


@dataclass(frozen=True, eq=False)
class TurnedMixture(Mixture):
    """x = axes y with a tilted mixture over y at every pixel, whose variance is another one along each axis.

    Its own ``log_std`` and ``var`` are those of its total variance, as in :meth:`Mixture.isotropic`.
    """

    inner: TiltedMixture
    axes: Tensor    # (B,C,C,*S), orthonormal columns

    @property
    def _needs_grad(self) -> bool:
        return self.inner._needs_grad or self.axes.requires_grad

    @property
    def components(self) -> int:
        return self.inner.components

    @property
    def channels(self) -> int:
        return self.inner.channels

    @property
    def log_weights(self) -> Tensor:
        return self.inner.log_weights

    @property
    def weights(self) -> Tensor:
        return self.inner.weights

    @kept
    def means(self) -> Tensor:
        return turn_back(self.inner.means, self.axes)

    @kept
    def _mean(self) -> Tensor:
        return turn_back(self.inner.mean(), self.axes)

    @kept
    def var(self) -> Tensor:
        return _over_channels(self.inner.var)

    @kept
    def log_std(self) -> Tensor:
        return 0.5 * self.var.log().unsqueeze(1)

    def isotropic(self) -> Mixture:
        return GaussianMixture(self.means, self.log_weights, self.log_std)

    def pixel_covariance(self) -> Tensor:
        return torch.einsum("bci...,bij...,bdj...->bcd...", self.axes, self.inner.pixel_covariance(), self.axes)

    def channel_var(self) -> Tensor:
        return self.pixel_covariance().diagonal(dim1=1, dim2=2).movedim(-1, 1)

    def variance_along(self, direction: Tensor) -> Tensor:
        return self.inner.variance_along(turn(direction, self.axes))

    def covariance(self) -> Tensor:
        return self.pixel_covariance().reshape(*self.axes.shape[:3], -1).mean(-1)

    def component_log_prob(self, x: Tensor) -> Tensor:
        return self.inner.component_log_prob(turn(x, self.axes))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return turn_back(self.inner.sample(generator), self.axes)

    def tilt(self, factor: GaussianFactor) -> Mixture:
        base, own = self.inner.base, self.inner.factor
        if factor.axes is self.axes or factor.is_isotropic:
            along = GaussianFactor(factor.precision, turn(factor.shift, self.axes))
            return self._turned(base, own + along)
        upright = GaussianMixture(turn_back(base.means, self.axes), base.log_weights, base.log_std)
        return upright.tilt(GaussianFactor(own.precision, turn_back(own.shift, self.axes), self.axes) + factor)

    def shifted(self, by: Tensor) -> Mixture:
        base, factor, along = self.inner.base, self.inner.factor, turn(by, self.axes)
        return self._turned(base.shifted(along),
                            GaussianFactor(factor.precision, factor.shift + factor.precision * along))

    def temperature(self, t: float) -> Mixture:
        base, factor = self.inner.base, self.inner.factor
        return self._turned(base.temperature(t), GaussianFactor(factor.precision / t, factor.shift / t))

    def _turned(self, base: Mixture, factor: GaussianFactor) -> TurnedMixture:
        return TurnedMixture(TiltedMixture(base, factor), self.axes)


def _over_channels(var: Tensor) -> Tensor:
    """A variance of every channel, or one of all of them, as its mean: (B,1,...)."""
    return var if var.shape[1] == 1 else var.mean(1, keepdim=True)
@portable
def _choose(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index (N,1) a row of weights (N,K), by weight."""
    return torch.multinomial(weights, 1, generator=generator)


def _sum_of_squares(parts: Iterable[Tensor]) -> Tensor:
    """Over the parts, elementwise."""
    parts = iter(parts)
    total = next(parts).square()
    for part in parts:
        total.addcmul_(part, part)
    return total
