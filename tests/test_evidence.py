"""Evidence: its factors against grid integrals, linear algebra and enumeration;
what a denoiser makes of it against exact joint priors."""

import itertools
import math

import pytest
import torch
from oracle import random_mixture
from recorded import assert_same_mixture, small_network
from test_denoiser import Counting
from torch import Tensor

from gmflow_core import (
    BlockEvidence,
    Conditioned,
    DirectionEvidence,
    GaussianFactor,
    GaussianMixture,
    GMDenoiser,
    Inpaint,
    PixelEvidence,
    condition,
    flow_sigmas,
    guide_cfg,
    guide_probabilistic,
    sample_gm_ode,
    sample_gm_sde,
    unguided,
)
from gmflow_core.echo import absorb
from gmflow_core.inspection.statistics import statistics
from gmflow_core.inspection.trace import Recorder
from gmflow_core.inspection.views import VIEWS, draw

F64 = torch.float64


def normal(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=F64)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


# ---- factors ---------------------------------------------------------------------------------------


def integrate(mixture, *log_likelihoods, size=90, reach=5.0):
    """Mean (C,) and covariance (C,C) of a one-pixel mixture times likelihoods, by a sum over a grid of x_0."""
    c = mixture.channels
    ticks = torch.linspace(-reach, reach, size, dtype=F64)
    x = torch.stack(torch.meshgrid(*[ticks] * c, indexing="ij"), -1).reshape(-1, c)                # (N,C)
    offset = x - mixture.means[0, :, None, :, 0]                                                   # (K,N,C)
    log_p = mixture.log_weights[0, :, 0] - 0.5 * offset.square().sum(-1) / mixture.var[0, 0]
    total = log_p.logsumexp(0) + sum(f(x) for f in log_likelihoods)
    w = (total - total.logsumexp(0)).exp()
    mean = w @ x
    return mean, (w[:, None] * (x - mean)).T @ (x - mean)


def one_pixel(rng, c=3):
    return random_mixture(rng, b=1, k=4, c=c, space=(1,), log_std=(-0.4, -0.2))


