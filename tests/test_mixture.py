"""Isotropic mixtures against torch.distributions, an exact prior and recorded numbers."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import ExactPrior, as_distribution, log_density, projected_cdf, random_mixture
from recorded import assert_close, assert_same_mixture, load, mixture
from scipy.stats import kstest

from gmflow_core import Gaussian, GaussianFactor, GaussianMixture, reanchor

SPACES = [(), (5,), (3, 4), (2, 3, 2)]
# (K, C) on both sides of 16, where sums over K change from a loop to one product.
SIZES = [(1, 1), (4, 3), (20, 3), (4, 20), (17, 17)]

spaces = pytest.mark.parametrize("space", SPACES, ids=str)
sizes = pytest.mark.parametrize("k, c", SIZES)


def random_factor(rng, mixture, low=-0.5, high=2.0):
    """lambda v uniform in (low, high), so that 1 + lambda v > 0; h a standard normal."""
    b, _, c, *space = mixture.means.shape
    relative = low + (high - low) * torch.rand((b, 1) + (1,) * len(space), generator=rng, dtype=torch.float64)
    return GaussianFactor(relative / mixture.var, torch.randn((b, c, *space), generator=rng, dtype=torch.float64))


def log_factor(factor, x):
    return ((factor.shift * x) - 0.5 * factor.precision * x.square()).sum(1)


@spaces
@sizes
def test_log_prob_is_that_of_torch_distributions(rng, k, c, space):
    m = random_mixture(rng, k=k, c=c, space=space)
    x = 2 * torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(m.log_prob(x), log_density(m, x), rtol=1e-12, atol=1e-12)


@spaces
@sizes
def test_moments_are_those_of_torch_distributions(rng, k, c, space):
    m = random_mixture(rng, k=k, c=c, space=space)
    d = as_distribution(m)
    moments = m.moments()
    torch.testing.assert_close(m.mean(), d.mean.movedim(-1, 1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moments.mean, m.mean())
    assert moments.var.shape == (2, 1, *space)
    torch.testing.assert_close(moments.var.squeeze(1), d.variance.mean(-1), rtol=1e-12, atol=0)


@spaces
@sizes
def test_covariance_by_hand(rng, k, c, space):
    m = random_mixture(rng, k=k, c=c, space=space)
    w, mu = m.weights.reshape(2, k, -1), m.means.reshape(2, k, c, -1)
    mean = torch.einsum("bks,bkcs->bcs", w, mu)
    second = torch.einsum("bks,bkcs,bkds->bcds", w, mu, mu) - torch.einsum("bcs,bds->bcds", mean, mean)
    expected = second.mean(-1) + torch.eye(c, dtype=torch.float64) * m.log_std.reshape(2, 1, 1).mul(2).exp()
    torch.testing.assert_close(m.covariance(), expected, rtol=1e-11, atol=1e-12)


def test_responsibilities_by_bayes(rng):
    m = random_mixture(rng, k=5)
    x = torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    d = as_distribution(m)
    joint = d.mixture_distribution.probs * d.component_distribution.log_prob(x.movedim(1, -1).unsqueeze(-2)).exp()
    expected = (joint / joint.sum(-1, keepdim=True)).movedim(-1, 1).unsqueeze(2)
    torch.testing.assert_close(m.responsibilities(x), expected)


def test_samples_have_the_mixtures_distribution(rng):
    """20000 draws in three directions. KS at p < 1e-3 sees a CDF wrong by 0.014: a weight off by
    0.02, a std off by 5 %."""
    one = random_mixture(rng, b=1, k=3, c=3, space=(), spread=2.0)
    m = one.map(lambda t: t[..., None].expand(*t.shape, 20_000 if t is not one.log_std else 1))
    x = m.sample(rng)[0].T
    for direction in torch.eye(3, dtype=torch.float64).unbind() + (torch.ones(3, dtype=torch.float64),):
        assert kstest((x @ direction).numpy(), projected_cdf(m, direction)).pvalue > 1e-3


def test_sample_repeats_with_its_generator(rng):
    m = random_mixture(rng)
    first, second = (m.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


# ---- tilt ------------------------------------------------------------------------------------------


@spaces
@sizes
def test_tilt_multiplies_the_density(rng, k, c, space):
    """log p_tilted - log p - log factor is one constant per pixel, whatever x is."""
    m = random_mixture(rng, k=k, c=c, space=space)
    factor = random_factor(rng, m)
    tilted = m.tilt(factor)
    constants = []
    for _ in range(4):
        x = 2 * torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
        constants.append(log_density(tilted, x) - log_density(m, x) - log_factor(factor, x))
    spread = torch.stack(constants).std(0)
    assert spread.max() < 1e-10
    torch.testing.assert_close(tilted.weights.sum(1), torch.ones_like(tilted.weights[:, 0]))


@spaces
@sizes
def test_tilted_mean_is_the_mean_of_the_tilt(rng, k, c, space):
    m = random_mixture(rng, k=k, c=c, space=space)
    factor = random_factor(rng, m)
    expected = as_distribution(m.tilt(factor)).mean.movedim(-1, 1)
    torch.testing.assert_close(m.tilted_mean(factor), expected, rtol=1e-11, atol=1e-12)


def tilted_by_hand(m, factor):
    """The three tensors of the tilt in double loops over components and channels: by the equations, nothing shared."""
    v, precision = m.log_std.mul(2).exp().squeeze((1, 2)), factor.precision.squeeze(1)            # (B,*1)
    shrink = 1 / (1 + precision * v)
    means, logits = torch.empty_like(m.means), torch.empty_like(m.log_weights)
    for k in range(m.components):
        exponent = torch.zeros_like(m.log_weights[:, 0, 0])
        for c in range(m.channels):
            mean, h = m.means[:, k, c], factor.shift[:, c]
            means[:, k, c] = (mean + v * h) * shrink
            exponent = exponent + (h * mean - 0.5 * precision * mean**2) * shrink
        logits[:, k, 0] = m.log_weights[:, k, 0] + exponent
    return GaussianMixture.from_logits(means, logits, 0.5 * (v * shrink).log()[:, None, None])


@spaces
@sizes
def test_tilt_by_hand(rng, k, c, space):
    m = random_mixture(rng, k=k, c=c, space=space)
    factor = random_factor(rng, m)
    got, expected = m.tilt(factor), tilted_by_hand(m, factor)
    assert (got.components, got.channels) == (k, c)
    for name in ("means", "log_weights", "log_std", "weights"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.mean(), expected.mean())
    torch.testing.assert_close(got.moments().var, expected.moments().var)


def test_tilts_of_a_tilt_are_those_of_its_tensors(rng):
    """One factor kept and added to, against a mixture built anew from the tensors of each tilt."""
    m = random_mixture(rng)
    f, g, h = (random_factor(rng, m, low=0) for _ in range(3))
    expected = tilted_by_hand(tilted_by_hand(m, f), g)
    assert_same_mixture(m.tilt(f).tilt(g), expected, 1e-13)
    torch.testing.assert_close(m.tilt(f).tilted_mean(g), expected.mean())
    assert_same_mixture(m.tilt(f).tilt(g).temperature(0.5).tilt(h), tilted_by_hand(expected.temperature(0.5), h), 1e-13)


def test_values_can_be_replaced(rng):
    """A tilt is a value of two parts, a mixture of three tensors: a copy with another part is that part's own."""
    m, other = random_mixture(rng), random_mixture(rng)
    f, g = random_factor(rng, m, low=0), random_factor(rng, m, low=0)
    tilted = m.tilt(f)
    tilted.mean()  # what was worked out of the old parts does not come along
    assert_same_mixture(replace(tilted, factor=g), tilted_by_hand(m, g), 1e-13)
    assert_same_mixture(replace(tilted, base=other), tilted_by_hand(other, f), 1e-13)
    flat = replace(m, log_weights=torch.full_like(m.log_weights, -math.log(3)))
    torch.testing.assert_close(flat.mean(), m.means.mean(1))


