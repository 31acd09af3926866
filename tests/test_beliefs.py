"""Statistics against independent formulas; alignment against a known permutation."""

import math

import pytest
import torch

from gmflow_core import GaussianMixture
from gmflow_core.inspection.beliefs import (
    _match,
    align,
    dominance,
    dominant_component,
    effective_components,
    follow,
    hypotheses,
    mean_weights,
    rank,
    regions,
    reorder,
    spread,
    weight_entropy,
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
        means.permute(1, 2, 0).reshape(1, 4, 3, 8, 8), weights.log().T.reshape(1, 4, 1, 8, 8),
        torch.zeros(1, 1, 1, 1, 1)
    )
    aligned = align(mix)
    assert aligned.means.flatten(3).std(-1).max() < 0.08  # raw: about 0.4
    torch.testing.assert_close(mean_weights(aligned)[0], torch.tensor([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_matching_takes_the_nearest_pairs_first(rng, k):
    """Against the plain way: sort all pairs of a pixel by distance, take each whose ends are still free."""
    means, targets = torch.randn(30, k, 3, generator=rng), torch.randn(30, k, 3, generator=rng)
    targets[0], means[1] = 0.0, means[1, :1]  # ties: any order will do, but it must be one
    found = _match(means, targets)
    assert torch.equal(found.sort(1).values, torch.arange(k).expand(30, k))
    for pixel in range(2, 30):
        distance = torch.cdist(means[pixel], targets[pixel], compute_mode="donot_use_mm_for_euclid_dist")
        expected = {}
        for pair in distance.flatten().argsort().tolist():
            component, target = divmod(pair, k)
            if target not in expected and component not in expected.values():
                expected[target] = component
        assert found[pixel].tolist() == [expected[target] for target in range(k)]


def test_hypotheses_keep_the_mean_of_every_pixel(rng):
    mix = mixture(rng, k=6)
    coarse = hypotheses(mix, 3)
    assert coarse.components == 3
    torch.testing.assert_close(coarse.weights.sum(1), torch.ones(2, 1, 5, 6))
    torch.testing.assert_close(coarse.mean(), mix.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, k", [(128, 8), (64, 64), (128, 64)])
def test_regions_see_every_part_of_a_large_image(size, k):
    """A stripe of 11 % of the columns has hypotheses of its own, whatever the width."""
    colours = torch.tensor([[0.8, -0.6, -0.6], [0.5, -0.6, -0.6], [-0.7, 0.8, -0.6], [-0.7, -0.6, 0.9]])
    column, first = torch.arange(size), torch.arange(k) % 2 == 0
    striped = (column >= 0.38 * size) & (column < 0.49 * size)
    means = torch.where(striped[None, :, None], colours[2:][torch.arange(k) % 2][:, None],
                        colours[:2][torch.arange(k) % 2][:, None])
    means = means.movedim(2, 1)[None, :, :, None, :].expand(1, k, 3, size, size)
    logits = torch.where(first, math.log(0.9), math.log(0.1))[None, :, None, None, None].expand(1, k, 1, size, size)
    found = regions(GaussianMixture.from_logits(means, logits, torch.zeros(1, 1, 1, 1, 1)), 4)[0]
    share = striped.float().mean()
    weights = [0.9 * (1 - share), 0.1 * (1 - share), 0.9 * share, 0.1 * share]
    true = sorted(zip(weights, colours.tolist(), strict=True), reverse=True)
    # And by falling weight.
    torch.testing.assert_close(found, torch.tensor([colour for _, colour in true]), atol=1e-3, rtol=0)


# ---- across steps ------------------------------------------------------------------------------

def drifting(rng, steps=12, k=5, size=8):
    """Components that move together, far, and each most of the way to the next one's first place:
    (in order, shuffled at every pixel)."""
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[:k]
    texture = 0.05 * torch.randn(1, k, 3, size, size, generator=rng)
    share = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])[:k]
    true, shuffled = [], []
    for i in range(steps):
        means = torch.lerp(colours, colours.roll(-1, 0), 0.9 * i / (steps - 1)) + 2.0 * i
        logits = (share.log() * (1 + 0.3 * i))[None, :, None, None, None].expand(1, k, 1, size, size)
        mix = GaussianMixture.from_logits(means[None, :, :, None, None] + texture, logits, torch.zeros(1, 1, 1, 1, 1))
        order = torch.rand(mix.log_weights.shape, generator=rng).argsort(1)
        true.append(mix)
        shuffled.append(reorder(mix, order))
    return true, shuffled


def test_follow_undoes_the_shuffles_of_a_drifting_mixture(rng):
    true, shuffled = drifting(rng)
    aligned = align(shuffled[0])
    assert torch.equal(aligned.means, true[0].means)  # by falling weight, as it was made
    for mix, expected in zip(shuffled[1:], true[1:], strict=True):
        aligned = follow(mix, aligned)
        assert torch.equal(aligned.means, expected.means) and torch.equal(aligned.log_weights, expected.log_weights)
    assert not torch.equal(align(shuffled[-1]).means, shuffled[-1].means)  # there was something to undo


def test_follow_needs_the_step_before(rng):
    """In one leap each component is nearer to another one's place: nothing can tell them apart then."""
    true, shuffled = drifting(rng)
    assert not torch.equal(follow(shuffled[-1], true[0]).means, true[-1].means)


def test_hypotheses_are_the_same_regions_at_every_step():
    """Two inks, of which the second is given up: its weight falls to zero and the first keeps its number."""
    ink, other = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    early = torch.stack([ink, other, ink + 0.1, other + 0.1])
    late = torch.stack([ink + 0.1, ink, ink, ink + 0.2])
    build = lambda means, w: GaussianMixture(  # noqa: E731
        means.reshape(1, 4, 3, 1, 1).expand(1, 4, 3, 2, 2),
        torch.tensor(w).log().reshape(1, 4, 1, 1, 1).expand(1, 4, 1, 2, 2),
        torch.zeros(1, 1, 1, 1, 1),
    )
    first, last = build(early, [0.4, 0.2, 0.2, 0.2]), build(late, [0.1, 0.2, 0.3, 0.4])
    centres = regions(first, 2)
    torch.testing.assert_close(centres[0, 0], ink + 0.1 / 3)
    torch.testing.assert_close(mean_weights(hypotheses(first, 2, centres)), torch.tensor([[0.6, 0.4]]))
    given_up = hypotheses(last, 2, centres)
    torch.testing.assert_close(mean_weights(given_up), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(given_up.mean(), last.mean())
    assert mean_weights(hypotheses(last, 2))[0, 1] > 0.05  # its own clusters would split the ink that is left
