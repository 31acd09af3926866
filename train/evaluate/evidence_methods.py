r"""Ways to use evidence, for comparison: ours, noise masks, one Gaussian,
and two that need gradients through the network.

DPS: Chung et al. 2023; PiGDM: Song et al. 2023. All run GM-ODE 2 from the same noise. Shapes: B batch, C channels, H W
space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core import Conditioned, GaussianMixture, GMDenoiser, Inpaint, SecondOrder, flow_sigmas, unguided
from gmflow_core.denoiser import Denoiser
from gmflow_core.echo import FIRST_SIGMA
from gmflow_core.evidence import Evidence
from gmflow_core.gaussian import solve
from gmflow_core.guidance import Guided, mean_square
from gmflow_core.mixture import Mixture
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT, SamplerOptions, sample

from .evidence_tasks import BLOCK, Task

OPTIONS = SamplerOptions(second_order=SecondOrder(tilt=SECOND_ORDER_TILT))


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch of a task."""

    model: torch.nn.Module
    task: Task
    truth: Tensor
    labels: Tensor | None
    noise: Tensor
    steps: int
    guidance: float
    guidance_tilt: str = GUIDANCE_TILT

    def denoiser(self, evidence: Evidence | Conditioned | None = None) -> GMDenoiser:
        return GMDenoiser(self.model, self.labels, self.guidance, tilt=self.guidance_tilt, evidence=evidence)

    def solve(self, denoiser: Denoiser, inpaint=None, callback=None, last: int | None = None) -> Tensor:
        """All steps, or those up to the ``last``."""
        sigmas = flow_sigmas(self.steps)[: None if last is None else last + 1]
        with torch.no_grad():
            return sample(denoiser, self.noise, sigmas, OPTIONS, inpaint=inpaint, callback=callback)


def nothing(p: Problem) -> Tensor:
    return p.solve(p.denoiser())


@dataclass(frozen=True, eq=False)
class Projection(Inpaint):
    """What is seen of the truth, at the same noise level, put into x at every substep: a noise mask, or ILVR."""

    task: Task

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.task.project(x, (1 - sigma) * self.x_0 + sigma * self.noise)


def noise_mask(p: Problem) -> Tensor:
    return p.solve(p.denoiser(), Projection(p.task.seen, p.truth, p.noise, p.task))


def tilt(p: Problem) -> Tensor:
    return p.solve(p.denoiser(Conditioned(p.task.evidence, propagate=False)))


def echo(p: Problem) -> Tensor:
    return p.solve(p.denoiser(p.task.evidence))


def echo_and_mask(p: Problem) -> Tensor:
    return p.solve(p.denoiser(p.task.evidence), Projection(p.task.seen, p.truth, p.noise, p.task))


def one_gaussian(p: Problem) -> Tensor:
    """The tilt of every posterior's moment-matched Gaussian instead of its mixture."""
    plain = p.denoiser()

    class Moments(GMDenoiser):
        def posteriors(self, xs, sigma, roles):
            return [gaussian_of(mixture) for mixture in plain.posteriors(xs, sigma, roles)]

    given = Conditioned(p.task.evidence, propagate=False)
    return p.solve(Moments(p.model, p.labels, p.guidance, tilt=p.guidance_tilt, evidence=given))


def gaussian_of(mixture: Mixture) -> Mixture:
    """One component of equal mean and, per pixel, equal total variance."""
    moments = mixture.moments()
    return GaussianMixture(moments.mean.unsqueeze(1), torch.zeros_like(moments.mean[:, None, :1]),
                           0.5 * moments.var.log().unsqueeze(1))


def with_gradient(p: Problem, bias_of: Callable[[Tensor, Mixture, float], Tensor]) -> Denoiser:
    """The guided posterior, moved as a whole by a bias (B,C,H,W) that takes a gradient through the network."""
    denoiser = p.denoiser()

    def moved(x: Tensor, sigma: float) -> Guided:
        sigma = min(sigma, FIRST_SIGMA)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            posterior = denoiser(x, sigma).posterior
            bias = bias_of(x, posterior, sigma).detach()
        return unguided(posterior.map(Tensor.detach).shifted(bias))

    return moved


def dps(zeta: float) -> Callable[[Problem], Tensor]:
    r"""DPS: after each step x <- x - zeta grad |y - A m(x)|; as a shift of x_0 that makes the step end there."""

    def method(p: Problem) -> Tensor:
        grid = flow_sigmas(p.steps).tolist()
        follows = {min(s, FIRST_SIGMA): (s, t) for s, t in pairwise(grid)}

        def bias(x: Tensor, posterior: Mixture, sigma: float) -> Tensor:
            residual = p.task.observe(p.truth) - p.task.observe(posterior.mean())
            gradient, = torch.autograd.grad(residual.flatten(1).norm(dim=1).sum(), x)
            s, t = follows[sigma]
            return -zeta * gradient / (1 - t / s)

        return p.solve(with_gradient(p, bias))

    return method


def pigdm(published: bool) -> Callable[[Problem], Tensor]:
    r"""PiGDM: (s^2/a) J^T A^T (A V A^T + s_y^2)^-1 (y - A m); V = s^2/(s^2 + a^2) as published, or the posterior's own
    variance, limited to one deviation of the image."""

    def method(p: Problem) -> Tensor:
        def bias(x: Tensor, posterior: Mixture, sigma: float) -> Tensor:
            a, task = 1 - sigma, p.task
            residual = task.observe(p.truth) - task.observe(posterior.mean())
            with torch.no_grad():
                covariance = posterior.pixel_covariance()
                weighted = weigh(task, residual, sigma**2 / (sigma**2 + a**2) if published else covariance)
            gradient, = torch.autograd.grad((posterior.mean() * task.adjoint(weighted)).sum(), x)
            found = gradient * sigma**2 / a
            if published:
                return found
            var = covariance.diagonal(dim1=1, dim2=2).mean((1, 2, 3)).reshape(-1, 1, 1, 1)
            return found * (mean_square(found) / var).clamp(min=1).rsqrt()

        return p.solve(with_gradient(p, bias))

    return method


def weigh(task: Task, residual: Tensor, v: float | Tensor) -> Tensor:
    """(A V A^T + s_y^2 I)^-1 of a residual, V a number or (B,C,C,H,W)."""
    if isinstance(v, float):
        return residual / (task.scale * v + task.std**2)
    if residual.shape[1] == 1:                      # grey: a number
        return residual / (v.mean((1, 2)).unsqueeze(1) + task.std**2)
    if residual.shape[-1] < v.shape[-1]:            # blocks: each the mean of its pixels' covariances, by their number
        v = F.avg_pool2d(v.flatten(1, 2), BLOCK).unflatten(1, v.shape[1:3]) / BLOCK**2
    noise = torch.eye(v.shape[1]).reshape(1, *v.shape[1:3], 1, 1) * task.std**2
    return solve(v + noise, residual)


METHODS = {
    "none": nothing, "noise mask": noise_mask, "one Gaussian": one_gaussian, "tilt": tilt, "tilt + echo": echo,
    "echo + noise mask": echo_and_mask, "DPS 0.5": dps(0.5), "DPS 1": dps(1.0), "DPS 2": dps(2.0),
    "PiGDM": pigdm(True), "PiGDM, mixture's variance": pigdm(False),
}
CALLS = {"tilt + echo": 2, "echo + noise mask": 2}
