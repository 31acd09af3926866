"""Training data. A dataset draws a batch from a generator, so that step n of a run is always the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gmflow_core.checkpoint import LatentSpace

# Six inks: the corners of the RGB cube between black and white, 60 degrees of hue apart.
INKS = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "cyan": (0, 1, 1), "blue": (0, 0, 1), "magenta": (1, 0, 1)}


class Dataset:
    """What a trainer needs to know: ``latent_space``, ``class_names`` (None: no labels), the ``shape`` of a sample.

    A batch comes in two halves, so that a process can fetch its part of it alone: ``draw`` is cheap,
    ``fetch`` may have to read files.
    """

    latent_space: LatentSpace
    class_names: tuple[str, ...] | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """The number of different samples; 0 where they are made up."""
        return 0

    def draw(self, size: int, generator: Generator) -> Tensor:
        """The choice of a batch: (size, ...), a row a sample."""
        raise NotImplementedError

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor | None]:
        """Samples (B, *shape) float32 and labels (B,) of some rows of a choice."""
        raise NotImplementedError

    def batch(self, size: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        return self.fetch(self.draw(size, generator))


@dataclass(frozen=True, eq=False)
class Digits(Dataset):
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

    def __len__(self) -> int:
        return len(self.labels)

    def ink(self, grey: Tensor, inks: Tensor) -> Tensor:
        """Grey (B,1,H,W) in [0,1] and ink indices (B,) to RGB (B,3,H,W) in [-1,1]."""
        colours = torch.tensor(list(INKS.values()), dtype=grey.dtype, device=grey.device)
        return 2 * grey * colours[inks][:, :, None, None] - 1

    def draw(self, size: int, generator: Generator) -> Tensor:
        """[index, ink] of each sample: (B,2)."""
        index = torch.randint(len(self), (size,), generator=generator)
        return torch.stack([index, torch.randint(len(INKS), (size,), generator=generator)], dim=1)

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        index, inks = choice.unbind(1)
        return self.ink(self.grey[index], inks), self.labels[index]


@dataclass(frozen=True, eq=False)
class Checkerboard(Dataset):
    """Uniform on the 8 cells (column + row even) of a 4x4 board over [-4, 4]^2."""

    latent_space = LatentSpace("2d")
    class_names = None
    shape = (2,)

    @classmethod
    def load(cls) -> Checkerboard:
        return cls()

    def draw(self, size: int, generator: Generator) -> Tensor:
        """The points themselves: (B,2)."""
        cell = torch.randint(8, (size,), generator=generator)
        row = cell // 2
        column = 2 * (cell % 2) + row % 2  # column + row is even
        corner = torch.stack([column, row], dim=1).float()
        return 2 * (corner + torch.rand((size, 2), generator=generator)) - 4

    def fetch(self, choice: Tensor) -> tuple[Tensor, None]:
        return choice, None
