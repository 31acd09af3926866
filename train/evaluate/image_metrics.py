r"""How good are images? Figures of merit with known answers: pure functions of features (N,D) and of images (N,3,H,W).

Features come from :mod:`.features`. Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> float:
    r"""FID of two Gaussians (mean (D,), covariance (D,D)) of features (Heusel et al. 2017):

        |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^(1/2) C_2 C_1^(1/2))^(1/2)).
    """
    (mean_1, cov_1), (mean_2, cov_2) = ((mean.double(), cov.double()) for mean, cov in (real, fake))
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D,D) of features (N,D), in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def quantise(images: Tensor) -> Tensor:
    """[-1,1] to uint8 as an image file would hold them; values beyond are cut."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def saturation(pixels: Tensor) -> Tensor:
    r"""Mean saturation of HSV, (max - min) / max over the channels, 0 where black (Sadat et al. 2024, APG).

    pixels: (N,3,H,W) uint8. (N,)
    """
    high, low = pixels.amax(1).double(), pixels.amin(1).double()                # (N,H,W)
    return torch.where(high > 0, (high - low) / high.clamp(min=1), 0).mean((1, 2))


def mottling(pixels: Tensor) -> Tensor:
    """Median difference of a pixel to its right-hand neighbour, over pixels and channels, in levels of 255: about 0.95
    times the deviation of noise on flat colour, next to nothing in clean pictures of flat colours.
    pixels: (N,C,H,W) uint8. (N,)"""
    return pixels.double().diff(dim=3).abs().flatten(1).median(1).values


def overshoot(images: Tensor) -> Tensor:
    """Root mean square of what lies beyond [-1,1], which an image file cuts off. images: (N,3,H,W). (N,)"""
    return (images.double() - images.double().clamp(-1, 1)).square().mean((1, 2, 3)).sqrt()
