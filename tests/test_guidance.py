"""Probabilistic guidance and vanilla CFG: closed forms, limits and recorded numbers."""

import math
from operator import itemgetter, methodcaller

import pytest
import torch
from oracle import as_distribution, log_density, random_mixture
from recorded import assert_close, assert_same_mixture, load, mixture

from gmflow_core import GaussianMixture, guide_cfg, guide_probabilistic, probabilistic_guidance, unguided
from gmflow_core.guidance import biased_target, guidance_bias, moment_anchor, tilt_toward

scales = pytest.mark.parametrize("scale", [0.02, 0.45, 0.95])
orthogonals = pytest.mark.parametrize("orthogonal", [0.0, 0.5, 1.0])


def pair(rng, **kwargs):
    return random_mixture(rng, **kwargs), random_mixture(rng, **kwargs)


def inner(a, b):
    return (a * b).flatten(1).sum(1)


# ---- recorded numbers ------------------------------------------------------------------------------


def recorded_pair():
    r = load("gm_ops")
    uncond = GaussianMixture(r["in.uncond_means"], r["in.uncond_logweights"], r["in.uncond_logstds"])
    return r, mixture(r, "in."), uncond


@pytest.mark.parametrize("scale, orthogonal", [(0.05, 0.5), (0.45, 0.0), (0.45, 1.0), (0.95, 1.0)])
def test_recorded_guidance(scale, orthogonal):
    r, cond, uncond = recorded_pair()
    got = guide_probabilistic(cond, uncond, scale, orthogonal)
    name = f"guidance.s{scale}.orth{orthogonal}."
    assert_close(got.anchor.mean, r["guidance.gaussian_cond.mean"], 1e-6)
    assert_close(got.anchor.var, r["guidance.gaussian_cond.var"], 1e-6)
    assert_close(got.bias, r[name + "bias"], 2e-6)
    assert_close(got.anchor.var * (1 - scale**2), r[name + "gaussian.var"], 1e-6)
    assert_same_mixture(got.posterior, mixture(r, name + "gm_out."), 2e-6)
    assert got.scale == scale and got.base is cond


# ---- laws ------------------------------------------------------------------------------------------


def test_scale_zero_is_the_conditional_itself(rng):
    cond, uncond = pair(rng)
    got = guide_probabilistic(cond, uncond, 0.0)
    assert got.posterior is cond and got.base is cond and got.bias is None and got.scale == 0
    assert probabilistic_guidance(cond, uncond, 0.0) is cond


@scales
@orthogonals
def test_bias_by_hand(rng, scale, orthogonal):
    """bias = w sqrt(v_c / mean(d^2)) d, in plain sums per sample: its power is w^2 v_c."""
    cond, uncond = pair(rng, c=3)
    m_c, m_u = cond.mean(), uncond.mean()
    for b in range(2):
        offsets = cond.means[b] - m_c[b]
        v_c = (cond.weights[b] * offsets.square()).sum(0).mean() + cond.var[b].mean()
        d = m_c[b] - m_u[b]
        d = d - orthogonal * (d * m_c[b]).sum() / m_c[b].square().sum() * m_c[b]
        expected = scale * (v_c / d.square().mean()).sqrt() * d
        got = guide_probabilistic(cond, uncond, scale, orthogonal)
        torch.testing.assert_close(got.bias[b], expected)
        torch.testing.assert_close(got.anchor.var[b].squeeze(), v_c)
        assert got.bias[b].square().mean().item() == pytest.approx(scale**2 * v_c.item())


@scales
def test_projection_leaves_nothing_along_the_conditional_mean(rng, scale):
    cond, uncond = pair(rng)
    full, half, none = (guide_probabilistic(cond, uncond, scale, o) for o in (1.0, 0.5, 0.0))
    m_c = cond.mean()
    assert (inner(full.bias, m_c).abs() < 1e-10).all()

    def along(guided):  # tangent of the angle to the plane, in which the projection strength is linear
        return inner(guided.bias, m_c) / inner(guided.bias, full.bias)

    torch.testing.assert_close(along(half), 0.5 * along(none))


@scales
@orthogonals
def test_one_component_is_the_closed_form(rng, scale, orthogonal):
    """K = 1: guidance moves the one Gaussian to N(m_c + bias, v (1 - w^2))."""
    cond, uncond = pair(rng, k=1)
    got = guide_probabilistic(cond, uncond, scale, orthogonal)
    torch.testing.assert_close(got.posterior.mean(), cond.mean() + got.bias)
    torch.testing.assert_close(got.posterior.var, cond.var * (1 - scale**2))


@scales
def test_tilt_is_by_the_ratio_of_target_and_anchor(rng, scale):
    """log p_guided - log p_cond = log N(m', v') - log N(m_c, v_c) + const, v' = v_c (1 - w^2)."""
    cond, uncond = pair(rng)
    got = guide_probabilistic(cond, uncond, scale)
    m_c, v_c = got.anchor.mean, got.anchor.var
    constants = []
    for _ in range(4):
        x = torch.randn(m_c.shape, generator=rng, dtype=torch.float64)
        ratio = (x - m_c).square() / v_c - (x - m_c - got.bias).square() / (v_c * (1 - scale**2))
        constants.append(log_density(got.posterior, x) - log_density(cond, x) - 0.5 * ratio.sum(1))
    assert torch.stack(constants).std(0).max() < 1e-9


@scales
def test_guidance_does_not_mix_samples(rng, scale):
    cond, uncond = pair(rng)
    both = probabilistic_guidance(cond, uncond, scale)
    for i in range(2):
        one = slice(i, i + 1)
        alone = probabilistic_guidance(cond.map(itemgetter(one)), uncond.map(itemgetter(one)), scale)
        assert_same_mixture(both.map(itemgetter(one)), alone, 1e-14)