def test_the_mean_of_a_tilt_needs_no_tilted_means(rng):
    m = random_mixture(rng)
    tilted = m.tilt(random_factor(rng, m)).tilt(random_factor(rng, m, low=0))
    tilted.mean()
    assert not {"means", "log_weights"} & set(vars(tilted)) and tilted.base is m


def test_a_tilt_may_pass_through_what_is_no_distribution(rng):
    """Dividing a likelihood out and another one in: between them 1 + lambda v is negative."""
    m = random_mixture(rng)
    f, g = random_factor(rng, m, low=2.0, high=3.0), random_factor(rng, m, low=2.0, high=3.0)
    assert_same_mixture(m.tilt(-f).tilt(f + g), m.tilt(g), 1e-12)


def read_everything(m, x):
    return m.mean().sum() + m.moments().var.sum() + m.log_prob(x).sum() + m.weights.square().sum() + m.log_std.sum()


@pytest.mark.parametrize("k, c", [(3, 2), (17, 3)])
def test_gradients_of_a_tilt(rng, k, c):
    """Of everything a mixture is asked for, to the base and the factor, by finite differences."""
    m = random_mixture(rng, b=1, k=k, c=c, space=(2,))
    f, x = random_factor(rng, m, low=0), torch.randn(1, c, 2, generator=rng, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (m.means, m.log_weights, m.log_std, f.precision, f.shift)]

    def tilted(means, log_weights, log_std, precision, shift):
        return read_everything(GaussianMixture(means, log_weights, log_std).tilt(GaussianFactor(precision, shift)), x)

    assert torch.autograd.gradcheck(tilted, inputs)


