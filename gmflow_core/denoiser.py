r"""From network to posterior: the only border of dtype and clock.

A *denoiser* is any callable ``denoiser(x, sigma) -> Guided``: x (B,C,*S) float32, sigma a float in
(0, 1]. :class:`GMDenoiser` makes one of a network; tests make one of an exact prior.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .echo import Conditioned, Sigma, posteriors_given
from .evidence import Evidence
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
    probabilistic guidance, of :data:`~gmflow_core.guidance.TILTS`. ``evidence``: what is known of the images; it
    reaches the conditional and the unconditional posterior, each with its own echo, and guidance comes after.
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
        evidence: Evidence | Conditioned | None = None,
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
        self.given = None if evidence is None else Conditioned.of(evidence)
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
                f"labels must be (B,) class indices 0 to {self.num_classes - 1} ({self.num_classes} is the null "
                f"label), got {bad or tuple(self.labels.shape)}"
            )

    def guides_at(self, sigma: float) -> bool:
        """Whether guidance acts at this sigma, so that the network is asked twice."""
        start, end = self.interval
        on = self.guidance > (1 if self.method == "cfg" else 0)
        return on and self.labels is not None and end <= sigma <= start

    def velocity(self, x: Tensor, sigma: Sigma, labels: Tensor | None) -> Mixture:
        """The network's velocity mixture at (x, sigma), in float32."""
        dtype = next(self.model.parameters()).dtype
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        return self.model.mixture(self.model(x.to(dtype), sigmas, labels))

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        null = self._null_like(x)
        labels = self._labels_like(x, null)
        roles = [labels, null] if self.guides_at(sigma) else [labels]
        if self.given is None:
            posteriors = self.posteriors([x], sigma, roles)
        else:
            posteriors = posteriors_given(self.given, lambda xs, s: self.posteriors(xs, s, roles), x, sigma)
        if len(posteriors) == 1:
            return unguided(posteriors[0])
        cond, uncond = posteriors
        if self.method == "cfg":
            return guide_cfg(cond, uncond, self.guidance)
        return guide_probabilistic(cond, uncond, self.guidance, self.orthogonal, self.tilt)

    def posteriors(self, xs: list[Tensor], sigma: Sigma, roles: list[Tensor | None]) -> list[Mixture]:
        """q(x_0 | x) for every role's labels, at one x for all roles or one for each: one batch."""
        n = len(roles)
        xs = xs * n if len(xs) == 1 else xs
        if n == 1:
            return [velocity_to_posterior(self.velocity(xs[0], sigma, roles[0]), xs[0], sigma)]
        labels = torch.cat([role for role in roles if role is not None])
        sigmas = sigma.repeat(n) if isinstance(sigma, Tensor) else sigma
        every = self.velocity(torch.cat(xs), sigmas, labels)
        size = xs[0].shape[0]
        parts = [every.map(lambda t, i=i: t[i * size : (i + 1) * size]) for i in range(n)]
        return [velocity_to_posterior(velocity, x, sigma) for velocity, x in zip(parts, xs, strict=True)]

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
