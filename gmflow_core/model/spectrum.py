r"""SpectrumMLP: the power spectrum of spectral sampling's noise, from two statistics of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..mixture import Gaussian


@dataclass(frozen=True)
class SpectrumConfig:
    """Base size (C, H, W) of the spectrum and hidden widths of the MLP."""

    base_size: tuple[int, int, int] = (4, 32, 32)
    layers: tuple[int, ...] = (64, 8)

    def __post_init__(self) -> None:
        for name in ("base_size", "layers"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(isinstance(v, int) and v > 0 for v in values):
                raise ValueError(f"spectrum {name} must be a list of whole numbers >= 1, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        if len(self.base_size) != 3:
            raise ValueError(f"spectrum base_size must be (C, H, W), got {self.base_size}")

    def to_dict(self) -> dict:
        return asdict(self)


class SpectrumMLP(nn.Module):
    r"""Gaussian(mean, var) (B,C,H,W) -> log_power (B,C,H,W), mean power one per channel (GMFlow, spectral sampling).

    The inputs are [mean of the variance, mean over channels of the spatial variance of the mean].
    """

    def __init__(self, config: SpectrumConfig, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        widths = (2, *config.layers, math.prod(config.base_size))
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            layers += [nn.SiLU()] * (i > 0) + [operations.Linear(n_in, n_out, dtype=dtype, device=device)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, gaussian: Gaussian) -> Tensor:
        mean = gaussian.mean
        statistics = torch.stack([gaussian.var.flatten(1).mean(1), mean.flatten(2).var(-1).mean(1)], dim=-1)
        base = self.mlp(statistics.to(next(self.mlp.parameters()).dtype)).float()
        base = base.reshape(-1, *self.config.base_size)
        return normalize_power(crop_spectrum(base, mean.shape[-2:])).to(mean.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier, and zeros at the end: white noise."""
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        for layer in linears:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(linears[-1].weight)


def crop_spectrum(log_power: Tensor, size: Sequence[int]) -> Tensor:
    """The low frequencies (both signs, so the corners) of a spectrum for a smaller image."""
    for axis, n in zip((-2, -1), size, strict=True):
        base = log_power.shape[axis]
        if n > base:
            raise ValueError(f"spectral sampling knows sizes up to {base} along axis {axis}, got {n}; "
                             "sample with spectrum=None")
        if n < base:
            low = (n + 1) // 2
            parts = [log_power.narrow(axis, 0, low), log_power.narrow(axis, base - (n - low), n - low)]
            log_power = torch.cat(parts, dim=axis)
    return log_power


def normalize_power(log_power: Tensor) -> Tensor:
    """Shift so that exp(log_power) averages to one over the H x W frequencies of each channel."""
    pixels = log_power.shape[-2] * log_power.shape[-1]
    return log_power.flatten(-2).log_softmax(-1).add(math.log(pixels)).reshape(log_power.shape)
