r"""What a mixture believes: statistics per pixel, and an alignment that makes components comparable across pixels.

Components are exchangeable pixel by pixel: component k of two neighbours need not be the same
hypothesis. :func:`align` orders every pixel's components by one clustering of all of them, and
:func:`follow` keeps that order from step to step.
Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixture import GaussianFactor, GaussianMixture, Mixture

# Pixels of a clustering: enough for a picture, whatever its size.
MAX_PIXELS = 1024
# Distances that are computed at a time.
BLOCK = 2**22


def weight_entropy(mixture: Mixture) -> Tensor:
    r"""-sum_k w_k log2 w_k in bits, from 0 (decided) to log2 K: (B,*S)."""
    nats = (0 - torch.special.xlogy(mixture.weights, mixture.weights).sum(1).squeeze(1)).clamp(min=0)  # never -0
    return nats / torch.log(torch.tensor(2.0)).to(nats)


def effective_components(mixture: Mixture) -> Tensor:
    r"""2^entropy, the number of equally weighted components of that entropy, 1 to K: (B,*S)."""
    return torch.exp2(weight_entropy(mixture))


def dominant_component(mixture: Mixture) -> Tensor:
    """Index of the heaviest component, int64 (B,*S)."""
    return mixture.log_weights.argmax(1).squeeze(1)


def dominance(mixture: Mixture) -> Tensor:
    """Share of pixels in which each component is the heaviest, (B,K)."""
    winners = torch.nn.functional.one_hot(dominant_component(mixture).flatten(1), mixture.components)
    return winners.float().mean(1)


def mean_weights(mixture: Mixture) -> Tensor:
    """Weight of each component averaged over space, (B,K)."""
    return mixture.weights.flatten(2).mean(2)


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviation of a pixel, per channel: within components, between them, and in all. (B,*S)"""

    within: Tensor
    between: Tensor
    total: Tensor


def spread(mixture: Mixture) -> Spread:
    r"""total^2 = within^2 + between^2, between^2 = sum_k w_k |mean_k - m|^2 / C."""
    total = mixture.moments().var.squeeze(1)
    within = mixture.var.squeeze(1).expand_as(total)
    return Spread(within.sqrt(), (total - within).clamp(min=0).sqrt(), total.sqrt())


def mean_shift(mixture: Mixture, other: Mixture) -> Tensor:
    """How far apart two means are at a pixel, root mean square over channels: (B,*S)."""
    return (mixture.mean() - other.mean()).square().mean(1).sqrt()


def tilt_divergence(mixture: Mixture, factor: GaussianFactor) -> Tensor:
    r"""KL(p tilted || p) of a mixture p and a tilt f(x) = exp(h.x - lambda |x|^2/2), in nats, exactly: (B,*S).

        KL = E[log f] - log Z under the tilted p, Z = sum_k w_k (1 + lambda v)^(-C/2)
             exp((h.mean_k - lambda |mean_k|^2/2 + v |h|^2/2) / (1 + lambda v))
    """
    tilted, v = mixture.tilt(factor), mixture.var                               # v (B,1,*1|*S)
    h, precision, c = factor.shift, factor.precision, mixture.channels
    shrink = (1 + precision * v).reciprocal()
    dot = (mixture.means * h.unsqueeze(1)).sum(2, keepdim=True)                 # (B,K,1,*S)
    square = mixture.means.square().sum(2, keepdim=True)
    own = (0.5 * v * h.square()).sum(1, keepdim=True).unsqueeze(1)
    exponent = (dot - 0.5 * precision.unsqueeze(1) * square + own) * shrink.unsqueeze(1)
    log_z = (mixture.log_weights + exponent).logsumexp(1) + 0.5 * c * shrink.log()
    second = (tilted.weights * tilted.means.square().sum(2, keepdim=True)).sum(1) + c * tilted.var
    expected = (h * tilted.mean()).sum(1, keepdim=True) - 0.5 * precision * second
    return (expected - log_z).squeeze(1)


def reorder(mixture: Mixture, permutation: Tensor) -> GaussianMixture:
    """Permute each pixel's components: new component j is old component permutation[:, j]. (B,K,1,*S)."""
    means = mixture.means.gather(1, permutation.expand_as(mixture.means))
    return GaussianMixture(means, mixture.log_weights.gather(1, permutation), mixture.log_std)


def rank(mixture: Mixture) -> GaussianMixture:
    """Each pixel's components by falling weight."""
    return reorder(mixture, mixture.log_weights.argsort(dim=1, descending=True))


def align(mixture: Mixture, iterations: int = 20) -> GaussianMixture:
    """Order every pixel's components so that component k is one hypothesis over the whole image.

    Per image: the clusters of :func:`regions`, one for each component; then each pixel's K components
    are matched one to one with them, nearest pairs first. The mixture itself is unchanged at every pixel.
    """
    permutation = _permutation(_points(mixture.means), regions(mixture, mixture.components, iterations).unsqueeze(1))
    return reorder(mixture, permutation.reshape(mixture.log_weights.shape))


def follow(mixture: Mixture, previous: Mixture) -> GaussianMixture:
    """Order the components of a step as those of the step before it, so that component k stays itself.

    At every pixel the K components are matched one to one with the K of ``previous``, nearest means first,
    after each of the two sets is centred: what all components of a pixel move by together does not matter,
    nor the network's permutation. What each moves by itself should be less than half its distance to the others.
    """
    centred = lambda m: m.means - m.means.mean(1, keepdim=True)  # noqa: E731
    permutation = _permutation(_points(centred(mixture)), _points(centred(previous)))
    return reorder(mixture, permutation.reshape(mixture.log_weights.shape))


