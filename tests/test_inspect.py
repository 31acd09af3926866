"""Statistics against independent formulas; alignment against a known permutation."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture
from gmflow_core.inspect import (
    align, dominance, dominant_component, effective_components, hypotheses, mean_weights, rank, spread, weight_entropy,
)


def mixture(rng, b=2, k=4, c=3, size=(5, 6), spread=1.0) -> GaussianMixture:
    return GaussianMixture.from_logits(
        torch.randn(b, k, c, *size, generator=rng), spread * torch.randn(b, k, 1, *size, generator=rng),
        torch.randn(b, 1, 1, *(1,) * len(size), generator=rng),
    )


def test_entropy_is_that_of_a_categorical(rng):
    mix = mixture(rng)
    expected = torch.distributions.Categorical(probs=mix.weights.squeeze(2).movedim(1, -1)).entropy() / math.log(2)
    torch.testing.assert_close(weight_entropy(mix), expected)
    torch.testing.assert_close(effective_components(mix), 2**expected)


def test_entropy_at_its_ends():
    means, log_std = torch.zeros(1, 8, 3, 2, 2), torch.zeros(1, 1, 1, 1, 1)
    even = GaussianMixture.from_logits(means, torch.zeros(1, 8, 1, 2, 2), log_std)
    one = torch.full((1, 8, 1, 2, 2), -math.inf)
    one[:, 3] = 0
    decided = GaussianMixture(means, one, log_std)
    assert weight_entropy(even) == pytest.approx(torch.full((1, 2, 2), 3.0))
    assert weight_entropy(decided) == pytest.approx(torch.zeros(1, 2, 2))
    assert (dominant_component(decided) == 3).all() and dominance(decided)[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_mean_weights_and_spread(rng):
    mix = mixture(rng)
    torch.testing.assert_close(mean_weights(mix).sum(1), torch.ones(2))
    parts = spread(mix)
    torch.testing.assert_close(parts.total**2, parts.within**2 + parts.between**2)
    w = mix.weights.double()
    m = (w * mix.means).sum(1, keepdim=True)
    between = (w * (mix.means - m) ** 2).sum(1).mean(1)
    torch.testing.assert_close(parts.between.double() ** 2, between, rtol=1e-4, atol=1e-6)


def test_rank_sorts_by_weight(rng):
    ranked = rank(mixture(rng))
    assert (ranked.log_weights.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("arrange", [align, rank])
def test_reordering_leaves_the_density_alone(rng, arrange):
    mix = mixture(rng)
    x = torch.randn(2, 3, 5, 6, generator=rng)
    torch.testing.assert_close(arrange(mix).log_prob(x), mix.log_prob(x))


def test_align_undoes_a_permutation_per_pixel(rng):
    """Four flat hypotheses, shuffled at every pixel, come back flat."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pixels = 64
    order = torch.stack([torch.randperm(4, generator=rng) for _ in range(pixels)])           # (S,K)
    means = colours[order] + 0.05 * torch.randn(pixels, 4, 3, generator=rng)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])[order]
    mix = GaussianMixture.from_logits(
        means.permute(1, 2, 0).reshape(1, 4, 3, 8, 8), weights.log().T.reshape(1, 4, 1, 8, 8), torch.zeros(1, 1, 1, 1, 1)
    )
    aligned = align(mix)
    assert aligned.means.flatten(3).std(-1).max() < 0.08  # raw: about 0.4
    torch.testing.assert_close(mean_weights(aligned)[0], torch.tensor([0.4, 0.3, 0.2, 0.1]))


def test_hypotheses_keep_the_mean_of_every_pixel(rng):
    mix = mixture(rng, k=6)
    coarse = hypotheses(mix, 3)
    assert coarse.components == 3
    torch.testing.assert_close(coarse.weights.sum(1), torch.ones(2, 1, 5, 6))
    torch.testing.assert_close(coarse.mean(), mix.mean(), rtol=1e-4, atol=1e-5)