def test_what_was_read_without_a_gradient_is_not_kept_for_when_one_is_needed(rng):
    m = random_mixture(rng)
    factor, x = random_factor(rng, m), torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    means, shift = m.means.clone().requires_grad_(), factor.shift.clone().requires_grad_()

    def gradients(look_first):
        base = GaussianMixture(means, m.log_weights, m.log_std)
        tilted = base.tilt(GaussianFactor(factor.precision, shift))
        if look_first:
            with torch.no_grad():
                read_everything(tilted, x), read_everything(base, x)
        return torch.autograd.grad(read_everything(tilted, x) + read_everything(base, x), (means, shift))

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected)


def test_zero_factor_is_the_identity(rng):
    m = random_mixture(rng)
    zero = GaussianFactor(torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.zeros(2, 2, 3, 4, dtype=torch.float64))
    assert_same_mixture(m.tilt(zero), m, 1e-15)


def test_factors_add(rng):
    m = random_mixture(rng)
    f, g = random_factor(rng, m, low=0), random_factor(rng, m, low=0)
    assert_same_mixture(m.tilt(f).tilt(g), m.tilt(f + g), 1e-13)
    assert_same_mixture(m.tilt(f + g).tilt(GaussianFactor(-g.precision, -g.shift)), m.tilt(f), 1e-13)
    assert_same_mixture(m.tilt(f + g - f), m.tilt(g), 1e-13)


def test_a_tilt_takes_a_precision_per_pixel(rng):
    m = random_mixture(rng)
    factor = random_factor(rng, m)
    per_pixel = GaussianFactor(torch.rand(2, 1, 3, 4, generator=rng, dtype=torch.float64), factor.shift)
    got, tilted = m.tilted_mean(per_pixel), m.tilt(per_pixel)
    assert tilted.log_std.shape == (2, 1, 1, 3, 4)
    for i in range(3):
        for j in range(4):
            pixel = GaussianMixture(m.means[..., i, j], m.log_weights[..., i, j], m.log_std[..., 0, 0])
            alone = pixel.tilt(GaussianFactor(per_pixel.precision[..., i, j], per_pixel.shift[..., i, j]))
            torch.testing.assert_close(got[..., i, j], alone.mean())
            torch.testing.assert_close(tilted.log_std[..., i, j], alone.log_std)
            torch.testing.assert_close(tilted.log_weights[..., i, j], alone.log_weights)


def test_factor_of_a_gaussian(rng):
    mean = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    factor = Gaussian(mean, torch.full((2, 1, 1), 0.7, dtype=torch.float64)).factor()
    x, y = torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, math.sqrt(0.7))
    expected = (normal.log_prob(x) - normal.log_prob(y)).sum(1)
    torch.testing.assert_close(log_factor(factor, x) - log_factor(factor, y), expected)