@pytest.mark.parametrize("space", [(), (5,), (2, 3, 2)], ids=str)
def test_any_space(rng, space):
    """The anchor by torch.distributions, the bias and the tilted density by hand, whatever the axes of space."""
    cond, uncond = pair(rng, space=space)
    got = guide_probabilistic(cond, uncond, 0.45)
    m_c, m_u = (as_distribution(m).mean.movedim(-1, 1) for m in (cond, uncond))
    v_c = as_distribution(cond).variance.flatten(1).mean(1).reshape(2, 1, *[1] * len(space))
    inner = lambda a, b: (a * b).flatten(1).sum(1).reshape(2, 1, *[1] * len(space))  # noqa: E731
    d = m_c - m_u
    d = d - inner(d, m_c) / inner(m_c, m_c) * m_c
    bias = 0.45 * (v_c / (inner(d, d) / d[0].numel())).sqrt() * d
    for found, expected in ((got.anchor.mean, m_c), (got.anchor.var, v_c), (got.bias, bias)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    constants = []
    for x in torch.randn((4, *m_c.shape), generator=rng, dtype=torch.float64):
        ratio = (x - m_c).square() / v_c - (x - m_c - bias).square() / (v_c * (1 - 0.45**2))
        constants.append(log_density(got.posterior, x) - log_density(cond, x) - 0.5 * ratio.sum(1))
    assert torch.stack(constants).std(0).max() < 1e-9


def test_equal_conditionals_have_no_direction(rng):
    """The bias is zero; what is left of the tilt narrows, N(m_c, v_c (1 - w^2)) / N(m_c, v_c)."""
    cond = random_mixture(rng)
    for dtype in (torch.float32, torch.float64):
        same = cond.map(methodcaller("to", dtype))
        got = guide_probabilistic(same, same, 0.45)
        assert torch.equal(got.bias, torch.zeros_like(got.bias))
        for tensor in (got.posterior.means, got.posterior.log_weights, got.posterior.log_std):
            assert tensor.isfinite().all()
        assert (got.posterior.var < same.var).all()


def test_zero_conditional_mean_is_finite(rng):
    cond, uncond = pair(rng, k=1)
    cond = GaussianMixture(torch.zeros_like(cond.means), cond.log_weights, cond.log_std)
    got = guide_probabilistic(cond, uncond, 0.45)
    assert got.bias.isfinite().all() and got.posterior.means.isfinite().all()
    torch.testing.assert_close(got.bias, guide_probabilistic(cond, uncond, 0.45, orthogonal=0.0).bias)


def test_tilt_toward_agrees_with_guidance_and_bounds_the_bias(rng):
    cond, uncond = pair(rng)
    guided = guide_probabilistic(cond, uncond, 0.6)
    assert_same_mixture(tilt_toward(cond, guided.anchor, guided.target), guided.posterior, 1e-10)
    torch.testing.assert_close(biased_target(guided.anchor, guided.bias).var, guided.target.var)
    # Rescaled to v_c, the variance at its floor.
    strong = tilt_toward(cond, guided.anchor, biased_target(guided.anchor, 50 * guided.bias))
    anchor, unit = guided.anchor, guided.bias / 0.6
    precision = 1 / (anchor.var * 1e-6) - 1 / anchor.var
    expected_var = cond.var / (1 + precision * cond.var)
    torch.testing.assert_close(strong.var, expected_var)
    torch.testing.assert_close(strong.mean(), anchor.mean + unit, rtol=0, atol=1e-3)


# ---- vanilla CFG -----------------------------------------------------------------------------------


def test_cfg_extrapolates_the_mean_and_keeps_the_shape(rng):
    cond, uncond = pair(rng)
    got = guide_cfg(cond, uncond, 2.5).posterior
    torch.testing.assert_close(got.mean(), uncond.mean() + 2.5 * (cond.mean() - uncond.mean()))
    torch.testing.assert_close(got.means - got.mean()[:, None], cond.means - cond.mean()[:, None])
    assert got.log_weights is cond.log_weights and got.log_std is cond.log_std
    assert_same_mixture(guide_cfg(cond, uncond, 1.0).posterior, cond, 1e-15)


def test_unguided_keeps_the_posterior(rng):
    m = random_mixture(rng)
    got = unguided(m)
    assert got.posterior is m and got.base is m and got.bias is None and got.scale == 0
    torch.testing.assert_close(got.anchor.mean, m.mean())
    torch.testing.assert_close(got.anchor.var, m.moments().var.mean((2, 3), keepdim=True))
    assert torch.equal(moment_anchor(m).var, got.anchor.var)


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.1, 1.0, 7.5, math.nan])
def test_bad_scales_are_refused_with_the_reason(rng, scale):
    with pytest.raises(ValueError, match=r"guidance must be in \[0, 1\).*not a CFG scale"):
        guide_probabilistic(*pair(rng), scale)


@pytest.mark.parametrize("orthogonal", [-0.1, 1.1, math.nan])
def test_bad_projections_are_refused(rng, orthogonal):
    with pytest.raises(ValueError, match="orthogonal"):
        probabilistic_guidance(*pair(rng), 0.3, orthogonal)


def test_guidance_bias_of_a_gaussian_matches_the_full_call(rng):
    cond, uncond = pair(rng)
    bias = guidance_bias(moment_anchor(cond), uncond.mean(), 0.3, 0.5)
    torch.testing.assert_close(bias, guide_probabilistic(cond, uncond, 0.3, 0.5).bias)