def check_against_the_grid(mixture, evidence, *log_likelihoods):
    tilted = mixture.tilt(evidence.factor(mixture))
    mean, cov = integrate(mixture, *log_likelihoods)
    torch.testing.assert_close(tilted.mean()[0, :, 0], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tilted.pixel_covariance()[0, :, :, 0], cov, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_a_colour_is_a_gaussian_likelihood(rng, c):
    m, y = one_pixel(rng, c), normal(rng, 1, c, 1)
    evidence = PixelEvidence(y, torch.full((1, 1, 1), 1 / 0.4**2, dtype=F64))
    check_against_the_grid(m, evidence, lambda x: -0.5 * ((x - y[0, :, 0]) / 0.4).square().sum(-1))


def test_grey_is_a_likelihood_along_one_direction(rng):
    """y = b.x_0 + noise, with b of any length."""
    m, b = one_pixel(rng), torch.tensor([0.3, 0.6, 0.1], dtype=F64)
    length = b.norm()
    y = torch.full((1, 1, 1), 0.2, dtype=F64)
    evidence = DirectionEvidence(y / length, (b / length).reshape(1, 3, 1),
                                 torch.full((1, 1, 1), length.item() ** 2 / 0.3**2, dtype=F64))
    check_against_the_grid(m, evidence, lambda x: -0.5 * ((x @ b - 0.2) / 0.3).square())


def hue_of(colour, precision):
    """Everything but the brightness: on the line from black (0) through a colour (1,C,1)."""
    black, g = torch.zeros_like(colour[:, :1]), torch.full_like(colour[:, :1], precision)
    return PixelEvidence(torch.zeros_like(colour), g) + DirectionEvidence(black, colour, -g)


def off_the_line(colour, precision):
    c = colour[0, :, 0]
    return lambda x: -0.5 * precision * (x - (x @ c)[:, None] * c).square().sum(-1)


def test_hue_and_grey_of_one_pixel(rng):
    m, c, d = one_pixel(rng), unit(normal(rng, 1, 3, 1)), unit(normal(rng, 1, 3, 1))
    grey = DirectionEvidence(torch.full((1, 1, 1), 0.5, dtype=F64), d, torch.full((1, 1, 1), 9.0, dtype=F64))
    bright = lambda x: -4.5 * (x @ d[0, :, 0] - 0.5).square()  # noqa: E731
    check_against_the_grid(m, hue_of(c, 4.0), off_the_line(c, 4.0))
    check_against_the_grid(m, hue_of(c, 4.0) + grey, off_the_line(c, 4.0), bright)
    check_against_the_grid(m, grey + hue_of(c, 4.0), off_the_line(c, 4.0), bright)


def test_two_hues_in_one_picture(rng):
    """A hue each for the left and the right pixel, as one sum: each pixel gets its own and nothing of the other's."""
    m = random_mixture(rng, b=1, k=4, c=3, space=(2,), log_std=(-0.4, -0.2))
    colours = [unit(normal(rng, 1, 3, 1)) for _ in range(2)]
    side = torch.eye(2, dtype=F64).reshape(2, 1, 1, 2)
    black = torch.zeros(1, 3, 2, dtype=F64)
    parts = [PixelEvidence(black, 4 * s) + DirectionEvidence(black[:, :1], c, -4 * s)
             for c, s in zip(colours, side, strict=True)]
    tilted = m.tilt((parts[0] + parts[1]).factor(m))
    for i, colour in enumerate(colours):
        alone = GaussianMixture(m.means[..., i : i + 1], m.log_weights[..., i : i + 1], m.log_std)
        mean, cov = integrate(alone, off_the_line(colour, 4.0))
        torch.testing.assert_close(tilted.mean()[0, :, i], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tilted.pixel_covariance()[0, :, :, i], cov, rtol=1e-5, atol=1e-6)


def test_blocks_of_one_component_are_linear_algebra(rng):
    """Pixels that are independent Gaussians, seen through their blocks' means: exact, for every marginal."""
    m = random_mixture(rng, b=2, k=1, c=2, space=(4, 4))
    y, std = normal(rng, 2, 2, 2, 2), 0.3
    tilted = m.tilt(BlockEvidence(y, 2, std).factor(m))
    for b, c, i, j in itertools.product(range(2), range(2), range(2), range(2)):
        window = (b, c, slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
        prior_mean, v = m.mean()[window].flatten(), m.var[b].item()
        row = torch.full((1, 4), 0.25, dtype=F64)
        gain = v * row.T / (v * (row @ row.T) + std**2)                                            # (4,1)
        mean = prior_mean + (gain * (y[b, c, i, j] - row @ prior_mean)).squeeze(1)
        cov = v * torch.eye(4, dtype=F64) - v * gain @ row
        torch.testing.assert_close(tilted.mean()[window].flatten(), mean)
        torch.testing.assert_close(tilted.channel_var()[window].flatten(), cov.diagonal())


@pytest.mark.parametrize("spread, worst", [(2.0, 0.25), (0.6, 0.03)])
def test_blocks_of_mixtures_against_all_joint_components(rng, spread, worst):
    """Four pixels of three components, 81 joint ones enumerated: rms error of the mean. Without evidence it is over
    three times as large."""
    errors, without = [], []
    for _ in range(50):
        m = random_mixture(rng, b=1, k=3, c=1, space=(2, 2), spread=spread, log_std=(-1.0, -0.8))
        x = m.sample(rng)
        std = 0.1
        y = x.mean((2, 3), keepdim=True) + std * normal(rng, 1, 1, 1, 1)
        means, log_w, v = m.means[0, :, 0].flatten(1), m.log_weights[0, :, 0].flatten(1), m.var.item()   # (K,4)
        joint = torch.tensor(list(itertools.product(range(3), repeat=4)))                               # (81,4)
        mu = means.gather(0, joint)
        gain, var = v / 4 / (v / 4 + std**2), v / 4 + std**2
        residual = y.item() - mu.mean(1)
        logits = log_w.gather(0, joint).sum(1) - 0.5 * residual**2 / var
        exact = logits.softmax(0) @ (mu + gain * residual[:, None])
        got = m.tilted_mean(BlockEvidence(y, 2, std).factor(m)).flatten()
        errors.append((got - exact).square().mean())
        without.append((m.mean().flatten() - exact).square().mean())
    error, plain = (torch.stack(e).mean().sqrt().item() for e in (errors, without))
    assert error < worst and plain > 3 * error


def test_the_order_of_parts_does_not_matter(rng):
    m = random_mixture(rng, c=3)
    y, d = normal(rng, 2, 3, 3, 4), unit(normal(rng, 2, 3, 3, 4))
    parts = [PixelEvidence(y, torch.rand(2, 1, 3, 4, generator=rng, dtype=F64)),
             DirectionEvidence(y[:, :1], d, torch.rand(2, 1, 3, 4, generator=rng, dtype=F64)),
             DirectionEvidence(y[:, :1], unit(d + y), torch.rand(2, 1, 3, 4, generator=rng, dtype=F64))]
    a, b, c = parts
    expected = m.tilt((a + b + c).factor(m))
    for order in itertools.permutations(parts):
        got = m.tilt((order[0] + (order[1] + order[2])).factor(m))
        torch.testing.assert_close(got.mean(), expected.mean())
        torch.testing.assert_close(got.pixel_covariance(), expected.pixel_covariance())


# ---- exact joint priors ----------------------------------------------------------------------------


class Inks:
    """Pixels that all have the same one of three inks, N(ink_k, std^2 I) at each: a joint prior, known exactly."""

    std = 0.25

    def __init__(self, pixels=2):
        angle = torch.tensor([0.0, 2.1, 4.0], dtype=F64)
        self.inks = 1.2 * torch.stack([angle.cos(), angle.sin()], 1)                               # (K,C)
        self.weights = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
        self.pixels = pixels

    def ink_given(self, x, sigma, y=None, precision=None):
        """log p(k | x_t, y) (B,K), y (B,C,P) of precision (B,1,P)."""
        a, v = 1 - sigma, self.std**2
        means = self.inks.T[None, :, :, None]                                                      # (1,C,K,1)
        log_p = self.weights.log() + 0 * x[:, :1, 0]
        if y is None:
            y, precision = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        # N(x; a x_0, s^2) N(y; x_0, 1/precision) as one Gaussian about x_0, and its evidence under each ink.
        total = (a / sigma) ** 2 + precision                                                       # (B,1,P)
        centre = (a * x / sigma**2 + precision * y) / total.clamp(min=1e-300)
        distance = (centre.unsqueeze(2) - means).square().sum(1)                                   # (B,K,P)
        seen = total.squeeze(1).unsqueeze(1)
        log_p = log_p + (-0.5 * distance / (v + 1 / seen.clamp(min=1e-300))).sum(-1)
        return log_p.log_softmax(1)

    def posterior(self, x, sigma, y=None, precision=None):
        """Every pixel's own marginal of the joint posterior: what an ideal network answers, given evidence or not."""
        a, v, b = 1 - sigma, self.std**2, len(x)
        y, precision = (torch.zeros_like(x), torch.zeros_like(x[:, :1])) if y is None else (y, precision)
        log_w = self.ink_given(x, sigma, y, precision)
        total = 1 / v + (a / sigma) ** 2 + precision
        means = (self.inks[None, :, :, None] / v + (a * x / sigma**2 + precision * y).unsqueeze(1)) / total.unsqueeze(1)
        log_std = -0.5 * total.log().unsqueeze(1)
        if len(set(log_std.flatten().tolist())) == 1:
            log_std = log_std[..., :1]
        return GaussianMixture(means, log_w[:, :, None, None].expand(b, 3, 1, self.pixels), log_std.expand(b, 1, 1, -1))

    def denoiser(self, x, sigma):
        self.calls = getattr(self, "calls", 0) + 1
        return unguided(self.posterior(x, sigma))

    def modes(self, x):
        """Shares of the inks at the last pixel of x (N,C,P)."""
        nearest = torch.cdist(x[:, :, -1], self.inks).argmin(1)
        return torch.bincount(nearest, minlength=3) / len(x)


def pixel_evidence(y, precisions):
    """About y (1,C,P), a precision for each pixel."""
    return PixelEvidence(y, torch.tensor(precisions, dtype=F64).reshape(1, 1, -1))


@pytest.mark.parametrize("std, where, tilt_at_least", [(0.5, (0.3, 0.35), 0.1), (0.1, (-0.5, 1.0), 0.2)],
                         ids=["ambiguous", "clear"])
def test_an_echo_reaches_the_pixel_without_evidence(rng, std, where, tilt_at_least):
    """Total variation between the inks' shares at the unobserved pixel and their exact posterior, of 2000 samples
    (whose own noise is about 0.015)."""
    prior, n = Inks(), 2000
    y = torch.tensor([where, (0.0, 0.0)], dtype=F64).T[None]
    evidence = pixel_evidence(y, [1 / std**2, 0])
    distance = (prior.inks - torch.tensor(where, dtype=F64)).square().sum(1)
    exact = (prior.weights.log() - 0.5 * distance / (prior.std**2 + std**2)).softmax(0)
    noise, variation = normal(rng, n, 2, 2), {}
    for propagate in (False, True):
        denoiser = condition(prior.denoiser, Conditioned(evidence, propagate=propagate))
        x = sample_gm_ode(denoiser, noise, flow_sigmas(8), substeps=16)
        variation[propagate] = 0.5 * (prior.modes(x) - exact).abs().sum().item()
    assert variation[True] < 0.06 and variation[False] > tilt_at_least


class Correlated:
    """Jointly Gaussian pixels: cov (C P, C P) over x_0 flattened, with every marginal isotropic."""

    def __init__(self, rng, c=2, p=3):
        root = normal(rng, p, p)
        across = root @ root.T + 0.5 * torch.eye(p, dtype=F64)
        scale = across.diagonal().rsqrt()
        self.cov = torch.kron(torch.eye(c, dtype=F64), scale[:, None] * across * scale) * 0.6
        self.mean, self.c, self.p = normal(rng, c * p), c, p

    def joint(self, x, sigma, precision=None, y=None):
        """E[x_0 | x_t, y] (B,C P) and its covariance."""
        a, inverse = 1 - sigma, torch.linalg.inv(self.cov)
        known = torch.zeros_like(self.mean) if precision is None else precision
        total = torch.linalg.inv(inverse + torch.diag((a / sigma) ** 2 + known))
        right = inverse @ self.mean + a * x.flatten(1) / sigma**2 + (0 if y is None else known * y.flatten())
        return right @ total, total

    def denoiser(self, x, sigma):
        mean, cov = self.joint(x, sigma)
        var = cov.diagonal().reshape(self.c, self.p)
        mean = mean.reshape(len(x), 1, self.c, self.p)
        return unguided(GaussianMixture(mean, torch.zeros_like(mean[:, :, :1]),
                                        0.5 * var[:1].log().expand(len(x), 1, 1, self.p)))


@pytest.mark.parametrize("c", [1, 2, 5])
@pytest.mark.parametrize("limit", [1e6, 0.6], ids=["unlimited", "limited"])
def test_an_echo_of_one_pixel_of_a_gaussian_is_exact(rng, limit, c):
    """The conditional means of all pixels, K = 1, of any number of channels; what the limit withholds is continued in a
    straight line, which is exact here."""
    prior = Correlated(rng, c)
    x = normal(rng, 4, c, 3)
    y = prior.denoiser(x[:1], 0.7).posterior.mean() + 0.3  # near, so that a deviation of the image is not reached
    x = x[:1] + 0.1 * normal(rng, 4, c, 3)
    evidence = pixel_evidence(y, [25.0, 0, 0])
    got = condition(prior.denoiser, Conditioned(evidence, limit=limit))(x, 0.7).posterior
    known = torch.tensor([25.0, 0, 0] * c, dtype=F64)
    expected, _ = prior.joint(x, 0.7, known, y)
    torch.testing.assert_close(got.mean(), expected.reshape(4, c, 3), rtol=1e-9, atol=1e-9)


def test_what_the_limit_withholds_moves_no_mean_by_more_than_its_deviation(rng):
    prior = Correlated(rng)
    x, far = normal(rng, 4, 2, 3), torch.full((1, 2, 3), 60.0, dtype=F64)
    evidence = pixel_evidence(far, [25.0, 0, 0])
    sees = Conditioned(evidence, limit=0.01)
    plain, got = prior.denoiser(x, 0.7).posterior, condition(prior.denoiser, sees)(x, 0.7).posterior
    moved = (got.mean() - plain.mean())[:, :, 1:]
    assert moved.square().mean().sqrt() < 1.5 * plain.channel_var().mean().sqrt()


@pytest.mark.parametrize("sigma", [1.0, 0.8, 0.2])
def test_evidence_of_all_pixels_is_a_lower_noise_level(rng, sigma):
    """Absorbed: the posterior is that of the joint prior given both, at every pixel, in one call."""
    prior, x, y = Inks(3), normal(rng, 5, 2, 3), normal(rng, 5, 2, 3)
    precision = torch.full((1, 1, 1), 1 / 0.6**2, dtype=F64)
    prior.calls = 0
    got = condition(prior.denoiser, PixelEvidence(y, precision))(x, sigma).posterior
    assert prior.calls == 1
    expected = prior.posterior(x, sigma, y, precision.expand(5, 1, 3))
    assert_same_mixture(got, expected, 1e-10)


def test_what_is_left_after_absorption_is_tilted(rng):
    """Evidence of two pixels beyond what all have: without an echo,
    the tilt of the exact posterior given what all have."""
    prior, x, y = Inks(3), normal(rng, 5, 2, 3), normal(rng, 5, 2, 3)
    precisions = torch.tensor([2.0, 5.0, 9.0], dtype=F64).reshape(1, 1, 3)
    got = condition(prior.denoiser, Conditioned(PixelEvidence(y, precisions), propagate=False))(x, 0.7).posterior
    common = torch.full_like(precisions, 2.0).expand(5, 1, 3)
    expected = prior.posterior(x, 0.7, y, common).tilt(GaussianFactor(precisions - 2, (precisions - 2) * y))
    torch.testing.assert_close(got.mean(), expected.mean())
    torch.testing.assert_close(got.weights, expected.weights)


def test_absorption_is_for_each_image_and_takes_no_hue(rng):
    y = normal(rng, 2, 3, 4)
    precision = torch.tensor([[1.0, 2, 3, 4], [0, 5, 5, 5]], dtype=F64).reshape(2, 1, 4)
    uniform = Conditioned(PixelEvidence(y, precision)).uniform
    assert uniform.precision.flatten().tolist() == [1.0, 0.0]
    x = normal(rng, 2, 3, 4)
    moved, sigmas = absorb(uniform, x, 0.5)
    assert sigmas == [pytest.approx(1 / (1 + math.sqrt(2))), 0.5] and torch.equal(moved[1], x[1])
    colour = unit(normal(rng, 1, 3, 4))
    hue = PixelEvidence(torch.zeros(1, 3, 4, dtype=F64), torch.ones(1, 1, 1, dtype=F64)) + DirectionEvidence(
        torch.zeros(1, 1, 4, dtype=F64), colour, -torch.ones(1, 1, 1, dtype=F64))
    assert Conditioned(hue).uniform is None


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_certain_pixels_end_where_they_are_known(rng, sigma):
    prior, y = Inks(3), normal(rng, 1, 2, 3)
    evidence = pixel_evidence(y, [1e8, 0, 0])
    x = sample_gm_ode(condition(prior.denoiser, evidence), normal(rng, 4, 2, 3), flow_sigmas(6)[:], substeps=4)
    torch.testing.assert_close(x[:, :, 0], y[:, :, 0].expand(4, 2), rtol=0, atol=1e-3)
    x = sample_gm_sde(condition(prior.denoiser, Conditioned(evidence, propagate=False)), normal(rng, 4, 2, 3),
                      flow_sigmas(6))
    torch.testing.assert_close(x[:, :, 0], y[:, :, 0].expand(4, 2), rtol=0, atol=1e-3)


def test_no_evidence_is_the_identity_bit_for_bit(rng):
    prior, x = Inks(), normal(rng, 4, 2, 2)
    nothing = PixelEvidence(torch.zeros(1, 2, 2, dtype=F64), torch.zeros(1, 1, 2, dtype=F64))
    prior.calls = 0
    got = condition(prior.denoiser, nothing)
    plain = sample_gm_ode(prior.denoiser, x, flow_sigmas(4), substeps=3)
    assert torch.equal(sample_gm_ode(got, x, flow_sigmas(4), substeps=3), plain) and prior.calls == 8


@pytest.mark.parametrize("propagate", [True, False])
def test_evidence_of_one_image_leaves_the_others_alone(rng, propagate):
    """In a batch: the other images are what they are alone, from pure noise on."""
    prior, x, y = Inks(), normal(rng, 3, 2, 2), normal(rng, 3, 2, 2)
    precision = torch.tensor([[0, 0], [4.0, 0], [0, 0]], dtype=F64).reshape(3, 1, 2)
    batched = lambda t, sigma: unguided(rows(prior, t, sigma))  # noqa: E731
    got = sample_gm_ode(condition(batched, Conditioned(PixelEvidence(y, precision), propagate)), x,
                        flow_sigmas(4), substeps=3)
    plain = sample_gm_ode(prior.denoiser, x, flow_sigmas(4), substeps=3)
    torch.testing.assert_close(got[[0, 2]], plain[[0, 2]], rtol=1e-9, atol=1e-9)
    one = PixelEvidence(y[1:2], precision[1:2])
    alone = sample_gm_ode(condition(prior.denoiser, Conditioned(one, propagate)), x[1:2], flow_sigmas(4), substeps=3)
    torch.testing.assert_close(got[1:2], alone, rtol=1e-9, atol=1e-9)


def rows(prior, x, sigma):
    """The prior's posterior at a sigma for each image."""
    sigmas = torch.as_tensor(sigma, dtype=F64).expand(len(x)).tolist()
    parts = [prior.posterior(row[None], s) for row, s in zip(x, sigmas, strict=True)]
    return GaussianMixture(*(torch.cat([getattr(p, n) for p in parts]) for n in ("means", "log_weights", "log_std")))


# ---- calls -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return small_network()


def hints(b=1, std=0.5, pixels=((1, 2),)):
    """About a few of the 8 x 8 pixels of four channels."""
    precision = torch.zeros(b, 1, 8, 8)
    for i, j in pixels:
        precision[:, :, i, j] = 1 / std**2
    return PixelEvidence(torch.full((b, 4, 8, 8), 0.7), precision)


@pytest.mark.parametrize("given, sigma, guidance, asked", [
    (Conditioned(hints(), propagate=False), 0.5, 0.0, [(1, 0.5)]),
    (hints(), 0.5, 0.0, [(1, 0.5), (1, 0.5)]),
    (hints(), 0.5, 0.4, [(2, 0.5), (2, 0.5)]),
    (hints(), 1.0, 0.0, [(1, pytest.approx(0.96))] * 2),
    (Conditioned(hints(), propagate=False), 1.0, 0.0, [(1, 1.0)]),
    (Conditioned(hints(), until=0.5), 0.5, 0.0, [(1, 0.5)]),
    (Conditioned(hints(), until=0.49), 0.5, 0.0, [(1, 0.5), (1, 0.5)]),
    (PixelEvidence(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 1, 1)), 0.5, 0.4, [(2, pytest.approx(1 / (1 + 2**0.5)))]),
    (hints(std=1e9), 0.5, 0.4, [(2, 0.5), (2, 0.5)]),
    (None, 1.0, 0.4, [(2, 1.0)]),
])
def test_network_calls(network, rng, given, sigma, guidance, asked):
    model = Counting(network)
    GMDenoiser(model, torch.tensor([3]), guidance, evidence=given)(torch.randn(1, 4, 8, 8, generator=rng), sigma)
    assert [(n, s[0]) for n, s, _ in model.asked] == asked
    assert all(len(set(s)) == 1 for _, s, _ in model.asked)


@pytest.mark.parametrize("method, scale", [("probabilistic", 0.45), ("cfg", 3.0)])
@pytest.mark.parametrize("propagate", [True, False])
def test_evidence_comes_before_guidance_on_both_posteriors(network, rng, method, scale, propagate):
    """Each with its own echo, and guided afterwards."""
    x, given = torch.randn(2, 4, 8, 8, generator=rng), Conditioned(hints(), propagate)
    got = GMDenoiser(network, torch.tensor([3, 7]), scale, method=method, evidence=given)(x, 0.6)
    cond, uncond = (condition(GMDenoiser(network, labels), given)(x, 0.6).posterior
                    for labels in (torch.tensor([3, 7]), None))
    expected = guide_probabilistic(cond, uncond, scale) if method == "probabilistic" else guide_cfg(cond, uncond, scale)
    torch.testing.assert_close(got.posterior.mean(), expected.posterior.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.anchor.mean, cond.mean() if method == "probabilistic" else expected.anchor.mean,
                               rtol=1e-4, atol=1e-4)


def test_no_evidence_leaves_a_network_alone_bit_for_bit(network, rng):
    x = torch.randn(2, 4, 8, 8, generator=rng)
    for guidance in (0.0, 0.4):
        plain, got = (GMDenoiser(network, torch.tensor([3, 7]), guidance, evidence=e)(x, 1.0).posterior
                      for e in (None, PixelEvidence(torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 1, 1))))
        assert torch.equal(got.mean(), plain.mean())


