"""The path and its kernels: against Bayes by hand, an exact prior and recorded numbers."""

from dataclasses import replace
from operator import itemgetter

import pytest
import torch
from oracle import ExactPrior, log_density, random_mixture
from recorded import assert_close, assert_same_mixture, load, mixture
from torch.distributions import Normal

from gmflow_core import GaussianMixture, add_noise, reanchor, reverse_transition, velocity_to_posterior
from gmflow_core.path import (
    Reanchoring,
    forward_transition,
    likelihood_factor,
    reanchor_factor,
    reverse_step,
    transition_coefficients,
)

PAIRS = [(1.0, 0.5), (0.9, 0.89), (0.8, 0.4), (0.5, 0.001), (0.3, 0.0), (1.0, 0.0)]  # (sigma, sigma_next)
pairs = pytest.mark.parametrize("sigma, sigma_next", PAIRS)


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def forward_coefficients(low, high):
    """(ratio, std) of the forward transition, read off unit inputs."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return forward_transition(one, zero, low, high).item(), forward_transition(zero, one, low, high).item()


# ---- forward ---------------------------------------------------------------------------------------


def test_add_noise_takes_a_sigma_per_sample(rng):
    x_0, noise = torch.randn(2, 3, 2, 4, generator=rng, dtype=torch.float64)
    got = add_noise(x_0, noise, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    assert torch.equal(got[0], x_0[0]) and torch.equal(got[2], noise[2])
    torch.testing.assert_close(got[1], 0.7 * x_0[1] + 0.3 * noise[1])


@pytest.mark.parametrize("low, mid, high", [(0.0, 0.3, 1.0), (0.1, 0.11, 0.6), (0.4, 0.7, 0.99)])
def test_forward_transitions_compose(low, mid, high):
    (r1, s1), (r2, s2), (r, s) = (forward_coefficients(*p) for p in ((low, mid), (mid, high), (low, high)))
    assert r1 * r2 == pytest.approx(r, rel=1e-12)
    assert (r2 * s1) ** 2 + s2**2 == pytest.approx(s**2, rel=1e-12)
    # ... and what was x_t's law at low is x_t's law at high.
    assert r * (1 - low) == pytest.approx(1 - high, abs=1e-12)
    assert (r * low) ** 2 + s**2 == pytest.approx(high**2, rel=1e-12)


def test_recorded_forward_diffusion():
    r = load("gm_ops")
    for low, high in ((0.0, 500.0), (100.0, 900.0), (450.0, 500.0)):
        x_low = add_noise(r["in.x_0"], r["in.x_b"], low / 1000)
        assert_close(x_low, r[f"forward.x_low.{low}"], 1e-6)
        x_high = forward_transition(x_low, r["in.noise_1"], low / 1000, high / 1000)
        assert_close(x_high, r[f"forward.x_high.{low}_{high}"], 1e-6)


# ---- posterior -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_tweedie(rng, sigma):
    """E[x_0 | x_t] = (x_t + s^2 grad log p(x_t)) / (1 - s): the posterior's mean against autograd of the marginal."""
    prior = ExactPrior.example(channels=3)
    x = torch.randn(50, 3, generator=rng, dtype=torch.float64)
    expected = (x + sigma**2 * prior.score(x, sigma)) / (1 - sigma)
    torch.testing.assert_close(prior.posterior(x, sigma).mean(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.01, 0.6, 1.0])
def test_velocity_mixture_becomes_the_law_of_x_0(rng, sigma):
    """x_0 = x_t - s u: densities differ by the Jacobian s^C alone."""
    u = random_mixture(rng, c=3)
    x_t, x_0 = torch.randn(2, 2, 3, 3, 4, generator=rng, dtype=torch.float64)
    got = log_density(velocity_to_posterior(u, x_t, sigma), x_0)
    expected = log_density(u, (x_t - x_0) / sigma) - 3 * scalar(sigma).log()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_a_posterior_can_be_replaced(rng):
    u, x = random_mixture(rng), torch.randn(2, 2, 2, 3, 4, generator=rng, dtype=torch.float64)
    posterior = velocity_to_posterior(u, x[0], 0.6)
    posterior.mean()  # what was worked out of the old x does not come along
    assert_same_mixture(replace(posterior, x_t=x[1]), velocity_to_posterior(u, x[1], 0.6), 0)


def test_velocity_to_posterior_takes_a_sigma_per_sample(rng):
    u, x = random_mixture(rng), torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    both = velocity_to_posterior(u, x, torch.tensor([0.9, 0.2], dtype=torch.float64))
    for i, sigma in enumerate((0.9, 0.2)):
        alone = velocity_to_posterior(u.map(itemgetter(slice(i, i + 1))), x[i : i + 1], sigma)
        assert_same_mixture(both.map(itemgetter(slice(i, i + 1))), alone, 1e-15)


