r"""Evidence on a prior that is known exactly: how far the shares of its modes are from p(x_0 | y).

All pixels of an image have the same one of three inks: x_0 = ink_k + std e at each, k drawn once. The network's part is
played by the ideal answer, every pixel's own marginal of the joint posterior. Evidence is about all pixels but the
last, which is judged. Shapes: B batch, K inks, C = 2 channels, P x 1 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from gmflow_core import GaussianMixture, PixelEvidence
from gmflow_core.mixture import per_sample

from .evidence_methods import METHODS, Problem
from .evidence_tasks import Task

ANGLES, RADIUS = (0.0, 2.1, 4.0), 1.2
WEIGHTS, INK_STD = (0.5, 0.3, 0.2), 0.25
BETWEEN = (0.3, 0.35)  # a colour between the inks


@dataclass(frozen=True)
class Case:
    """What is seen: ``pixels`` of them, each of colour y (C,) with deviation ``std``."""

    pixels: int
    y: tuple[float, float]
    std: float


CASES = {
    "1 pixel, ambiguous": Case(1, BETWEEN, 0.5),
    "1 pixel, clear": Case(1, (-0.5, 1.0), 0.1),
    "24 pixels, each weak": Case(24, (RADIUS * math.cos(ANGLES[2]), RADIUS * math.sin(ANGLES[2])), 4.0),
    "24 pixels, ambiguous": Case(24, BETWEEN, 4.0),
}


def inks() -> Tensor:
    """(K,C)."""
    angles = torch.tensor(ANGLES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


class InkNetwork(torch.nn.Module):
    """The ideal network of this prior: velocities of

        q(x_0i | x_t) = sum_k p(k | x_t) N((ink_k/v + a x_ti/s^2)/l, 1/l),  l = 1/v + a^2/s^2,
        p(k | x_t) ~ w_k prod_j N(x_tj; a ink_k, a^2 v + s^2).
    """

    config = SimpleNamespace(num_classes=None)

    def __init__(self) -> None:
        super().__init__()
        self.inks, self.log_prior = torch.nn.Parameter(inks(), requires_grad=False), torch.tensor(WEIGHTS).log()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> GaussianMixture:
        s, v = per_sample(sigma, x), INK_STD**2
        a = 1 - s                                                               # (B,1,1,1)
        centres = self.inks[None, :, :, None, None]                             # (1,K,C,1,1)
        precision = 1 / v + (a / s).square()
        means = (centres / v + (a * x / s.square()).unsqueeze(1)) / precision.unsqueeze(1)
        distance = (x.unsqueeze(1) - a.unsqueeze(1) * centres).square().sum((2, 3, 4))               # (B,K)
        log_w = (self.log_prior - 0.5 * distance / (a.square() * v + s.square()).flatten(1)).log_softmax(1)
        log_w = log_w[:, :, None, None, None].expand(-1, -1, 1, *x.shape[2:])
        velocity = (x.unsqueeze(1) - means) / s.unsqueeze(1)
        return GaussianMixture(velocity, log_w, (-0.5 * precision.log() - s.log()).unsqueeze(1))

    def mixture(self, velocity: GaussianMixture) -> GaussianMixture:
        return velocity


def exact_shares(case: Case) -> Tensor:
    """p(k | y) ~ w_k prod_i N(y_i; ink_k, v + s_y^2): (K,)."""
    distance = (inks() - torch.tensor(case.y)).square().sum(1)
    return (torch.tensor(WEIGHTS).log() - 0.5 * case.pixels * distance / (INK_STD**2 + case.std**2)).softmax(0)


def problem(case: Case, samples: int, steps: int, generator: torch.Generator) -> Problem:
    """Of many images that all see the same."""
    shape = (samples, 2, case.pixels + 1, 1)
    seen = torch.ones(1, 1, *shape[2:])
    seen[:, :, -1] = 0
    y = (torch.tensor(case.y).reshape(1, 2, 1, 1) * seen).expand(shape)
    keep = lambda x: x * seen  # noqa: E731
    task = Task(PixelEvidence(y[:1], seen / case.std**2), keep, keep, lambda x, known: torch.lerp(x, known, seen),
                seen, case.std)
    return Problem(InkNetwork(), task, y, None, torch.randn(shape, generator=generator), steps, 0.0)


def total_variation(case: Case, method: str, samples: int, steps: int, generator: torch.Generator) -> float:
    """Half the sum of the differences between the inks' shares at the last pixel and :func:`exact_shares`; of exact
    samples about 0.4 sqrt(K / samples)."""
    x = METHODS[method](problem(case, samples, steps, generator))
    nearest = torch.cdist(x[:, :, -1, 0], inks()).argmin(1)
    shares = torch.bincount(nearest, minlength=len(WEIGHTS)) / samples
    return 0.5 * (shares - exact_shares(case)).abs().sum().item()
