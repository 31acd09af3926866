r"""From captured network outputs to guided posteriors: the nodes' own mathematics, without a host.

Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gmflow_core import GaussianMixture, Guided, Mixture, guide_cfg, guide_probabilistic, unguided
from ..gmflow_core.guidance import check_guidance

METHODS = ("probabilistic", "vanilla CFG")


@dataclass(frozen=True)
class Guidance:
    """How a GMFlow guider guides. ``interval``: (start, end) sigmas; it acts at end <= sigma <= start."""

    scale: float = 0.45
    orthogonal: float = 1.0
    method: str = "probabilistic"
    cfg_scale: float = 4.0
    interval: tuple[float, float] = (1.0, 0.0)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_guidance(self.scale, self.orthogonal)
        if not self.cfg_scale >= 1:
            raise ValueError(f"cfg_scale must be >= 1 (1 is none), got {self.cfg_scale}")
        start, end = self.interval
        if not start >= end:
            raise ValueError(f"guidance must start before it ends, got sigmas {start:.3g} to {end:.3g}")

    def acts_at(self, sigma: float) -> bool:
        """Whether the unconditional prediction is needed at this sigma."""
        on = self.scale > 0 if self.method == METHODS[0] else self.cfg_scale > 1
        return on and self.interval[1] <= sigma <= self.interval[0]

    def __call__(self, cond: Mixture, uncond: Mixture) -> Guided:
        if self.method == METHODS[0]:
            return guide_probabilistic(cond, uncond, self.scale, self.orthogonal)
        return guide_cfg(cond, uncond, self.cfg_scale)


class Capture:
    """Network outputs of one model evaluation, by the id of their conditioning; ``guided`` if a guider made it.

    A host may evaluate chunks in several threads.
    """

    def __init__(self) -> None:
        self.packed: dict[object, Tensor] = {}
        self.guided: Guided | None = None
        self._lock = threading.Lock()

    def add(self, packed: Tensor, ids: Sequence) -> None:
        """Keep a batch (n B,...) of n chunks, one for each id."""
        with self._lock:
            self.packed.update(zip(ids, packed.chunk(len(ids))))


def pool(mixtures: Sequence[Mixture], strengths: Sequence[float]) -> Mixture:
    r"""sum_i s_i q_i with s = strengths / sum: the components of all, with v = sum_i s_i v_i.

    One shared v keeps the mean and the isotropic variance of the sum exact at every pixel.
    """
    if len(mixtures) == 1:
        return mixtures[0]
    if not (min(strengths) >= 0 and sum(strengths) > 0):
        raise ValueError(f"conditionings to combine need strengths >= 0 that are not all 0, got {list(strengths)}")
    shares = mixtures[0].means.new_tensor(strengths) / sum(strengths)
    var = sum(share * (2 * m.log_std).exp() for share, m in zip(shares, mixtures))
    logits = torch.cat([m.log_weights + share.log() for share, m in zip(shares, mixtures)], dim=1)
    return GaussianMixture(torch.cat([m.means for m in mixtures], dim=1), logits, 0.5 * var.log())


def moved(posterior: Mixture, mean: Tensor) -> GaussianMixture:
    """The posterior shifted as a whole so that its mean is ``mean`` (B,C,*S): what vanilla CFG does to a mixture."""
    shift = (mean - posterior.mean()).unsqueeze(1)
    return GaussianMixture(posterior.means + shift, posterior.log_weights, posterior.log_std)


def guided_by_mean(posterior: Mixture, mean: Tensor) -> Guided:
    """A conditional posterior and the mean that somebody else's guidance made of it."""
    return unguided(moved(posterior, mean))
