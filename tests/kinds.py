"""Which of the sixteen kinds of characters is it? A judge of twenty real pictures of each."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import avg_pool2d

KINDS = ("blob", "clay", "critter", "cutout", "landscape", "marble", "mood", "peep", "pixel person", "pixel robot",
         "planet", "sprout", "thumb", "voxel person", "voxel robot", "waves")


def edges(images: Tensor) -> np.ndarray:
    """(B,3,24,24) in [-1, 1]: where brightness changes, and a little of it, averaged over small squares."""
    grey = images.mean(1, keepdim=True) / 2
    down, right = (avg_pool2d(grey.diff(dim=d).abs(), 3, ceil_mode=True) for d in (2, 3))
    return torch.cat([t.flatten(1) for t in (down, right, 0.3 * avg_pool2d(grey, 6))], 1).numpy()


def judge() -> Callable[[Tensor], Tensor]:
    """Images (B,3,24,24) in [-1, 1] -> kinds (B,). It reads nine in ten of real pictures that it has not seen."""
    with Image.open(Path(__file__).parent / "data" / "kinds.png") as picture:  # a row for each kind
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    real = pixels.unflatten(0, (16, 24)).unflatten(2, (20, 24)).permute(0, 2, 4, 1, 3).flatten(0, 1) / 127.5 - 1
    kinds, held_out = np.arange(16).repeat(20), np.arange(320) % 4 == 0
    features = edges(real)
    read = SVC(C=10).fit(features[~held_out], kinds[~held_out]).predict(features[held_out])
    assert (read == kinds[held_out]).mean() > 0.9
    machine = SVC(C=10).fit(features, kinds)
    return lambda images: torch.from_numpy(machine.predict(edges(images)))
