"""What only the digits have: a class that a support vector machine reads, and an ink out of six."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.digits import INKS, Digits

INKED = 0.5        # a pixel is inked from this value (its largest channel in [0, 1]) on
HUE_TOLERANCE = 15  # degrees


def grey8(images: Tensor) -> Tensor:
    """RGB (N,3,16,16) in [-1,1] to the SVM's features: the ink's strength on 8x8, 0 to 16. (N,64)"""
    value = (images.clamp(-1, 1).amax(1, keepdim=True) + 1) / 2
    return 16 * F.avg_pool2d(value, 2).flatten(1)


def train_svm(data: Digits):
    """scikit-learn's classic digits classifier, on real digits in white."""
    from sklearn.svm import SVC

    white = (2 * data.grey - 1).expand(-1, 3, -1, -1)
    return SVC(gamma=0.001, C=10).fit(grey8(white).numpy(), data.labels.numpy())


def hues(images: Tensor) -> tuple[Tensor, Tensor]:
    """Hue in degrees (NaN where grey) and the inked mask of RGB images in [-1,1], each (N,H,W)."""
    rgb = (images.clamp(-1, 1) + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = high - low
    r, g, b = rgb.unbind(1)
    sector = torch.where(high == r, (g - b) / chroma % 6,
                         torch.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    return torch.where(chroma > 0.1, 60 * sector, torch.nan), high >= INKED


def ink_votes(images: Tensor) -> tuple[Tensor, Tensor]:
    """How many inked pixels are within 15 degrees of each ink (N,6), and how many there are in all."""
    hue, inked = hues(images)
    centres = torch.arange(len(INKS)) * 60.0
    distance = (hue.unsqueeze(-1) - centres).abs()
    near = torch.minimum(distance, 360 - distance) <= HUE_TOLERANCE           # (N,H,W,6)
    near = near & inked.unsqueeze(-1)
    return near.sum((1, 2)), inked.sum()


def dominant_inks(images: Tensor) -> Tensor:
    """The ink of most inked pixels, as an index of INKS; -1 where no pixel has any. (N,)"""
    votes, _ = ink_votes(images)
    return torch.where(votes.amax(1) > 0, votes.argmax(1), -1)


def hue_metrics(images: Tensor) -> dict[str, float]:
    """Of inked pixels: the share within 15 degrees of any ink, and of their own image's ink; and the inks' shares."""
    votes, total = ink_votes(images)
    shares = torch.bincount(votes.argmax(1), minlength=len(INKS)) / len(images)
    return {
        "on_palette": (votes.sum() / total).item(),
        "one_ink": (votes.amax(1).sum() / total).item(),
        "ink_min": shares.min().item(), "ink_max": shares.max().item(),
    }


def digit_metrics(images: Tensor, labels: Tensor, svm) -> dict[str, float]:
    """Figures of images (N,3,16,16) in [-1,1] that were asked for as ``labels`` (N,).

    ``accuracy``: the share that the SVM reads as asked for; ``class_min``, ``class_max``: the rarest and the most
    frequent class as it reads them; ``on_palette``, ``one_ink``, ``ink_min``, ``ink_max``: see :func:`hue_metrics`.
    """
    read = torch.from_numpy(svm.predict(grey8(images).numpy()))
    shares = torch.bincount(read, minlength=10) / len(read)
    return {
        "accuracy": (read == labels).float().mean().item(), **hue_metrics(images),
        "class_min": shares.min().item(), "class_max": shares.max().item(),
    }