@pytest.mark.parametrize("name, sigma", [
    ("t1000.0", 1.0), ("t731.25", 0.73125), ("t1.0", 0.001), ("t_vec", torch.tensor([0.9, 0.125])),
])
def test_recorded_velocity_to_posterior(name, sigma):
    r = load("gm_ops")
    got = velocity_to_posterior(mixture(r, "in."), r["in.x_a"], sigma)
    assert_close(got.means, r[f"u_to_x_0.gm.{name}.means"], 1e-6)
    assert_close(got.log_std, r[f"u_to_x_0.gm.{name}.logstds"], 1e-6)
    assert torch.equal(got.log_weights, r["in.logweights"])


# ---- re-anchoring ----------------------------------------------------------------------------------


def test_reanchoring_composes_and_ends_where_it_began(rng):
    m = random_mixture(rng)
    x, y, z = torch.randn(3, 2, 2, 3, 4, generator=rng, dtype=torch.float64)
    direct = reanchor(m, x, 0.9, z, 0.3)
    assert_same_mixture(reanchor(reanchor(m, x, 0.9, y, 0.6), y, 0.6, z, 0.3), direct, 1e-12)
    assert_same_mixture(reanchor(direct, z, 0.3, x, 0.9), m, 1e-11)
    assert_same_mixture(reanchor(m, x, 0.9, x, 0.9), m, 1e-14)


def test_likelihood_factor_is_the_likelihood(rng):
    x_t, x_0, other = torch.randn(3, 2, 3, 4, generator=rng, dtype=torch.float64)
    factor = likelihood_factor(x_t, 0.3)

    def log_factor(x):
        return (factor.shift * x - 0.5 * factor.precision * x.square()).sum(1)

    expected = (Normal(0.7 * x_0, 0.3).log_prob(x_t) - Normal(0.7 * other, 0.3).log_prob(x_t)).sum(1)
    torch.testing.assert_close(log_factor(x_0) - log_factor(other), expected)


@pytest.mark.parametrize("source, target", [
    (1.0, 0.9), (0.9, 0.9), (0.9, 0.5), (0.75, 0.7), (0.5, 0.495), (0.5, 0.1), (0.3, 0.01), (0.1, 0.001),
])
def test_recorded_reanchored_means(source, target):
    """The unclamped form of the reference. Its first form clamps a_t^2 s_s^2 - a_s^2 s_t^2 at 1e-6,
    which moves the mean by 2e-3 at target = source, where ours is the identity."""
    r = load("gm_ops")
    factor = reanchor_factor(r["in.x_a"], source, r["in.x_b"], target)
    got = mixture(r, "in.").tilted_mean(factor)
    assert_close(got, r[f"lakon_posterior_mean.s{source}_{target}"], 1e-6)


def test_recorded_reanchored_mean_of_a_velocity_mixture():
    r = load("gm_ops")
    posterior = velocity_to_posterior(mixture(r, "in."), r["in.x_a"], 0.8)
    got = posterior.tilted_mean(reanchor_factor(r["in.x_a"], 0.8, r["in.x_b"], 0.6))
    assert_close(got, r["gm_convert_mean.u.out"], 1e-6)


