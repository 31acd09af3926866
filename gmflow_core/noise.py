"""Seeded noise that belongs to an image and a step, not to a batch or a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TICK = 1e-6  # sigmas closer than this are the same step


class ImageNoise:
    """Standard normal noise of images: the same image in any batch, on any device and in any part of a split run.

    ``noise()`` is the initial noise, (B,C,*S), from (seed, image index). ``noise(sigma, sigma_next)``, as a solver
    calls it, draws from (seed, image index, sigma): calls of one sigma in a row continue one stream, and a run that is
    cut between two steps goes on as if it were not. ``shape`` is one image's (C,*S). Drawn on the CPU, whatever
    ``device`` is. ``streams`` are the generators of the call that was last, one an image.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device):
        self.seed, self.indices, self.shape, self.device = seed, [int(index) for index in indices], shape, device
        self._step: int | None = None
        self.streams = self._open(0)

    def _open(self, tick: int) -> list[torch.Generator]:
        """One generator per image; ``tick`` 0 is the initial noise, every step has its own."""
        # Streams of neighbouring (seed, index, tick) must not overlap: spread them over all bits. PyTorch's CPU
        # generator takes the lowest 32, so seeds that differ by a multiple of 2^32 are one, as in ComfyUI itself.
        mixed = self.seed * 0x9E3779B97F4A7C15 + tick * 0x94D049BB133111EB
        seeds = [(mixed + index * 0xBF58476D1CE4E5B9) % (1 << 63) for index in self.indices]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, sigma: float | None = None, sigma_next: float | None = None) -> Tensor:
        step = None if sigma is None else 1 + round(sigma / TICK)
        if step != self._step:
            self._step, self.streams = step, self._open(step or 0)
        return torch.stack([torch.randn(self.shape, generator=stream) for stream in self.streams]).to(self.device)
