r"""What a mixture believes: statistics per pixel, and an alignment that makes components comparable across pixels.

Components are exchangeable pixel by pixel: component k of two neighbours need not be the same
hypothesis. :func:`align` orders every pixel's components by one clustering of all of them.
Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mixture import GaussianMixture


def weight_entropy(mixture: GaussianMixture) -> Tensor:
    r"""-sum_k w_k log2 w_k in bits, from 0 (decided) to log2 K: (B,*S)."""
    nats = -torch.special.xlogy(mixture.weights, mixture.weights).sum(1).squeeze(1)
    return nats / torch.log(torch.tensor(2.0)).to(nats)


def effective_components(mixture: GaussianMixture) -> Tensor:
    r"""2^entropy, the number of equally weighted components of that entropy, 1 to K: (B,*S)."""
    return torch.exp2(weight_entropy(mixture))


def dominant_component(mixture: GaussianMixture) -> Tensor:
    """Index of the heaviest component, int64 (B,*S)."""
    return mixture.log_weights.argmax(1).squeeze(1)


def dominance(mixture: GaussianMixture) -> Tensor:
    """Share of pixels in which each component is the heaviest, (B,K)."""
    winners = torch.nn.functional.one_hot(dominant_component(mixture).flatten(1), mixture.components)
    return winners.float().mean(1)


def mean_weights(mixture: GaussianMixture) -> Tensor:
    """Weight of each component averaged over space, (B,K)."""
    return mixture.weights.flatten(2).mean(2)


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviation of a pixel, per channel: within components, between them, and in all. (B,*S)"""

    within: Tensor
    between: Tensor
    total: Tensor


def spread(mixture: GaussianMixture) -> Spread:
    r"""total^2 = within^2 + between^2, between^2 = sum_k w_k |mean_k - m|^2 / C."""
    total = mixture.moments().var.squeeze(1)
    within = mixture.var.squeeze(1).expand_as(total)
    return Spread(within.sqrt(), (total - within).clamp(min=0).sqrt(), total.sqrt())


def reorder(mixture: GaussianMixture, order: Tensor) -> GaussianMixture:
    """Permute each pixel's components: new component j is old component order[:, j]. order (B,K,1,*S)."""
    means = mixture.means.gather(1, order.expand_as(mixture.means))
    return GaussianMixture(means, mixture.log_weights.gather(1, order), mixture.log_std)


def rank(mixture: GaussianMixture) -> GaussianMixture:
    """Each pixel's components by falling weight."""
    return reorder(mixture, mixture.log_weights.argsort(dim=1, descending=True))


def align(mixture: GaussianMixture, iterations: int = 20) -> GaussianMixture:
    """Order every pixel's components so that component k is one hypothesis over the whole image.

    Per image: a weighted k-means over all pixels' component means, started from a greedy farthest-point
    choice; then each pixel's K components are matched one to one with the K clusters, nearest pairs
    first. Clusters come by falling total weight. The mixture itself is unchanged at every pixel.
    """
    b, k, c, *space = mixture.means.shape
    means = mixture.means.flatten(3).movedim(-1, 1)                             # (B,S,K,C)
    weights = mixture.weights.flatten(2).movedim(-1, 1)                         # (B,S,K)
    order = torch.stack([_align_image(m, w, iterations) for m, w in zip(means, weights)])
    return reorder(mixture, order.movedim(1, -1).reshape(b, k, 1, *space))


def _align_image(means: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """order (S,K) of one image's means (S,K,C) and weights (S,K)."""
    k = means.shape[1]
    centres = _cluster(means.flatten(0, 1), weights.flatten(), k, iterations)
    distance = (means.unsqueeze(2) - centres).square().sum(-1)                  # (S,component,cluster)
    order = torch.zeros(means.shape[:2], dtype=torch.int64, device=means.device)
    rows = torch.arange(len(means), device=means.device)
    for _ in range(k):
        nearest = distance.flatten(1).argmin(1)
        component, cluster = nearest // k, nearest % k
        order[rows, cluster] = component
        distance[rows, component] = torch.inf
        distance[rows, :, cluster] = torch.inf
    return order


def _cluster(points: Tensor, weights: Tensor, k: int, iterations: int) -> Tensor:
    """Centres (k,C) of a weighted k-means of points (N,C), by falling weight."""
    chosen = [(weights[:, None] * points).sum(0) / weights.sum()]
    chosen = [points[(points - chosen[0]).square().sum(1).mul(weights).argmax()]]
    for _ in range(k - 1):
        gap = torch.cdist(points, torch.stack(chosen)).amin(1)
        chosen.append(points[(gap.square() * weights).argmax()])
    centres = torch.stack(chosen)
    for _ in range(iterations):
        label = torch.cdist(points, centres).argmin(1)
        mass = torch.zeros(k).to(points).index_add_(0, label, weights)
        total = torch.zeros_like(centres).index_add_(0, label, weights[:, None] * points)
        centres = torch.where(mass[:, None] > 0, total / mass[:, None], centres)
    return centres[mass.argsort(descending=True)]
