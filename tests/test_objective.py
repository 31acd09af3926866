"""Training losses: against densities by torch.distributions, and the recorded losses and gradients."""

import math

import pytest
import torch
from oracle import ExactPrior, as_distribution, log_density, random_mixture
from recorded import assert_close, load, mixture, recorded_axes, small_network, small_spectrum

from gmflow_core import (
    GaussianMixture,
    mean_loss,
    mixture_nll,
    objective as objective_module,
    spectral_loss,
    transition_loss,
    velocity_to_posterior,
)
from gmflow_core.objective import transition_pair
from gmflow_core.path import forward_transition
from gmflow_core.schedule import training_sigmas

RATIOS = ["0.5", "0.9", "1.0"]
ratios = pytest.mark.parametrize("ratio", RATIOS)
NAMES = {"means": "means", "logweights": "log_weights", "logstds": "log_std"}


def leaves(m: GaussianMixture) -> GaussianMixture:
    return m.map(lambda t: t.clone().requires_grad_())


def assert_gradients(loss, m, recorded, prefix, samples=slice(None), relative=1e-5):
    """d loss / d (means, log_weights, log_std) of the chosen samples against ``prefix``.NAME."""
    for theirs, ours in NAMES.items():
        (gradient,) = torch.autograd.grad(loss, getattr(m, ours), retain_graph=True)
        assert_close(gradient[samples], recorded[f"{prefix}.{theirs}"][samples], relative)


# ---- negative log likelihood -----------------------------------------------------------------------


@pytest.mark.parametrize("space", [(), (5,), (3, 4)], ids=str)
def test_nll_is_the_mean_over_pixels_without_its_constant(rng, space):
    m = random_mixture(rng, k=4, c=3, space=space)
    x = torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
    expected = -(log_density(m, x) + 1.5 * math.log(2 * math.pi)).reshape(2, -1).mean(1)
    torch.testing.assert_close(mixture_nll(m, x), expected)


def test_recorded_nll():
    r = load("losses")
    m = leaves(mixture(r, "in.denoising."))
    loss = mixture_nll(m, r["in.noise_0"] - r["in.x_0"])
    assert_close(loss, r["nll_u.per_sample"])
    assert_gradients(loss.mean(), m, r, "nll_u.ws1.0.grad")


def test_recorded_nll_of_2d_points():
    """The 2D network's first iteration: 64 components, no space."""
    r = load("toy")
    assert_close(mixture_nll(mixture(r, "u_gm."), r["noise"] - r["x_0"]), r["loss"])


# ---- transition loss -------------------------------------------------------------------------------


@ratios
def test_recorded_transition_pair(ratio):
    r, name = load("losses"), f"trans.r{ratio}."
    low, x_low, x_high = transition_pair(
        r["in.x_0"], r["in.t_high"] / 1000, float(ratio), r["in.noise_0"], r["in.noise_1"]
    )
    torch.testing.assert_close(1000 * low, r[name + "t_low"], rtol=1e-6, atol=1e-6)
    assert_close(x_low, r[name + "x_low"], 1e-6)
    assert_close(x_high, r[name + "x_high"], 1e-6)


@ratios
def test_recorded_transition_loss(ratio):
    """Their variance floor, max(c_e^2, 1e-6) where ours has none, acts at sigma_low = 0 (ratio 1). It
    is the larger part of the fourth sample's variance (sigma 0.012: 2.6e-6), left out here, and a
    share of up to 2e-5 of the others'."""
    r, name = load("losses"), f"trans.r{ratio}."
    m = leaves(mixture(r, "in.denoising."))
    sigma, low = r["in.t_high"] / 1000, r[name + "t_low"] / 1000
    loss = transition_loss(m, r[name + "x_high"], sigma, r[name + "x_low"], low)
    samples = slice(3) if ratio == "1.0" else slice(None)
    assert_close(loss[samples], r[name + "per_sample"][samples])
    assert_gradients(loss.mean(), m, r, name + "ws1.0.grad", samples, 1e-4 if ratio == "1.0" else 1e-5)


def test_recorded_transition_loss_with_their_floor_added():
    r, name = load("losses"), "trans.r1.0."
    posterior = velocity_to_posterior(mixture(r, "in.denoising."), r[name + "x_high"], r["in.t_high"] / 1000)
    floored = 0.5 * torch.logaddexp(2 * posterior.log_std, torch.tensor(1e-6).log())
    loss = mixture_nll(GaussianMixture(posterior.means, posterior.log_weights, floored), r[name + "x_low"])
    assert_close(loss, r[name + "per_sample"])


