"""Coloured noise, principal axes, and the inverse CDF of one axis.

Truth is float64: CDFs in log space from scipy. The map over all axes is in test_transport.py.
"""

import math

import numpy as np
import pytest
import torch
from oracle import random_mixture
from recorded import assert_close, load, mixture, recorded_axes
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from scipy.stats import norm

from gmflow_core import gaussian_to_mixture
from gmflow_core.spectral import color_noise, hartley, inverse_cdf, principal_axes

# ---- Hartley transform, coloured noise -------------------------------------------------------------

sizes = pytest.mark.parametrize("size", [(8, 8), (5, 7), (6,), (4, 3, 2)], ids=str)


@sizes
def test_hartley_is_its_own_inverse_and_orthonormal(rng, size):
    x, y = torch.randn(2, 2, 3, *size, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(hartley(hartley(x)), x)
    torch.testing.assert_close((hartley(x) * hartley(y)).sum(), (x * y).sum())


def test_hartley_by_its_definition(rng):
    """sum_n x_n cas(2 pi <k, n/N>) / sqrt(N), cas = cos - sin as torch's FFT has exp(-i ...)."""
    x = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    i, j = (torch.arange(n, dtype=torch.float64) for n in (5, 4))
    phase = 2 * math.pi * (i[:, None, None, None] * i[:, None] / 5 + j[:, None, None] * j / 4)
    expected = ((phase.cos() - phase.sin()) * x).sum((-2, -1)) / math.sqrt(20)
    torch.testing.assert_close(hartley(x[None, None])[0, 0], expected)


@pytest.mark.parametrize("size", [(8, 8), (6, 5), (5, 5)], ids=str)
def test_hartley_is_the_references_half_spectrum_construction(rng, size):
    """Theirs builds a Hermitian spectrum from the coefficients and calls irfft2."""
    x = torch.randn(2, 3, *size, generator=rng, dtype=torch.float64)
    half = size[-1] // 2 + 1
    mirrored = x.roll((-1, -1), dims=(-2, -1)).flip((-2, -1))[..., :half]
    spectrum = torch.complex(x[..., :half] + mirrored, x[..., :half] - mirrored) / 2
    torch.testing.assert_close(hartley(x), torch.fft.irfft2(spectrum, s=size, norm="ortho"))


def test_coloured_noise_has_the_spectrum_asked_for(rng):
    """Power of 4000 draws per frequency; an estimate's std is sqrt(2/4000) = 2.2 %."""
    log_power = torch.randn(3, 6, 5, generator=rng, dtype=torch.float64)
    white = torch.randn(4000, 3, 6, 5, generator=rng, dtype=torch.float64)
    power = hartley(color_noise(white, log_power.expand_as(white))).square().mean(0)
    assert (power / log_power.exp() - 1).abs().max() < 5 * 0.0224
    torch.testing.assert_close(color_noise(white, torch.zeros_like(white)), hartley(white))


def test_recorded_spectral_sample():
    r = load("gm_ops")
    name = "gm_sample_spectral."
    z = color_noise(r[name + "draw000"][:, 0], r["in.power_spectrum"])
    assert_close(z, r[name + "gaussian_samples"][:, 0], 1e-6)
    axes = recorded_axes(r[name + "eigh000.eigvecs"])
    assert_close(gaussian_to_mixture(mixture(r, "in."), z, axes=axes), r[name + "samples"][:, 0], 1e-5)


# ---- axes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 2, 4])
def test_principal_axes(rng, c):
    m = random_mixture(rng, k=5, c=c)
    axes, covariance = principal_axes(m), m.covariance()
    eye = torch.eye(c, dtype=torch.float64).expand(2, c, c)
    torch.testing.assert_close(axes.mT @ axes, eye, rtol=0, atol=1e-6)  # found in float32
    diagonal = axes.mT @ covariance @ axes
    variances = diagonal.diagonal(dim1=-2, dim2=-1)
    assert (diagonal - torch.diag_embed(variances)).abs().max() < 1e-5
    assert (variances.diff(dim=-1) <= 1e-6).all()
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


# ---- one dimension ---------------------------------------------------------------------------------


def log_tails(mu, log_w, x):
    """(log F, log (1 - F)) of sum_k w_k N(mu_k, 1) at x, in float64. mu, log_w (K,N), x (N,)"""
    log_w = log_w - logsumexp(log_w, axis=0)
    t = x - mu
    return logsumexp(log_w + log_ndtr(t), axis=0), logsumexp(log_w + log_ndtr(-t), axis=0)


def probit_of_mixture(mu, log_w, x):
    """Phi^-1(F(x)) from the smaller tail, in float64."""
    lower, upper = log_tails(mu, log_w, x)
    return np.where(lower < upper, ndtri_exp(np.minimum(lower, -1e-300)), -ndtri_exp(np.minimum(upper, -1e-300)))


def log_pdf(mu, log_w, x):
    log_w = log_w - logsumexp(log_w, axis=0)
    return logsumexp(log_w + norm.logpdf(x - mu), axis=0)


def one_dimensional(kind, n, rng):
    """Hard mixtures of unit Gaussians: means and log weights (K,N) in float32."""
    k = 6
    mu = torch.randn(k, n, generator=rng)
    logits = 2 * torch.randn(k, n, generator=rng)
    if kind == "tiny weights":
        mu, logits[1:] = 5 * mu, math.log(1e-30) + logits[1:]
    elif kind == "separated":
        mu = 1000 * mu
    elif kind == "separated, tiny weights":
        mu, logits[1:] = 1000 * mu, math.log(1e-12) + logits[1:]
    elif kind == "coincident":
        mu = mu[:1].expand(k, n).contiguous()
    elif kind == "wide":
        mu = 6 * mu
    return mu, logits.log_softmax(0)


KINDS = ["ordinary", "wide", "coincident", "tiny weights", "separated", "separated, tiny weights"]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_inverse_cdf_solves_the_equation(rng, kind):
    """|z| up to 8, float32, judged in float64 by Phi^-1(F(x)) = z.

    Allowed: 4e-5, and what rounding x (and mu) to float32 does to z, dz = F'(x)/phi(z) dx.
    """
    n = 4000
    mu, log_w = one_dimensional(kind, n, rng)
    z = torch.cat([16 * torch.rand(n // 2, generator=rng) - 8, torch.randn(n // 2, generator=rng)])
    z[:5] = torch.tensor([-8.0, 8.0, 0.0, -1e-8, 1e-8])
    x = inverse_cdf(mu, log_w, z)
    assert x.isfinite().all() and x.dtype == torch.float32
    mu, log_w, z, x = (t.double().numpy() for t in (mu, log_w, z, x))
    back = probit_of_mixture(mu, log_w, x)
    slope = np.exp(np.minimum(log_pdf(mu, log_w, x) - norm.logpdf(z), 50))
    rounding = 2e-7 * (np.abs(x) + np.abs(mu).max(0) + np.abs(z))
    error = np.abs(back - z)
    assert (error <= 4e-5 + slope * rounding).all(), (error - slope * rounding).max()


@kinds
def test_inverse_cdf_is_monotonic(rng, kind):
    """One mixture, z rising; equal within rounding where the CDF is steep."""
    mu, log_w = one_dimensional(kind, 1, rng)
    z = torch.linspace(-7, 7, 2001)
    x = inverse_cdf(mu.expand(-1, 2001).contiguous(), log_w.expand(-1, 2001).contiguous(), z)
    assert (x.diff() > -1e-5 * (1 + x.abs().max())).all()


def test_inverse_cdf_of_one_component_is_a_shift(rng):
    mu, z = torch.randn(2, 1000, generator=rng)
    got = inverse_cdf(mu[None], torch.zeros(1, 1000), 3 * z)
    torch.testing.assert_close(got, mu + 3 * z, rtol=2e-6, atol=4e-6)


def test_inverse_cdf_in_float64(rng):
    mu, log_w = (t.double() for t in one_dimensional("wide", 500, rng))
    log_w = log_w.log_softmax(0)
    z = torch.randn(500, generator=rng, dtype=torch.float64)
    back = probit_of_mixture(mu.numpy(), log_w.numpy(), inverse_cdf(mu, log_w, z).numpy())
    assert np.abs(back - z.numpy()).max() < 1e-10
