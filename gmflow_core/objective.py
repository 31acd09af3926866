r"""Training losses, one value per sample (B,); a trainer takes their mean.

Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mixture import LOG_2PI, Gaussian, GaussianMixture, per_sample
from .path import add_noise, forward_transition, reverse_transition, velocity_to_posterior
from .spectral import hartley, mixture_to_gaussian

# 1e-4 of a timestep of 1000: the closest that the two ends of a training transition may come.
MIN_SIGMA_GAP = 1e-7

# A mixture trained by transitions may be over-confident of x_0, and squares of outliers would drown
# the spectrum. The authors' float32 CDF cuts z here as well.
Z_LIMIT = 4.8891


def mixture_nll(mixture: GaussianMixture, x: Tensor) -> Tensor:
    r"""-log p(x) - (C/2) log 2 pi, summed over C and averaged over pixels (GMFlow, KL loss): (B,)."""
    nll = -mixture.log_prob(x) - 0.5 * mixture.channels * LOG_2PI
    return nll.flatten(1).mean(1) if nll.ndim > 1 else nll


def transition_pair(
    x_0: Tensor, sigma: Tensor, ratio: float, noise_low: Tensor, noise_high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""(sigma_low, x_low, x_high) of a training transition: sigma_low = (1 - ratio) sigma,
    x_low ~ q(x_low | x_0), x_high ~ q(x_high | x_low). ``ratio`` in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"transition ratio must be in (0, 1], got {ratio}")
    sigma_low = torch.minimum(sigma * (1 - ratio), sigma - MIN_SIGMA_GAP).clamp(min=0)
    x_low = add_noise(x_0, noise_low, sigma_low)
    return sigma_low, x_low, forward_transition(x_low, noise_high, sigma_low, sigma)


def transition_loss(velocity: GaussianMixture, x_high: Tensor, sigma: Tensor, x_low: Tensor,
                    sigma_low: Tensor) -> Tensor:
    r"""NLL of x_low under the predicted q(x_low | x_high) (GMFlow, transition loss): (B,).

    At sigma_low = 0 it is the NLL of x_0 under the x_0 posterior: the plain KL loss.
    """
    posterior = velocity_to_posterior(velocity, x_high, sigma)
    return mixture_nll(reverse_transition(posterior, x_high, sigma, sigma_low), x_low)


def mean_loss(velocity: GaussianMixture, x_0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    r"""Squared error of the mixture's mean, weighed as one Gaussian per sample would: |u - m|^2 / (2 v), summed over C
    and averaged over pixels: (B,).

    u = (x_t - x_0)/sigma; m the mean of the velocity mixture; v its total variance (:meth:`GaussianMixture.moments`)
    averaged over space, without gradient. Not in the paper: the transition loss alone leaves the mean of K > 1
    components less exact than that of K = 1.
    """
    u = (x_t - x_0) / per_sample(sigma, x_0)
    with torch.no_grad():
        var = velocity.map(Tensor.detach).moments().var.flatten(1).mean(1)                  # (B,)
    distances = (u - velocity.mean()).square().sum(1, keepdim=True).flatten(1).mean(1)      # (B,)
    return 0.5 * distances / var


def spectral_loss(velocity: GaussianMixture, x_0: Tensor, x_t: Tensor, sigma: Tensor, spectrum) -> Tensor:
    r"""Gaussian NLL of the Hartley coefficients of z = KR^-1(u) under the predicted spectrum (GMFlow, spectral
    sampling): C/2 mean(y^2 (exp(-log_power) - 1) + log_power), y = Hartley(z). No gradient reaches the mixture: (B,).

    u = (x_t - x_0)/sigma, z cut at Z_LIMIT; ``spectrum`` maps the moment-matched Gaussian of the x_0 posterior to
    log_power (B,C,*S), see :class:`SpectrumMLP`.
    """
    with torch.no_grad():
        velocity = velocity.map(Tensor.detach)
        s = per_sample(sigma, x_0)
        y = hartley(mixture_to_gaussian(velocity, (x_t - x_0) / s).clamp(-Z_LIMIT, Z_LIMIT))
        moments = velocity.moments()
        x_0_gaussian = Gaussian(x_t - s * moments.mean, s.square() * moments.var)
    log_power = spectrum(x_0_gaussian)
    terms = y.square() * torch.expm1(-log_power) + log_power
    return 0.5 * velocity.channels * terms.flatten(1).mean(1)