def regions(mixture: Mixture, count: int, iterations: int = 20) -> Tensor:
    """What the hypotheses of an image are: centres (B,count,C) in x_0 space, by falling weight.

    Per image, a weighted k-means over all pixels' component means, started from farthest points.
    """
    return torch.stack([cluster(m, w, count, iterations) for m, w in zip(*_flat(mixture), strict=True)])


def hypotheses(mixture: Mixture, count: int, centres: Tensor | None = None) -> GaussianMixture:
    """At most ``count`` hypotheses of the whole image: a coarser mixture, for pictures.

    A pixel's components go each to the nearest centre: those that share one are merged (weights add,
    means average), and a centre that got none has weight zero there and itself as its mean. The mean of
    every pixel is unchanged. ``centres`` are the mixture's own :func:`regions` if None; those of a
    trajectory's first step make hypothesis k the same region of x_0 space at every step, so that its
    weight tells whether the model still believes it.
    """
    b, _, c, *space = mixture.means.shape
    centres = regions(mixture, count) if centres is None else centres
    merged = [_merge(m, w, centre) for m, w, centre in zip(*_flat(mixture), centres, strict=True)]
    means, weights = (torch.stack(x).movedim(1, -1) for x in zip(*merged, strict=True))      # (B,N,C,S), (B,N,S)
    return GaussianMixture(
        means.reshape(b, count, c, *space), weights.log().reshape(b, count, 1, *space), mixture.log_std
    )


def _points(means: Tensor) -> Tensor:
    """(B,K,C,*S) to (B,S,K,C)."""
    return means.flatten(3).movedim(-1, 1)


def _flat(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Means (B,S,K,C) and weights (B,S,K)."""
    return _points(mixture.means), mixture.weights.flatten(2).movedim(-1, 1)


def _permutation(points: Tensor, targets: Tensor) -> Tensor:
    """permutation (B,K,S): which of a pixel's points (B,S,K,C) goes to each of the targets (B,S|1,K,C)."""
    block = max(1, BLOCK // points.shape[2] ** 2)                               # of pixels, for memory
    permutation = [
        torch.cat([_match(*pair) for pair in zip(p.split(block), t.expand_as(p).split(block), strict=True)])
        for p, t in zip(points, targets, strict=True)
    ]
    return torch.stack(permutation).movedim(1, -1)


def _match(means: Tensor, targets: Tensor) -> Tensor:
    """permutation (S,K): which of a pixel's components (S,K,C) goes to each target (S,K,C), one to one, nearest
    pairs first.

    A pair that is each other's nearest is never taken apart by a nearer one: all such pairs are taken at once.
    """
    distance = _distances(means, targets)                                       # (S,component,target)
    permutation = torch.zeros(means.shape[:2], dtype=torch.int64, device=means.device)
    each = torch.arange(means.shape[1], device=means.device)
    left, todo = torch.arange(len(means), device=means.device), torch.full_like(permutation[:, 0], means.shape[1])
    while True:
        gap, suitor = distance.min(1)                                           # (S,target)
        mutual = (distance.argmin(2).gather(1, suitor) == each) & gap.isfinite()
        pixel, target = mutual.nonzero(as_tuple=True)
        if len(pixel) == 0:
            return permutation
        component = suitor[pixel, target]
        permutation[left[pixel], target] = component
        distance[pixel, component] = torch.inf
        distance[pixel, :, target] = torch.inf
        todo = todo - mutual.sum(1)
        if (todo > 0).sum() < 0.7 * len(left):                                  # go on with what is not done
            distance, left, todo = distance[todo > 0], left[todo > 0], todo[todo > 0]


def _merge(means: Tensor, weights: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a pixel's components (S,K,C), (S,K) by nearest centre (N,C): means (S,N,C), weights (S,N)."""
    label = nearest(means, centres)                                             # (S,K)
    share = torch.nn.functional.one_hot(label, len(centres)) * weights.unsqueeze(-1)
    total = share.sum(1)                                                        # (S,N)
    merged = (share.mT @ means) / total.unsqueeze(-1)
    return torch.where(total.unsqueeze(-1) > 0, merged, centres), total


def cluster(means: Tensor, weights: Tensor, count: int, iterations: int = 20) -> Tensor:
    """Centres (count,C) of a weighted k-means of (S,K,C) points with weights (S,K), by falling weight of all pixels.

    Started from farthest points: each next centre is the point of largest weighted squared distance.
    Of more than MAX_PIXELS pixels so many are drawn at random, the same every time.
    """
    drawn = torch.randperm(len(means), generator=torch.Generator().manual_seed(0))[:MAX_PIXELS].to(means.device)
    points, mass = means[drawn].flatten(0, 1), weights[drawn].flatten()
    centres = ((mass[:, None] * points).sum(0) / mass.sum())[None]
    for i in range(count):
        gap = _distances(points, centres).amin(1)
        new = points[(gap.square() * mass).argmax()][None]
        centres = new if i == 0 else torch.cat([centres, new])
    for _ in range(iterations):
        label = nearest(points, centres)
        shares = mass.new_zeros(count).index_add_(0, label, mass)
        total = torch.zeros_like(centres).index_add_(0, label, mass[:, None] * points)
        centres = torch.where(shares[:, None] > 0, total / shares[:, None], centres)
    shares = weights.new_zeros(count).index_add_(0, nearest(means, centres).flatten(), weights.flatten())
    return centres[shares.argsort(descending=True, stable=True)]


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Which of the centres (N,C) is nearest to each point (...,C)."""
    blocks = points.flatten(0, -2).split(max(1, BLOCK // len(centres)))
    return torch.cat([_distances(block, centres).argmin(1) for block in blocks]).reshape(points.shape[:-1])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (...,N,C) and (...,M,C) to (...,N,M), without the matrix product that rounds small ones to nothing."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
