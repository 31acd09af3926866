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


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N,M) of (N,D) and (M,D), in float64: in float32 the fast way loses close neighbours to
    cancellation."""
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")


def neighbour_radius(features: Tensor, k: int = 3, chunk: int = 1024) -> Tensor:
    """The distance of each feature (N,D) to its k-th nearest neighbour among them. (N,)"""
    if len(features) <= k:
        raise ValueError(f"precision and recall need more than {k} samples of each kind, got {len(features)}")
    return torch.cat([distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(chunk)])


def covered(points: Tensor, manifold: Tensor, radius: Tensor, chunk: int = 1024) -> float:
    """The share of points (N,D) within the radius (M,) of some point of a manifold (M,D)."""
    near = [(distances(part, manifold) <= radius).any(1) for part in points.split(chunk)]
    return torch.cat(near).double().mean().item()


def precision_recall(real: Tensor, real_radius: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    r"""Improved precision and recall of features (N,D), (M,D) (Kynkaanniemi et al. 2019).

    Precision is the share of ``fake`` within the ball of some point of ``real`` that reaches to its k-th neighbour
    (``real_radius`` (N,), of :func:`neighbour_radius`); recall the reverse.
    """
    return covered(fake, real, real_radius), covered(real, fake, neighbour_radius(fake, k))


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
