r"""An exact analytic prior, the independent oracle of the tests.

x_0 at every pixel, independently, is drawn from sum_k w_k N(mu_k, std^2 I). Under the path
x_t = a x_0 + s e (a = 1 - s) everything is known in closed form. Nothing here uses the code under
test but the containers ``GaussianMixture`` and ``unguided``: densities come from
torch.distributions, posteriors from conjugacy and evidence, ODE solutions from scipy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import ndtr
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from gmflow_core import Gaussian, GaussianMixture, unguided


def random_mixture(
    rng: torch.Generator, b=2, k=3, c=2, space=(3, 4), *, spread=1.0, log_std=(-1.0, 0.5), dtype=torch.float64
) -> GaussianMixture:
    """Random means (std ``spread``), random weights over about two decades, log_std uniform in a range."""
    means = spread * torch.randn((b, k, c, *space), generator=rng, dtype=dtype)
    logits = 1.5 * torch.randn((b, k, 1, *space), generator=rng, dtype=dtype)
    low, high = log_std
    log_stds = low + (high - low) * torch.rand((b, 1, 1) + (1,) * len(space), generator=rng, dtype=dtype)
    return GaussianMixture.from_logits(means, logits, log_stds)


def as_distribution(mixture: GaussianMixture) -> MixtureSameFamily:
    """The same mixture in torch.distributions: batch (B,*S), event (C,)."""
    means = mixture.means.movedim((1, 2), (-2, -1))                             # (B,*S,K,C)
    logits = mixture.log_weights.squeeze(2).movedim(1, -1)                      # (B,*S,K)
    std = mixture.log_std.exp().movedim((1, 2), (-2, -1)).expand_as(means)
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, std), 1))


def log_density(mixture: GaussianMixture, x: Tensor) -> Tensor:
    """log p(x) of x (B,C,*S) by torch.distributions: (B,*S)."""
    return as_distribution(mixture).log_prob(x.movedim(1, -1))


def projected_cdf(mixture: GaussianMixture, direction: Tensor):
    """The CDF of <direction, x> as a function of numpy arrays, for the first sample's first pixel."""
    first = (0, slice(None), slice(None)) + (0,) * (mixture.means.ndim - 3)
    means = (mixture.means[first].double() @ direction.double()).numpy()
    weights = mixture.log_weights[first].double().exp().squeeze(1).numpy()
    std = mixture.log_std[0].double().exp().item() * direction.double().norm().item()
    return lambda x: (weights * ndtr((np.asarray(x)[..., None] - means) / std)).sum(-1)


@dataclass(frozen=True)
class ExactPrior:
    """sum_k w_k N(mu_k, std^2 I) at every pixel."""

    means: Tensor    # (K,C)
    weights: Tensor  # (K,)
    std: float

    @classmethod
    def example(cls, channels: int = 2, std: float = 0.4, dtype=torch.float64) -> ExactPrior:
        """Four components at distances of about one, not symmetric in anything."""
        table = torch.tensor(
            [[1.2, 0.5, -0.3], [-0.9, 0.8, 0.6], [-0.2, -1.1, 1.0], [0.4, -0.3, -1.3]], dtype=dtype
        )
        return cls(table[:, :channels], torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=dtype), std)

    def marginal(self, sigma: float) -> MixtureSameFamily:
        """The distribution of x_t, event (C,)."""
        a, std = 1 - sigma, ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5
        component = Independent(Normal(a * self.means, torch.full_like(self.means, std)), 1)
        return MixtureSameFamily(Categorical(probs=self.weights), component)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """grad log p(x_t) by autograd, x (N,C)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.marginal(sigma).log_prob(x).sum(), x)[0]

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """E[e - x_0 | x_t] = -(x + s score)/a, s < 1, x (N,C)."""
        return -(x + sigma * self.score(x, sigma)) / (1 - sigma)

    def sample_x_t(self, sigma: float, n: int, rng: torch.Generator) -> Tensor:
        """n draws of x_t as one image of n pixels: (1,C,n)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        rand = dict(generator=rng, dtype=self.means.dtype)
        x_0 = self.means[k] + self.std * torch.randn(n, self.means.shape[1], **rand)
        x_t = (1 - sigma) * x_0 + sigma * torch.randn(x_0.shape, **rand)
        return x_t.T[None]

    def posterior(self, x: Tensor, sigma: float) -> GaussianMixture:
        """q(x_0 | x_t), x (B,C,*S)."""
        return self._given(x, 1 - sigma, sigma**2, self.means, self.std**2)

    def transition(self, x: Tensor, sigma: float, sigma_next: float) -> GaussianMixture:
        """q(x_n | x_t): x_n has its marginal, and x_t = (a/a_n) x_n + noise of what variance is missing."""
        ratio, a_next = (1 - sigma) / (1 - sigma_next), 1 - sigma_next
        noise = sigma**2 - (ratio * sigma_next) ** 2
        return self._given(x, ratio, noise, a_next * self.means, a_next**2 * self.std**2 + sigma_next**2)

    def _given(self, x: Tensor, ratio: float, noise: float, mu: Tensor, v: float) -> GaussianMixture:
        """The law of y ~ sum_k w_k N(mu_k, v I) given x = ratio y + N(0, noise I): each component's
        conjugate posterior, weighted by its evidence."""
        ones = (1,) * (x.ndim - 2)
        mu = mu.to(x).reshape(1, *mu.shape, *ones)                              # (1,K,C,*1)
        x = x.unsqueeze(1)
        precision = 1 / v + ratio**2 / noise
        means = (mu / v + ratio * x / noise) / precision
        evidence = Normal(ratio * mu, (ratio**2 * v + noise) ** 0.5).log_prob(x).sum(2, keepdim=True)
        logits = self.weights.to(x).log().reshape(1, -1, 1, *ones) + evidence
        log_std = x.new_full((x.shape[0], 1, 1, *ones), -0.5 * np.log(precision))
        return GaussianMixture(means, logits - logits.logsumexp(1, keepdim=True), log_std)

    def denoiser(self, x: Tensor, sigma: float):
        return unguided(self.posterior(x, sigma))

    def gaussian_denoiser(self, x: Tensor, sigma: float):
        """The best a one-component network could do: the right mean, the right mean variance."""
        moments: Gaussian = self.posterior(x, sigma).moments()
        var = moments.var.flatten(1).mean(1).reshape(-1, 1, 1, *(1,) * (x.ndim - 2))
        weights = torch.zeros_like(moments.mean[:, None, :1])
        return unguided(GaussianMixture(moments.mean.unsqueeze(1), weights, 0.5 * var.log()))

    def solve_ode(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The exact probability-flow map of points x (N,C), sigma < 1, to about 1e-10."""

        def field(s, y):
            return self.velocity(torch.from_numpy(y).reshape(x.shape), s).flatten().numpy()

        run = solve_ivp(
            field, (sigma, sigma_next), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12
        )
        return torch.from_numpy(run.y[:, -1]).reshape(x.shape)