def test_ratio_one_is_the_nll_of_x_0(rng):
    """... which is the NLL of u but for the Jacobian C log sigma."""
    u = random_mixture(rng, c=3, space=(3, 4))
    x_0, e_0, e_1 = torch.randn(3, 2, 3, 3, 4, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.3], dtype=torch.float64)
    low, x_low, x_high = transition_pair(x_0, sigma, 1.0, e_0, e_1)
    assert torch.equal(low, torch.zeros(2, dtype=torch.float64)) and torch.equal(x_low, x_0)
    loss = transition_loss(u, x_high, sigma, x_low, low)
    torch.testing.assert_close(loss, mixture_nll(velocity_to_posterior(u, x_high, sigma), x_0))
    velocity = (x_high - x_0) / sigma.reshape(2, 1, 1, 1)
    torch.testing.assert_close(loss, mixture_nll(u, velocity) + 3 * sigma.log())


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
def test_the_exact_posterior_is_the_minimum(rng, ratio):
    """Averaged over 20000 transitions of the exact prior, the loss of the true posterior equals the
    entropy rate -E log q(x_low | x_high), and every perturbation of it costs."""
    prior, n, sigma = ExactPrior.example(), 20_000, 0.8
    x_0 = prior.sample_x_t(0.0, n, rng)
    e_0, e_1 = torch.randn(2, *x_0.shape, generator=rng, dtype=torch.float64)
    low, x_low, x_high = transition_pair(x_0, torch.tensor([sigma]).double(), ratio, e_0, e_1)
    u = as_velocity(prior.posterior(x_high, sigma), x_high, sigma)

    def loss(m):
        return transition_loss(m, x_high, torch.tensor([sigma]).double(), x_low, low).item()

    true = loss(u)
    if ratio < 1:
        truth = prior.marginal(low.item()).log_prob(x_low[0].T) - prior.marginal(sigma).log_prob(x_high[0].T)
        mean_high = forward_transition(x_low, torch.zeros_like(x_low), low, sigma)
        std = ((sigma**2) - ((1 - sigma) / (1 - low.item()) * low.item()) ** 2) ** 0.5
        truth = truth + torch.distributions.Normal(mean_high, std).log_prob(x_high)[0].sum(0)
        assert true == pytest.approx(-truth.mean().item() - math.log(2 * math.pi), abs=1e-9)
    assert true < loss(GaussianMixture(u.means, u.log_weights, u.log_std + 0.2))
    assert true < loss(GaussianMixture(u.means, u.log_weights, u.log_std - 0.2))
    assert true < loss(GaussianMixture(u.means + 0.1, u.log_weights, u.log_std))
    assert true < loss(GaussianMixture.from_logits(u.means, u.log_weights * 0.5, u.log_std))


def as_velocity(posterior, x_t, sigma):
    """The inverse of velocity_to_posterior: u = (x_t - x_0)/s."""
    means = (x_t.unsqueeze(1) - posterior.means) / sigma
    return GaussianMixture(means, posterior.log_weights, posterior.log_std - math.log(sigma))


def test_transition_ends_keep_their_distance():
    x = torch.zeros(3, 1)
    low, *_ = transition_pair(x, torch.tensor([1.0, 0.5, 1e-7]), 1e-9, x, x)
    assert low[0].item() < 1 and (low >= 0).all() and low[2] == 0


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1, math.nan])
def test_bad_ratios_are_refused(ratio):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="ratio"):
        transition_pair(zeros, torch.tensor([0.5]), ratio, zeros, zeros)


