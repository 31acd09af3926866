r"""The flow path x_t = (1 - sigma) x_0 + sigma e, and what it does to mixtures.

Velocity u = e - x_0 = (x_t - x_0) / sigma. ``a`` stands for 1 - sigma, ``s`` for sigma.
Sigmas are floats or (B,) tensors in [0, 1].
Shapes: B batch, K components, C channels, ``*S`` space, ``*1`` ones in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import GaussianFactor, turn, turn_back
from .mixture import GaussianMixture, Mixture, TiltedMixture, TurnedMixture, kept, per_sample


def add_noise(x_0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    r"""x_t = (1 - s) x_0 + s e."""
    s = per_sample(sigma, x_0)
    return (1 - s) * x_0 + s * noise


def forward_transition(x_low: Tensor, noise: Tensor, sigma_low: float | Tensor, sigma_high: float | Tensor) -> Tensor:
    r"""Draw from q(x_high | x_low): (a_h/a_l) x_low + sqrt(s_h^2 - (a_h/a_l)^2 s_l^2) e, s_l <= s_h, s_l < 1."""
    low, high = per_sample(sigma_low, x_low), per_sample(sigma_high, x_low)
    ratio = (1 - high) / (1 - low)
    return ratio * x_low + (high.square() - (ratio * low).square()).clamp(min=0).sqrt() * noise


@dataclass(frozen=True, eq=False)
class _Posterior(Mixture):
    """x_t - s u of a mixture over u; the means are computed when they are first read, and m without them."""

    velocity: Mixture
    x_t: Tensor    # (B,C,*S)
    sigma: Tensor  # () or (B,1,1,*1)

    @property
    def _needs_grad(self) -> bool:
        return self.velocity._needs_grad or self.x_t.requires_grad or self.sigma.requires_grad

    @property
    def log_weights(self) -> Tensor:
        return self.velocity.log_weights

    @property
    def weights(self) -> Tensor:
        return self.velocity.weights

    @kept
    def log_std(self) -> Tensor:
        return self.velocity.log_std + self.sigma.log()

    @kept
    def means(self) -> Tensor:
        return torch.addcmul(self.x_t.unsqueeze(1), self.sigma, self.velocity.means, value=-1)   # (B,K,C,*S)

    @kept
    def _mean(self) -> Tensor:
        return torch.addcmul(self.x_t, per_sample(self.sigma, self.x_t), self.velocity.mean(), value=-1)


def velocity_to_posterior(mixture: Mixture, x_t: Tensor, sigma: float | Tensor) -> Mixture:
    r"""q(x_0 | x_t) from the mixture over u: mean_k <- x_t - s mean_k, log_std <- log_std + log s. s > 0."""
    return _Posterior(mixture, x_t, per_sample(sigma, mixture.means))


def likelihood_factor(x_t: Tensor, sigma: float | Tensor) -> GaussianFactor:
    r"""q(x_t | x_0) as a factor over x_0: lambda = a^2/s^2, h = a x_t/s^2. s > 0."""
    s = sigma if isinstance(sigma, float) else per_sample(sigma, x_t)
    weight = (1 - s) / s**2
    precision = per_sample((1 - s) * weight, x_t).expand(x_t.shape[:1] + (1,) * (x_t.ndim - 1))
    return GaussianFactor(precision, weight * x_t)


def reanchor_factor(x_src: Tensor, sigma_src: float | Tensor, x_tgt: Tensor,
                    sigma_tgt: float | Tensor) -> GaussianFactor:
    r"""What turns q(x_0 | x_src) into q(x_0 | x_tgt): the new likelihood over the old one (GMFlow, GM-ODE):
    lambda = a_t^2/s_t^2 - a_s^2/s_s^2, h = a_t x_tgt/s_t^2 - a_s x_src/s_s^2."""
    return likelihood_factor(x_tgt, sigma_tgt) - likelihood_factor(x_src, sigma_src)


def reanchor(
    posterior: Mixture, x_src: Tensor, sigma_src: float | Tensor, x_tgt: Tensor, sigma_tgt: float | Tensor
) -> Mixture:
    r"""q(x_0 | x_tgt) from q(x_0 | x_src) without a network call. 0 < sigma_tgt <= sigma_src."""
    return posterior.tilt(reanchor_factor(x_src, sigma_src, x_tgt, sigma_tgt))


class Reanchoring:
    """The mean of ``reanchor(posterior, x_src, sigma_src, x, sigma)`` for sigmas known ahead and an x yet to come.

    What does not depend on x is computed for all sigmas at once, for a solver asks at every substep.
    """

    def __init__(self, posterior: Mixture, x_src: Tensor, sigma_src: float, sigmas: Sequence[float]):
        prior = posterior.tilt(-likelihood_factor(x_src, sigma_src))  # perhaps no distribution: only its factor is used
        self._axes = None
        if isinstance(prior, TurnedMixture):
            prior, self._axes = prior.inner, prior.axes
        assert isinstance(prior, TiltedMixture)
        self._base, self._shift = prior.base, prior.factor.shift
        self._weights = [(1 - s) / s**2 for s in sigmas]
        precision = x_src.new_tensor([(1 - s) * w for s, w in zip(sigmas, self._weights, strict=True)])
        precision = prior.factor.precision + precision.reshape((-1,) + (1,) * x_src.ndim)          # (n,B,1,*1)
        shrink = (1 + precision * prior.base.var).reciprocal()
        self._shrinks, self._precisions = shrink.unbind(0), (precision * shrink).unbind(0)

    def mean(self, i: int, x: Tensor) -> Tensor:
        """m of q(x_0 | x) at the i-th sigma, (B,C,*S)."""
        if self._axes is None:
            return self._mean(i, x)
        return turn_back(self._mean(i, turn(x, self._axes)), self._axes)

    def _mean(self, i: int, x: Tensor) -> Tensor:
        shrink = self._shrinks[i]
        shift = torch.add(self._shift, x, alpha=self._weights[i]).mul_(shrink)
        weights = self._base._tilted_logits(self._precisions[i], shift).softmax(dim=1).unsqueeze(2)
        return self._base._tilted_mean(weights, shrink, shift)


def transition_coefficients(sigma: float | Tensor, sigma_next: float | Tensor) -> tuple:
    r"""(c_x, c_0, c_e) of x_next = c_x x_t + c_0 x_0 + c_e e, the reverse transition (DDPM's, on this path):
    with r = (s_n/s)(a/a_n), b = 1 - r^2:  c_x = r s_n/s,  c_0 = b a_n,  c_e = sqrt(b) s_n.  s_n < 1 or s_n = s."""
    a, a_next = 1 - sigma, 1 - sigma_next
    r = (sigma_next / sigma) * (a / a_next)
    b = 1 - r * r
    return r * sigma_next / sigma, b * a_next, (b * (b > 0)) ** 0.5 * sigma_next


def reverse_transition(
    posterior: Mixture, x_t: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> GaussianMixture:
    r"""q(x_next | x_t) as a mixture: the kernel applied to each component of the posterior (GMFlow, GM-SDE):
    mean_k <- c_x x_t + c_0 mean_k, v <- c_0^2 v + c_e^2."""
    s, s_next = per_sample(sigma, posterior.means), per_sample(sigma_next, posterior.means)
    c_x, c_0, c_e = transition_coefficients(s, s_next)
    means = c_x * x_t.unsqueeze(1) + c_0 * posterior.means
    log_std = 0.5 * torch.logaddexp(2 * (posterior.log_std + c_0.log()), 2 * c_e.log())
    return GaussianMixture(means, posterior.log_weights, log_std)


def reverse_step(x_t: Tensor, x_0: Tensor, noise: Tensor, sigma: float, sigma_next: float) -> Tensor:
    r"""One draw of x_next ~ q(x_next | x_t, x_0): c_x x_t + c_0 x_0 + c_e e."""
    c_x, c_0, c_e = transition_coefficients(sigma, sigma_next)
    return c_x * x_t + c_0 * x_0 + c_e * noise