@spaces
@pytest.mark.parametrize("source, target", [(0.95, 0.9), (0.9, 0.1), (0.5, 0.49), (0.3, 0.001), (1.0, 0.5)])
def test_reanchored_posterior_is_the_exact_one(rng, source, target, space):
    """q(x_0 | x_src) carried to x_tgt equals q(x_0 | x_tgt) computed from the prior itself."""
    prior = ExactPrior.example(channels=3)
    x_src, x_tgt = torch.randn(2, 2, 3, *space, generator=rng, dtype=torch.float64)
    moved = reanchor(prior.posterior(x_src, source), x_src, source, x_tgt, target)
    exact = prior.posterior(x_tgt, target)
    torch.testing.assert_close(moved.means, exact.means, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.log_std, exact.log_std, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.log_weights, exact.log_weights, rtol=1e-10, atol=1e-10)


# ---- temperature, construction ---------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_temperature_is_the_power_of_separated_components(rng, t):
    m = random_mixture(rng, k=3, c=2, space=(4,), spread=40.0, log_std=(-1.0, -1.0))
    x = m.means[:, 1] + 0.3 * torch.randn(2, 2, 4, generator=rng, dtype=torch.float64)
    y = m.means[:, 2] + 0.3 * torch.randn(2, 2, 4, generator=rng, dtype=torch.float64)
    got = m.temperature(t)
    ratio = log_density(got, x) - log_density(got, y)
    torch.testing.assert_close(ratio, (log_density(m, x) - log_density(m, y)) / t)
    torch.testing.assert_close(got.log_std, m.log_std + 0.5 * math.log(t))


def test_temperature_one_is_the_identity_and_others_must_be_positive(rng):
    m = random_mixture(rng)
    assert m.temperature(1.0) is m
    for t in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            m.temperature(t)


@pytest.mark.parametrize("bad", [
    dict(means=(2, 3)),
    dict(log_weights=(2, 3, 4, 4)),
    dict(log_weights=(2, 3, 1, 4, 5)),
    dict(log_std=(2, 1, 1, 4, 1)),
    dict(log_std=(2, 1, 3, 4, 4)),
    dict(log_std=(2, 3, 1, 4, 4)),
    dict(log_std=(2, 1, 1)),
])
def test_misshaped_tensors_are_refused(bad):
    shapes = dict(means=(2, 3, 4, 4, 4), log_weights=(2, 3, 1, 4, 4), log_std=(2, 1, 1, 1, 1)) | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        GaussianMixture(**{name: torch.zeros(shape) for name, shape in shapes.items()})


# ---- recorded numbers ------------------------------------------------------------------------------


def test_recorded_moments_and_density():
    r = load("gm_ops")
    m = mixture(r, "in.")
    assert_close(m.mean(), r["gm_to_mean"])
    assert_close(m.moments().mean, r["gm_to_iso_gaussian.mean"])
    assert_close(m.moments().var, r["gm_to_iso_gaussian.var"])
    assert_close(m.covariance(), r["gm_to_gaussian.cov"].mean((1, 2)))
    for i in range(3):
        assert_close(m.log_prob(r["in.samples3"][:, i]), r["gm_logprob"][:, i])


@pytest.mark.parametrize("name, first, second", [
    ("gm_mul_iso_gaussian.p1_1", 1.0, 0.0),
    ("gm_mul_iso_gaussian.p1_0.5", 0.5, 0.0),
    # g1 is the narrower one. Theirs clamps 1/v1 - 1/v2 from below where it is not; we do not.
    ("gm_mul_ratio", 1.0, -1.0),
])
def test_recorded_products(name, first, second):
    r = load("gm_ops")
    g1, g2 = (Gaussian(r[f"in.{g}_mean"], r[f"in.{g}_var"]).factor() for g in ("g1", "g2"))
    factor = GaussianFactor(first * g1.precision + second * g2.precision, first * g1.shift + second * g2.shift)
    assert_same_mixture(mixture(r, "in.").tilt(factor), mixture(r, name + "."))
