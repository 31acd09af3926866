"""What a model's channels are."""

from __future__ import annotations

from dataclasses import dataclass

SD_VAE_SCALE = 0.18215
LATENT_KINDS = ("rgb", "sd-vae", "2d")
LIMIT = 1e6  # of scale and shift


@dataclass(frozen=True)
class LatentSpace:
    """What the model's channels are: ``rgb`` in [-1, 1], ``2d`` points, or ``sd-vae``: (z - shift) scale
    of what the VAE encodes. ValueError for an unknown kind, or a scale or shift that float32 could not undo."""

    kind: str
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in LATENT_KINDS:
            raise ValueError(f"latent space must be one of {', '.join(LATENT_KINDS)}, got {self.kind!r}")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= LIMIT:  # "not <=" catches NaN
                raise ValueError(f"latent {name} must be a finite number up to {LIMIT:g} in size, got {value!r:.100}")
        if self.scale == 0 or abs(self.scale) < 1 / LIMIT:
            raise ValueError(f"latent scale must not be 0, at least {1 / LIMIT:g} in size, got {self.scale!r}")
