"""A trajectory kept for looking at: the mixtures of every network step, small and on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import Guided
from .mixture import GaussianMixture
from .solver import StepInfo


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One network step, of the first images of a batch. Mixtures are x_0 posteriors."""

    sigma: float
    sigma_next: float
    x: Tensor                       # (B,C,*S) the step's x_t
    conditional: GaussianMixture    # before guidance
    guided: GaussianMixture         # after it; the conditional itself without guidance
    corrected: GaussianMixture      # after the second-order correction: what the step used


@dataclass(frozen=True, eq=False)
class Trace:
    """The steps of one sampling run, in order, and the labels of its images where they are known."""

    steps: tuple[TraceStep, ...]
    labels: tuple[str, ...] = ()


class Recorder:
    """A sampler's callback that keeps a :class:`Trace`: the first ``images`` images of at most ``steps`` steps.

    Mixtures are stored in half precision on the CPU: 2 B K (C + 1) H W bytes each, three to a step.
    """

    def __init__(self, images: int = 4, steps: int = 1000):
        self.images, self.limit, self.kept = images, steps, []

    def __call__(self, info: StepInfo) -> None:
        if len(self.kept) < self.limit:
            self.kept.append(TraceStep(
                info.sigma, info.sigma_next, self._half(info.x), *self._mixtures(info.guided, info.posterior)
            ))

    def trace(self, labels: tuple[str, ...] = ()) -> Trace:
        return Trace(tuple(self.kept), labels[: self.images])

    def _mixtures(self, guided: Guided, posterior: GaussianMixture) -> tuple[GaussianMixture, ...]:
        stored: dict[int, GaussianMixture] = {}  # the three are often one: keep it once
        parts = (guided.base, guided.posterior, posterior)
        return tuple(stored.setdefault(id(part), part.map(self._half)) for part in parts)

    def _half(self, x: Tensor) -> Tensor:
        return x[: self.images].detach().to("cpu", torch.float16)