@pytest.mark.parametrize("solver", ["ode", "sde"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["colour", "hue", "blocks", "grey and blocks"])
def test_every_solver_takes_every_evidence(network, rng, solver, order, kind):
    """With a noise mask, without autograd; the evidence's own pixels come nearer to it."""
    x, black = torch.randn(2, 4, 8, 8, generator=rng), torch.zeros(1, 4, 8, 8)
    d = torch.full((1, 4, 1, 1), 0.5)
    blocks = BlockEvidence(torch.full((1, 4, 2, 2), 0.3), 4, 0.05)
    evidence = {
        "colour": hints(), "blocks": blocks,
        "hue": PixelEvidence(black, torch.full((1, 1, 1, 1), 16.0))
        + DirectionEvidence(black[:, :1], d, torch.full((1, 1, 1, 1), -16.0)),
        "grey and blocks": DirectionEvidence(black[:, :1] + 0.6, d, torch.full((1, 1, 1, 1), 16.0)) + blocks,
    }[kind]
    misfit = {
        "colour": lambda t: (t - 0.7)[:, :, 1, 2],
        "blocks": lambda t: t.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)) - 0.3,
        "hue": lambda t: t - t.mean(1, keepdim=True), "grey and blocks": lambda t: (t * d).sum(1) - 0.6,
    }[kind]
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 6:, 6:] = 0
    keep = Inpaint(mask, torch.full((1, 4, 8, 8), 0.2), torch.randn(1, 4, 8, 8, generator=rng))
    results = {}
    with torch.inference_mode():
        for given in (None, evidence):
            denoiser = GMDenoiser(network, torch.tensor([3, 7]), 0.3, evidence=given)
            generator = torch.Generator().manual_seed(1)
            noise = lambda s, t, g=generator: torch.randn(x.shape, generator=g)  # noqa: E731
            settings = dict(order=order, inpaint=keep)
            out = (sample_gm_ode(denoiser, x, flow_sigmas(3), substeps=4, **settings) if solver == "ode"
                   else sample_gm_sde(denoiser, x, flow_sigmas(3), noise_sampler=noise, **settings))
            assert out.isfinite().all() and torch.equal(out[:, :, 6:, 6:], torch.full((2, 4, 2, 2), 0.2))
            results[given is None] = misfit(out).square().mean().sqrt().item()
    assert results[False] < 0.6 * results[True]


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: PixelEvidence(torch.full((1, 3, 4), math.nan), torch.ones(1, 1, 4)),
     "PixelEvidence: value must be finite"),
    (lambda: PixelEvidence(torch.zeros(1, 3, 4), torch.ones(1, 3, 4)), "precision must be"),
    (lambda: PixelEvidence(torch.zeros(2, 3, 4), torch.ones(3, 1, 4)), "precision must be"),
    (lambda: PixelEvidence(torch.zeros(1, 3, 4), torch.full((1, 1, 4), math.inf)), "std > 0"),
    (lambda: DirectionEvidence(torch.zeros(1, 1, 4), torch.ones(1, 3, 4), torch.ones(1, 1, 4)), "unit vectors"),
    (lambda: DirectionEvidence(torch.zeros(1, 1, 4), torch.full((1, 3, 4), math.nan), torch.ones(1, 1, 4)),
     "direction must be finite"),
    (lambda: BlockEvidence(torch.zeros(1, 3, 2, 2), 0, 0.1), "block must be"),
    (lambda: BlockEvidence(torch.zeros(1, 3, 2, 2), 2, 0.0), "std must be"),
    (lambda: BlockEvidence(torch.zeros(1, 3, 2, 2), 2, math.nan), "std must be"),
    (lambda: Conditioned(torch.zeros(2)), "evidence: got a Tensor"),
    (lambda: Conditioned(hints(), limit=0), "limit must be"),
    (lambda: Conditioned(hints(), until=1.5), "until must be"),
    (lambda: Conditioned(PixelEvidence(torch.zeros(1, 3, 4), -torch.ones(1, 1, 4))), "take back more than they give"),
])
def test_bad_evidence_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("evidence, message", [
    (hints(3), "about 3 images, and 2 are sampled"),
    (PixelEvidence(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 1, 1)), r"\(3, 8, 8\).*and \(4, 8, 8\) are sampled"),
    (BlockEvidence(torch.zeros(1, 4, 3, 3), 2, 0.1), r"\(4, 6, 6\)"),
    (DirectionEvidence(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)), r"\(1, 8, 8\)"),
])
def test_evidence_of_other_images_is_refused(network, evidence, message):
    with pytest.raises(ValueError, match=message):
        GMDenoiser(network, torch.tensor([3, 7]), evidence=evidence)(torch.zeros(2, 4, 8, 8), 0.5)


