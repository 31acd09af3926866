"""The digits: small, on every machine that has scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gmflow_core.model import LatentSpace

from .dataset import Dataset

# Six inks: the corners of the RGB cube between black and white, 60 degrees of hue apart.
INKS = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "cyan": (0, 1, 1), "blue": (0, 0, 1),
        "magenta": (1, 0, 1)}


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

    def choose(self, size: int, generator: Generator) -> Tensor:
        """[index, ink] of each sample: (B,2)."""
        index = torch.randint(len(self), (size,), generator=generator)
        return torch.stack([index, torch.randint(len(INKS), (size,), generator=generator)], dim=1)

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        index, inks = choice.unbind(1)
        return self.ink(self.grey[index], inks), self.labels[index]
