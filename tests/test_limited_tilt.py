"""The limited tilt: no pixel's mean moves further along the bias than asked, to first order.

Oracle: each pixel's covariance written out, and the exponential family's d m / d h = Sigma.
"""

import pytest
import torch
from oracle import ExactPrior, random_mixture

from gmflow_core import Checkpoint, Gaussian, GaussianMixture, GMDiT, GMDiTConfig, SecondOrder, reanchor
from gmflow_core.guidance import (
    biased_target,
    guide_probabilistic,
    limited_target,
    moment_anchor,
    tilt_toward,
    unguided,
)
from gmflow_core.model import LatentSpace
from gmflow_core.solver import SolverHistory, correct
from train.evaluate.gain import gain_of, measure_gains


def covariance(mixture):
    """Sigma of every pixel, (B,*S,C,C)."""
    offsets = mixture.means - (mixture.weights * mixture.means).sum(1, keepdim=True)
    between = torch.einsum("bkhw,bkchw,bkdhw->bhwcd", mixture.weights.squeeze(2), offsets, offsets)
    within = mixture.log_std.exp().square().reshape(-1, 1, 1, 1, 1)
    return between + within * torch.eye(mixture.channels, dtype=between.dtype)


def along(covariance, bias):
    return torch.einsum("bchw,bhwcd,bdhw->bhw", bias, covariance, bias)[:, None]


def dot(a, b):
    return (a * b).sum(1, keepdim=True)


@pytest.fixture
def case(rng):
    mixture = random_mixture(rng, b=2, k=4, c=3, log_std=(-3.0, -1.0))
    bias = torch.randn(mixture.mean().shape, generator=rng, dtype=torch.float64)
    return mixture, moment_anchor(mixture), bias


def test_variance_along_a_direction(case):
    mixture, _, bias = case
    torch.testing.assert_close(mixture.variance_along(bias), along(covariance(mixture), bias))


@pytest.mark.parametrize("tilt", ["published", "limited"])
def test_how_far_a_pixel_moves(case, tilt):
    """Published: by g times the bias; limited: by min(1, g) times. The bias is small: first order is all there is."""
    mixture, anchor, bias = case
    bias = 1e-6 * bias
    gain = along(covariance(mixture), bias) / (anchor.var * dot(bias, bias))
    assert gain.max() > 1.5 and gain.min() < 0.7  # both kinds of pixels are there
    target = Gaussian(anchor.mean + bias, anchor.var)
    if tilt == "limited":
        target, gain = limited_target(mixture, anchor, target), gain.clamp(max=1)
    moved = tilt_toward(mixture, anchor, target).mean() - mixture.mean()
    torch.testing.assert_close(dot(moved, bias) / dot(bias, bias), gain, rtol=1e-4, atol=0)


def test_the_variance_asked_for_stays(case):
    mixture, anchor, bias = case
    target = biased_target(anchor, bias)
    assert torch.equal(limited_target(mixture, anchor, target).var, target.var)


def test_a_pixel_without_a_bias_has_none(case):
    mixture, anchor, bias = case
    bias[:, :, 1, 2] = 0
    limited = limited_target(mixture, anchor, Gaussian(anchor.mean + bias, anchor.var))
    assert limited.mean.isfinite().all()
    assert torch.equal(limited.mean[:, :, 1, 2], anchor.mean[:, :, 1, 2])


def test_one_component_needs_no_limit(rng):
    """Sigma is v_c I everywhere: g is one."""
    mixture = random_mixture(rng, k=1)
    anchor = moment_anchor(mixture)
    target = biased_target(anchor, 0.3 * torch.randn(anchor.mean.shape, generator=rng, dtype=torch.float64))
    torch.testing.assert_close(limited_target(mixture, anchor, target).mean, target.mean, rtol=0, atol=1e-14)


def test_guidance_goes_toward_the_limited_target(rng):
    cond, uncond = random_mixture(rng), random_mixture(rng)
    published, limited = (guide_probabilistic(cond, uncond, 0.6, 0.5, tilt) for tilt in ("published", "limited"))
    wanted = limited_target(cond, published.anchor, published.target)
    torch.testing.assert_close(limited.target.mean, wanted.mean, rtol=0, atol=0)
    torch.testing.assert_close(limited.posterior.mean(), tilt_toward(cond, published.anchor, wanted).mean())
    assert torch.equal(limited.bias, published.bias)
    assert not torch.allclose(limited.target.mean, published.target.mean, atol=1e-3)


