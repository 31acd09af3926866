r"""From network to posterior: the only border of dtype and clock.

A *denoiser* is any callable ``denoiser(x, sigma) -> Guided``: x (B,C,*S) float32, sigma a float in
(0, 1]. :class:`GMDenoiser` makes one of a network; tests make one of an exact prior.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guidance import Guided, check_guidance, check_tilt, guide_cfg, guide_probabilistic, unguided
from .mixture import Mixture
from .model import GMMLP, GMDiT
from .path import velocity_to_posterior

Denoiser = Callable[[Tensor, float], Guided]

METHODS = ("probabilistic", "cfg")


class GMDenoiser:
    """A network as a denoiser, with guidance.

    ``labels``: one class index per image (B,), or None for the null label throughout.
    ``guidance``: probabilistic scale in [0, 1), or with ``method="cfg"`` a CFG scale >= 1 (1 is none).
    ``orthogonal``: strength in [0, 1] of the orthogonal projection. ``interval``: (start, end)
    sigmas, 1 >= start >= end >= 0; guidance acts at end <= sigma <= start. ``tilt``: that of
    probabilistic guidance, of :data:`~gmflow_core.guidance.TILTS`.
    """

    def __init__(
        self,
        model: GMDiT | GMMLP,
        labels: Tensor | None = None,
        guidance: float = 0.0,
        orthogonal: float = 1.0,
        *,
        method: str = "probabilistic",
        interval: tuple[float, float] = (1.0, 0.0),
        tilt: str = "published",
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "probabilistic":
            check_guidance(guidance, orthogonal)
        elif not (guidance == 0 or guidance >= 1):
            raise ValueError(f"a CFG scale must be >= 1 (1 is none), got {guidance}")
        start, end = interval
        if not 1 >= start >= end >= 0:
            raise ValueError(f"interval must be (start, end) sigmas with 1 >= start >= end >= 0, got {interval}")
        self.model, self.labels = model, labels
        check_tilt(tilt)
        self.guidance, self.orthogonal, self.method, self.interval = guidance, orthogonal, method, interval
        self.tilt = tilt
        self.num_classes = model.config.num_classes
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.num_classes is None:
            raise ValueError("this model has no classes: labels must be None")
        bad = [int(v) for v in self.labels.flatten() if not 0 <= int(v) <= self.num_classes]
        if bad or self.labels.ndim != 1:
            raise ValueError(
                f"labels must be (B,) class indices 0 to {self.num_classes - 1} ({self.num_classes} is the null label), "
                f"got {bad or tuple(self.labels.shape)}"
            )

    def guides_at(self, sigma: float) -> bool:
        """Whether guidance acts at this sigma, so that the network is asked twice."""
        start, end = self.interval
        on = self.guidance > (1 if self.method == "cfg" else 0)
        return on and self.labels is not None and end <= sigma <= start

    def velocity(self, x: Tensor, sigma: float, labels: Tensor | None) -> Mixture:
        """The network's velocity mixture at (x, sigma), in float32."""
        dtype = next(self.model.parameters()).dtype
        sigmas = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        return self.model.mixture(self.model(x.to(dtype), sigmas, labels))

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        null = self._null_like(x)
        labels = self._labels_like(x, null)
        if labels is None or null is None or not self.guides_at(sigma):
            return unguided(velocity_to_posterior(self.velocity(x, sigma, labels), x, sigma))
        both = self.velocity(torch.cat([x, x]), sigma, torch.cat([labels, null]))
        n = x.shape[0]
        halves = both.map(lambda t: t[:n]), both.map(lambda t: t[n:])
        cond, uncond = (velocity_to_posterior(velocity, x, sigma) for velocity in halves)
        if self.method == "cfg":
            return guide_cfg(cond, uncond, self.guidance)
        return guide_probabilistic(cond, uncond, self.guidance, self.orthogonal, self.tilt)

    def _null_like(self, x: Tensor) -> Tensor | None:
        """The null label of every image, (B,); None for a model without classes."""
        if self.num_classes is None:
            return None
        return torch.full((x.shape[0],), self.num_classes, dtype=torch.int64, device=x.device)

    def _labels_like(self, x: Tensor, null: Tensor | None) -> Tensor | None:
        if self.labels is None:
            return null
        if self.labels.shape[0] != x.shape[0]:
            raise ValueError(f"{self.labels.shape[0]} labels for a batch of {x.shape[0]}: give one per image")
        return self.labels.to(device=x.device, dtype=torch.int64)
