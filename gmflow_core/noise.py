"""Seeded noise that belongs to an image, not to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise with one generator per image, from (seed, image index): the same image in any batch.

    ``shape`` is one image's (C,*S); a call returns the next (B,C,*S) of every image's stream. Drawn on
    the CPU whatever ``device`` is, so that devices agree too.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device):
        # Streams of neighbouring (seed, index) pairs must not overlap: spread them over 63 bits.
        mixed = [(seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % (1 << 63) for index in indices]
        self.generators = [torch.Generator().manual_seed(m) for m in mixed]
        self.shape, self.device = shape, device

    def __call__(self, *_sigmas: float) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
