"""What a model's channels are."""

from __future__ import annotations

import math
from dataclasses import dataclass

SD_VAE_SCALE = 0.18215
LATENT_KINDS = ("rgb", "sd-vae", "2d")


@dataclass(frozen=True)
class LatentSpace:
    """What the model's channels are: ``rgb`` in [-1, 1], ``2d`` points, or ``sd-vae``: (z - shift) scale
    of what the VAE encodes. ValueError for an unknown kind, a zero scale or a number that is not finite."""

    kind: str
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in LATENT_KINDS:
            raise ValueError(f"latent space must be one of {', '.join(LATENT_KINDS)}, got {self.kind!r}")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"latent {name} must be a finite number, got {value!r}")
        if self.scale == 0:
            raise ValueError("latent scale must not be 0")