# ---- mean loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize("space", [(), (3, 4)], ids=str)
def test_mean_loss_against_torch_distributions(rng, space):
    """Value and gradients: 1/2 |u - m|^2 / v with m and v of torch's own mixture, v one constant a sample."""
    leaf = leaves(random_mixture(rng, b=3, k=4, c=3, space=space))
    m = GaussianMixture.from_logits(leaf.means, leaf.log_weights, leaf.log_std)      # theirs normalise once more, too
    x_0, x_t = torch.randn(2, 3, 3, *space, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.3, 0.05], dtype=torch.float64)
    loss = mean_loss(m, x_0, x_t, sigma)
    assert loss.shape == (3,)
    theirs = as_distribution(m)
    variance = [theirs.variance[b].mean().item() for b in range(3)]                 # over C and space
    error = (x_t - x_0).movedim(1, -1) / sigma.reshape(-1, *[1] * (x_0.ndim - 1)) - theirs.mean
    expected = torch.stack([error[b].square().sum(-1).mean() / (2 * variance[b]) for b in range(3)])
    torch.testing.assert_close(loss, expected)
    inputs, each = [leaf.means, leaf.log_weights], torch.arange(1.0, 4).double()
    assert torch.autograd.grad(loss.sum(), leaf.log_std, allow_unused=True, retain_graph=True)[0] is None
    for a, b in zip(torch.autograd.grad(each @ loss, inputs, retain_graph=True),
                    torch.autograd.grad(each @ expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_mean_loss_of_one_gaussian_is_its_nll_without_the_deviation(rng):
    """K = 1: -log N(u; m, v) - (C/2) log 2 pi = |u - m|^2 / (2 v) + C log std."""
    m = random_mixture(rng, k=1, c=3)
    x_0, x_t = torch.randn(2, 2, 3, 3, 4, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.3], dtype=torch.float64)
    u = (x_t - x_0) / sigma.reshape(2, 1, 1, 1)
    torch.testing.assert_close(mean_loss(m, x_0, x_t, sigma), mixture_nll(m, u) - 3 * m.log_std.flatten())


# ---- spectral loss ---------------------------------------------------------------------------------


def trainable_spectrum():
    return small_spectrum().requires_grad_(True)


def test_recorded_spectral_loss(monkeypatch):
    """Given their z. The map itself is compared in test_transport.py."""
    r = load("losses")
    monkeypatch.setattr(objective_module, "mixture_to_gaussian", lambda m, u: r["spectral.z_kr"][:, 0])
    spectrum, m = trainable_spectrum(), leaves(mixture(r, "in.denoising."))
    loss = spectral_loss(m, r["in.x_0"], r["spectral.x_high"], r["in.t_high"] / 1000, spectrum)
    assert loss.shape == (4,)
    assert_close(loss.mean(), r["spectral.loss"])
    loss.mean().backward()
    assert m.means.grad is None and m.log_std.grad is None
    for name, parameter in spectrum.named_parameters():
        assert_close(parameter.grad, r[f"spectral.grad.{name}"])


def test_spectral_loss_shows_the_network_the_x_0_gaussian(rng):
    u = random_mixture(rng, c=3)
    x_0, x_t = torch.randn(2, 2, 3, 3, 4, generator=rng, dtype=torch.float64)
    sigma, seen = torch.tensor([0.9, 0.3], dtype=torch.float64), []

    def spectrum(gaussian):
        seen.append(gaussian)
        return torch.zeros_like(gaussian.mean)

    loss = spectral_loss(u, x_0, x_t, sigma, spectrum)
    expected = velocity_to_posterior(u, x_t, sigma).moments()
    torch.testing.assert_close(seen[0].mean, expected.mean)
    torch.testing.assert_close(seen[0].var, expected.var)
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))  # the NLL of white noise is the origin


def test_spectral_loss_is_least_at_the_true_spectrum(rng, monkeypatch):
    """C/2 (p_true/p - p_true + log p) has its minimum where p = p_true."""
    true = torch.randn(1, 3, 4, 4, generator=rng, dtype=torch.float64)
    u = random_mixture(rng, b=500, c=3, space=(4, 4))
    z = objective_module.hartley((true / 2).exp() * torch.randn(500, 3, 4, 4, generator=rng, dtype=torch.float64))
    monkeypatch.setattr(objective_module, "mixture_to_gaussian", lambda m, x: z)
    log_power = (true + 0.5 * torch.randn(true.shape, generator=rng, dtype=torch.float64)).requires_grad_()
    x, sigma = torch.zeros_like(z), torch.full((500,), 0.5, dtype=torch.float64)
    optimiser = torch.optim.LBFGS([log_power], max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = spectral_loss(u, x, x, sigma, lambda gaussian: log_power.expand_as(z)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert (log_power - true).abs().max() < 5 * (2 / 500) ** 0.5  # std of a log power from 500 draws


# ---- a whole training step -------------------------------------------------------------------------


@ratios
def test_recorded_training_step(ratio, monkeypatch):
    """Time, noises, network, both losses (their weights: 2 and 1) and all gradients of both networks.

    5e-4 for the spectral part: theirs cuts z by the CDF, and float32 holds 1 - 1e-6 to within 6 %.
    """
    r, name = load("losses"), f"forward_train.r{ratio}."
    axes = recorded_axes(r[name + "eigh000.eigvecs"])
    exact = objective_module.mixture_to_gaussian
    monkeypatch.setattr(objective_module, "mixture_to_gaussian", lambda m, u: exact(m, u, axes=axes))
    network, spectrum = small_network().requires_grad_(True), trainable_spectrum()
    sigma = training_sigmas(r[name + "draw000"], "logit-normal")
    low, x_low, x_high = transition_pair(r["in.x_0"], sigma, float(ratio), *r[name + "draw001"].chunk(2))
    velocity = network.mixture(network(x_high, sigma, r["in.labels"]))
    transition = 2 * transition_loss(velocity, x_high, sigma, x_low, low).mean()
    spectral = spectral_loss(velocity, r["in.x_0"], x_high, sigma, spectrum).mean()
    assert_close(transition, r[name + "loss_transition"], 2e-4 if ratio == "1.0" else 1e-5)  # their floor
    assert_close(spectral, r[name + "loss_spectral"], 5e-4)
    (transition + spectral).backward()
    of_network = 3e-4 if ratio == "1.0" else 1e-5
    for part, model, relative in (("transformer", network, of_network), ("spectrum", spectrum, 5e-4)):
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert_close(norm, r[f"{name}grad_norm_{part}"], relative)
    prefix = name + "grad.transformer."
    recorded = [key for key in r if key.startswith(prefix)]
    assert len(recorded) == (4 if ratio == "0.5" else 0)
    for key in recorded:
        assert_close(network.get_parameter(key.removeprefix(prefix)).grad, r[key], 2e-5)
