"""The checkerboard: points in the plane, made up as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gmflow_core.model import LatentSpace

from .dataset import Dataset


@dataclass(frozen=True, eq=False)
class Checkerboard(Dataset):
    """Uniform on the 8 cells (column + row even) of a 4x4 board over [-4, 4]^2."""

    latent_space = LatentSpace("2d")
    class_names = None
    shape = (2,)

    @classmethod
    def load(cls) -> Checkerboard:
        return cls()

    def choose(self, size: int, generator: Generator) -> Tensor:
        """The points themselves: (B,2)."""
        cell = torch.randint(8, (size,), generator=generator)
        row = cell // 2
        column = 2 * (cell % 2) + row % 2  # column + row is even
        corner = torch.stack([column, row], dim=1).float()
        return 2 * (corner + torch.rand((size, 2), generator=generator)) - 4

    def fetch(self, choice: Tensor) -> tuple[Tensor, None]:
        return choice, None
