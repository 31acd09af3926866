"""How a GMFlow guider guides, without a host."""

from __future__ import annotations

from dataclasses import dataclass

from ..gmflow_core import Guided, Mixture, guide_cfg, guide_probabilistic
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
            return guide_probabilistic(cond, uncond, self.scale, self.orthogonal, self.tilt)
        return guide_cfg(cond, uncond, self.cfg_scale)