PRIOR = ExactPrior.example(channels=3)


def earlier(rng):
    """The x of an earlier step, and a posterior there that was wrong: a right one leaves nothing to correct."""
    x = torch.randn((2, 3, 4, 4), generator=rng, dtype=torch.float64)
    right = PRIOR.posterior(x, 0.8)
    return x, GaussianMixture(0.95 * right.means + 0.05, right.log_weights, right.log_std)


def previous_mean(rng):
    x, wrong = earlier(rng)
    return reanchor(wrong, x, 0.8, 0.8 * x, 0.6).mean()


def second_order(rng, options):
    """A step from sigma 0.6 to 0.4 after one from 0.8: (guided, corrected posterior, its target)."""
    x, wrong = earlier(rng)
    guided = unguided(PRIOR.posterior(0.8 * x, 0.6))
    return guided, *correct(guided, 0.8 * x, 0.6, 0.2, SolverHistory(wrong, x, 0.8, 0.2), options)


def test_the_correction_goes_toward_the_limited_target(rng):
    seed = rng.get_state()
    guided, _, published = second_order(rng, SecondOrder())
    rng.set_state(seed)
    _, posterior, target = second_order(rng, SecondOrder(tilt="limited"))
    wanted = limited_target(guided.base, guided.anchor, published)
    torch.testing.assert_close(target.mean, wanted.mean)
    torch.testing.assert_close(posterior.mean(), tilt_toward(guided.base, guided.anchor, wanted).mean())
    assert not torch.allclose(target.mean, published.mean, atol=1e-4)


def test_correction_steps_start_from_the_limited_tilt_and_limit_no_further(rng):
    """One round by hand: bias <- bias - (got - wanted) min(1, |bias|/|got|), and the published tilt toward that."""
    seed = rng.get_state()
    guided, start, target = second_order(rng, SecondOrder(tilt="limited", c_a=0))
    rng.set_state(seed)
    wanted = (guided.posterior.mean() - previous_mean(rng)) / 2
    bias, got = target.mean - guided.anchor.mean, start.mean() - guided.anchor.mean
    bias = bias - (got - wanted) * (bias.norm(dim=1) / got.norm(dim=1)).clamp(max=1)[:, None]
    rng.set_state(seed)
    _, posterior, _ = second_order(rng, SecondOrder(correction_steps=1, tilt="limited", c_a=0))
    expected = tilt_toward(guided.base, guided.anchor, biased_target(guided.anchor, bias))
    torch.testing.assert_close(posterior.mean(), expected.mean())


def test_other_names_are_refused(rng):
    with pytest.raises(ValueError, match="tilt must be one of published, limited, got 'soft'"):
        SecondOrder(tilt="soft")
    with pytest.raises(ValueError, match="tilt must be one of"):
        guide_probabilistic(random_mixture(rng), random_mixture(rng), 0.3, tilt="soft")


# ---- the measurement of the gain -----------------------------------------------------------------

def test_gain_of():
    bias = torch.tensor([[[1.0, 2.0]]])
    assert gain_of(3 * bias, bias) == pytest.approx(3)
    assert gain_of(torch.tensor([[[2.0, -1.0]]]), bias) == pytest.approx(0)  # across it


def test_gains_of_one_component_are_one():
    """With K = 1 the tilt moves every mean as far as asked, whatever it is called."""
    torch.manual_seed(0)
    config = GMDiTConfig(num_classes=3, num_gaussians=1, in_channels=3, sample_size=8, patch_size=4,
                         num_layers=1, num_heads=1, head_dim=16, logstd_width=8)
    model = GMDiT(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    checkpoint = Checkpoint(model, None, config, None, LatentSpace("rgb"))
    rows = measure_gains(checkpoint, 4, 5, 0.0, 0, "published").rows
    assert [sigma for sigma, _, _ in rows] == [0.75, 0.5, 0.25]
    for _, first_order, gains in rows:
        assert first_order == pytest.approx(1, abs=1e-4)
        assert gains["limited"] == pytest.approx(gains["published"], abs=1e-4)
        assert 0 < gains["published"] <= 1 + 1e-4  # less than one where v' is smaller than v_c
