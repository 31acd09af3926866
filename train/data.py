"""Training data. A dataset draws a batch from a generator, so that step n of a run is always the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gmflow_core.checkpoint import LatentSpace

# Six inks: the corners of the RGB cube between black and white, 60 degrees of hue apart.
INKS = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "cyan": (0, 1, 1), "blue": (0, 0, 1), "magenta": (1, 0, 1)}


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 16x16, in one of six inks on black, RGB in [-1, 1]."""

    grey: Tensor    # (N,1,16,16) in [0,1]
    labels: Tensor  # (N,)

    latent_space = LatentSpace("rgb")
    class_names = tuple(str(i) for i in range(10))
    shape = (3, 16, 16)

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits

        data = load_digits()
        grey = torch.from_numpy(data.images).float()[:, None] / 16
        grey = F.interpolate(grey, size=(16, 16), mode="bilinear", align_corners=False)
        return cls(grey, torch.from_numpy(data.target).long())

    def ink(self, grey: Tensor, inks: Tensor) -> Tensor:
        """Grey (B,1,H,W) in [0,1] and ink indices (B,) to RGB (B,3,H,W) in [-1,1]."""
        colours = torch.tensor(list(INKS.values()), dtype=grey.dtype, device=grey.device)
        return 2 * grey * colours[inks][:, :, None, None] - 1

    def batch(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images (B,3,16,16) and labels (B,)."""
        index = torch.randint(len(self.labels), (size,), generator=generator)
        inks = torch.randint(len(INKS), (size,), generator=generator)
        return self.ink(self.grey[index], inks), self.labels[index]


@dataclass(frozen=True, eq=False)
class Checkerboard:
    """Uniform on the 8 cells (column + row even) of a 4x4 board over [-4, 4]^2."""

    latent_space = LatentSpace("2d")
    class_names = None
    shape = (2,)

    @classmethod
    def load(cls) -> Checkerboard:
        return cls()

    def batch(self, size: int, generator: Generator) -> tuple[Tensor, None]:
        """Points (B,2); no labels."""
        cell = torch.randint(8, (size,), generator=generator)
        row = cell // 2
        column = 2 * (cell % 2) + row % 2  # column + row is even
        corner = torch.stack([column, row], dim=1).float()
        return 2 * (corner + torch.rand((size, 2), generator=generator)) - 4, None


DATASETS = {"digits": Digits, "checkerboard": Checkerboard}
