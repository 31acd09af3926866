"""How a GMFlow guider guides, without a host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..gmflow_core import Guided, Mixture, guide_probabilistic
from ..gmflow_core.guidance import PUBLISHED_SCALE, check_guidance, check_tilt
from ..gmflow_core.sampler import GUIDANCE_TILT

METHODS = ("probabilistic", "vanilla CFG")


@dataclass(frozen=True)
class Guidance:
    """How a GMFlow guider guides. ``interval``: (start, end) sigmas; it acts at end <= sigma <= start."""

    scale: float = PUBLISHED_SCALE
    orthogonal: float = 1.0
    method: str = "probabilistic"
    cfg_scale: float = 4.0
    interval: tuple[float, float] = (1.0, 0.0)
    tilt: str = GUIDANCE_TILT

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_guidance(self.scale, self.orthogonal)
        check_tilt(self.tilt)
        if not 1 <= self.cfg_scale < math.inf:
            raise ValueError(f"cfg_scale must be a finite number >= 1 (1 is none), got {self.cfg_scale}")
        start, end = self.interval
        if not start >= end:
            raise ValueError(f"guidance must start before it ends, got sigmas {start:.3g} to {end:.3g}")

    @property
    def vanilla(self) -> bool:
        """Whether it is classifier-free guidance, which is the host's own."""
        return self.method == METHODS[1]

    def acts_at(self, sigma: float) -> bool:
        """Whether the unconditional prediction is needed at this sigma."""
        on = self.cfg_scale > 1 if self.vanilla else self.scale > 0
        return on and self.interval[1] <= sigma <= self.interval[0]

    def __call__(self, cond: Mixture, uncond: Mixture) -> Guided:
        """The probabilistic method's guided posterior."""
        return guide_probabilistic(cond, uncond, self.scale, self.orthogonal, self.tilt)


def nearest_cfg(mean: Tensor, cond: Tensor, uncond: Tensor) -> float:
    """The CFG scale s whose uncond + s (cond - uncond) lies nearest to a guided mean; 1 where the two agree.

    What patches that read a CFG scale are told when guidance is of another kind.
    """
    direction = cond - uncond
    length = float(direction.square().sum())
    return 1 + float(((mean - cond) * direction).sum()) / length if length > 0 else 1.0