@pytest.mark.parametrize("space", [(), (5,), (3, 4)], ids=str)
def test_reanchoring_to_sigmas_known_ahead_is_exact(rng, space):
    """Each mean is that of the prior's own posterior there, whatever was tilted onto the posterior before."""
    prior = ExactPrior.example(channels=3)
    x, y = torch.randn(2, 2, 3, *space, generator=rng, dtype=torch.float64)
    sigmas = [0.7, 0.4, 0.05, 0.001]
    later = Reanchoring(prior.posterior(x, 0.9), x, 0.9, sigmas)
    twice = Reanchoring(reanchor(prior.posterior(y, 0.95), y, 0.95, x, 0.9), x, 0.9, sigmas)
    for i, sigma in enumerate(sigmas):
        x = 0.5 * x + 0.1
        expected = prior.posterior(x, sigma).mean()
        torch.testing.assert_close(later.mean(i, x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(twice.mean(i, x), expected, rtol=1e-10, atol=1e-10)


def test_the_mean_of_a_posterior_needs_no_means_of_components(rng):
    velocity = random_mixture(rng)
    x_t, sigma = (torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64),
                  torch.tensor([0.9, 0.2], dtype=torch.float64))
    posterior = velocity_to_posterior(velocity, x_t, sigma)
    mean = posterior.mean()
    assert "means" not in vars(posterior)
    torch.testing.assert_close(mean, (posterior.weights * posterior.means).sum(1))
    torch.testing.assert_close(velocity_to_posterior(velocity, x_t, 0.9).mean()[0], mean[0])


# ---- reverse transition ----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, sigma_next", [p for p in PAIRS if p[1] > 0])
def test_transition_coefficients_by_bayes(sigma, sigma_next):
    """q(x_n | x_t, x_0) from q(x_t | x_n) q(x_n | x_0), two Gaussians in x_n: precisions add."""
    a_next = 1 - sigma_next
    ratio, std = forward_coefficients(sigma_next, sigma)
    precision = ratio**2 / std**2 + 1 / sigma_next**2
    c_x, c_0, c_e = (float(c) for c in transition_coefficients(scalar(sigma), scalar(sigma_next)))
    assert c_x == pytest.approx(ratio / std**2 / precision, rel=1e-10, abs=1e-14)
    assert c_0 == pytest.approx(a_next / sigma_next**2 / precision, rel=1e-10)
    assert c_e == pytest.approx(precision**-0.5, rel=1e-10)


@pairs
def test_transition_coefficients_of_numbers_are_those_of_tensors(sigma, sigma_next):
    expected = tuple(float(c) for c in transition_coefficients(scalar(sigma), scalar(sigma_next)))
    assert transition_coefficients(sigma, sigma_next) == pytest.approx(expected, rel=1e-14, abs=1e-16)


@pairs
def test_transition_coefficients_keep_the_path(sigma, sigma_next):
    """x_t = a x_0 + s e must give x_n of mean a_n x_0 and variance s_n^2; the end gives x_0 itself."""
    c_x, c_0, c_e = (float(c) for c in transition_coefficients(scalar(sigma), scalar(sigma_next)))
    assert c_x * (1 - sigma) + c_0 == pytest.approx(1 - sigma_next, rel=1e-12)
    assert (c_x * sigma) ** 2 + c_e**2 == pytest.approx(sigma_next**2, abs=1e-15)
    if sigma_next == 0:
        assert (c_x, c_0, c_e) == (0, 1, 0)


@pytest.mark.parametrize("sigma, sigma_next", [(0.98, 0.5), (0.8, 0.79), (0.5, 0.01)])
def test_reverse_transition_of_the_exact_prior(rng, sigma, sigma_next):
    """q(x_n | x_t) = p(x_n) q(x_t | x_n) / p(x_t), every term exact."""
    prior = ExactPrior.example(channels=3)
    x_t = torch.randn(40, 3, generator=rng, dtype=torch.float64)
    x_n = x_t + 0.3 * torch.randn(40, 3, generator=rng, dtype=torch.float64)
    ratio, std = forward_coefficients(sigma_next, sigma)
    likelihood = Normal(ratio * x_n, std).log_prob(x_t).sum(1)
    expected = prior.marginal(sigma_next).log_prob(x_n) + likelihood - prior.marginal(sigma).log_prob(x_t)
    got = log_density(reverse_transition(prior.posterior(x_t, sigma), x_t, sigma, sigma_next), x_n)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    conjugate = log_density(prior.transition(x_t, sigma, sigma_next), x_n)
    torch.testing.assert_close(conjugate, expected, rtol=1e-9, atol=1e-9)


def test_reverse_transition_to_zero_is_the_posterior(rng):
    m, x = random_mixture(rng), torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    assert_same_mixture(reverse_transition(m, x, 0.7, 0.0), m, 1e-14)


def test_reverse_step_draws_from_the_kernel(rng):
    x, x_0, noise = torch.randn(3, 2, 3, 4, generator=rng, dtype=torch.float64)
    c_x, c_0, c_e = (float(c) for c in transition_coefficients(scalar(0.8), scalar(0.4)))
    torch.testing.assert_close(reverse_step(x, x_0, noise, 0.8, 0.4), c_x * x + c_0 * x_0 + c_e * noise)
    assert torch.equal(reverse_step(x, x_0, noise, 0.8, 0.0), x_0)


@pytest.mark.parametrize("kind, high, low", [
    ("u", 1.0, 0.5), ("u", 0.8, 0.4), ("u", 0.8, 0.799), ("u", 0.3, 0.03), ("x0", 0.8, 0.4),
    ("u", torch.tensor([0.9, 0.125]), torch.tensor([0.45, 0.012])),
])
def test_recorded_reverse_transition(kind, high, low):
    r, name = load("gm_ops"), "vec" if isinstance(high, torch.Tensor) else f"{high * 1000}_{low * 1000}"
    check_reverse(r, kind, high, low, name, 0.0)


def test_recorded_reverse_transition_to_zero_with_their_variance_floor():
    """Theirs adds max(c_e^2, 1e-6) to the variance. We have no floor, so it is added here."""
    check_reverse(load("gm_ops"), "u", 0.3, 0.0, "300.0_0.0", 1e-6)


def check_reverse(r, kind, high, low, name, floor):
    m = mixture(r, "in.")
    posterior = m if kind == "x0" else velocity_to_posterior(m, r["in.x_a"], high)
    got = reverse_transition(posterior, r["in.x_a"], high, low)
    assert isinstance(got, GaussianMixture)
    assert_close(got.means, r[f"reverse_transition.{kind}.{name}.means"], 1e-6)
    var = (2 * got.log_std).exp() + floor
    assert_close(0.5 * var.log(), r[f"reverse_transition.{kind}.{name}.logstds"], 1e-6)