# ---- looking at it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["colour", "grey", "blocks"])
def test_a_trace_keeps_what_evidence_did(network, rng, kind):
    """Means, weights and total variances of what the steps used, in half precision; every view draws it."""
    black = torch.zeros(1, 4, 8, 8)
    evidence = {
        "colour": hints(), "blocks": BlockEvidence(torch.full((1, 4, 2, 2), 0.3), 4, 0.05),
        "grey": DirectionEvidence(black[:, :1] + 0.6, torch.full((1, 4, 1, 1), 0.5), torch.full((1, 1, 1, 1), 16.0)),
    }[kind]
    recorder, seen = Recorder(images=1), []
    callback = lambda info: (recorder(info), seen.append(info))  # noqa: E731
    denoiser = GMDenoiser(network, torch.tensor([3, 7]), 0.3, evidence=evidence)
    with torch.no_grad():
        sample_gm_ode(denoiser, torch.randn(2, 4, 8, 8, generator=rng), flow_sigmas(3), substeps=4, callback=callback)
    trace = recorder.trace()
    for step, info in zip(trace.steps, seen, strict=True):
        for got, used in ((step.conditional, info.guided.base), (step.corrected, info.posterior)):
            assert got.log_std.shape == (1, 1, 1, 8, 8)
            got = got.map(Tensor.float)
            torch.testing.assert_close(got.moments().mean, used.moments().mean[:1], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(got.moments().var, used.moments().var[:1], rtol=1e-2, atol=1e-3)
    numbers = statistics(trace, 0, pixel=(2, 1))
    first = trace.steps[0].corrected
    assert numbers["steps"][0]["pixel"]["std"] == pytest.approx(first.log_std[0, 0, 0, 1, 2].float().exp().item(),
                                                                rel=1e-4)
    assert numbers["steps"][0]["std_within"] == pytest.approx(first.log_std.float().mul(2).exp().mean().sqrt().item(),
                                                              rel=1e-3)
    for view in VIEWS:
        draw(trace, view, 1, 0, "aligned", 4, lambda x: x[:, :3], (2, 1))
