"""The Knothe-Rosenblatt map between a standard normal and a mixture, both ways."""

from operator import itemgetter

import numpy as np
import pytest
import torch
from oracle import log_density, projected_cdf, random_mixture
from recorded import assert_close, load, mixture, recorded_axes
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from scipy.stats import kstest

from gmflow_core import GaussianMixture, gaussian_to_mixture, mixture_to_gaussian
from gmflow_core.spectral import principal_axes


def ordinary(rng, k, c, spread=2.0, space=(8, 8), dtype=torch.float32):
    return random_mixture(rng, k=k, c=c, space=space, spread=spread, dtype=dtype)


def orthonormal(axes):
    """The axes are found in float32; this makes them orthonormal in float64."""
    q, r = torch.linalg.qr(axes.double())
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@pytest.mark.parametrize(
    "k, c, spread", [(1, 4, 1.0), (8, 4, 1.0), (8, 4, 3.0), (64, 2, 2.0), (3, 1, 2.0), (20, 20, 1.0)]
)
def test_round_trip(rng, k, c, spread):
    """z -> x -> z in float32, 1e-4 as the rounding of x allows on mixtures without empty gaps."""
    m = ordinary(rng, k, c, spread)
    z = torch.randn(m.mean().shape, generator=rng)
    x = gaussian_to_mixture(m, z)
    assert x.shape == z.shape and x.dtype == torch.float32
    assert (mixture_to_gaussian(m, x) - z).abs().max() < 1e-4


def test_round_trip_in_float64(rng):
    m = ordinary(rng, 8, 4, dtype=torch.float64)
    z = torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
    axes = orthonormal(principal_axes(m))
    torch.testing.assert_close(mixture_to_gaussian(m, gaussian_to_mixture(m, z, axes), axes), z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("space", [(), (6,), (2, 3, 2)], ids=str)
def test_any_space(rng, space):
    m = ordinary(rng, 4, 3, space=space)
    z = torch.randn(m.mean().shape, generator=rng)
    assert (mixture_to_gaussian(m, gaussian_to_mixture(m, z)) - z).abs().max() < 1e-4


def test_one_component_is_an_affine_map(rng):
    m = ordinary(rng, 1, 3, dtype=torch.float64)
    z = torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(2, 3, 3, generator=rng, dtype=torch.float64)).Q
    expected = m.mean() + m.var.sqrt() * torch.einsum("bij,bjhw->bihw", axes, z)
    torch.testing.assert_close(gaussian_to_mixture(m, z, axes=axes), expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(mixture_to_gaussian(m, expected, axes=axes), z, rtol=1e-10, atol=1e-10)


def test_samples_do_not_mix(rng):
    m = ordinary(rng, 4, 3)
    z = torch.randn(m.mean().shape, generator=rng)
    both = gaussian_to_mixture(m, z)
    for i in range(2):
        alone = gaussian_to_mixture(m.map(itemgetter(slice(i, i + 1))), z[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


# ---- laws ------------------------------------------------------------------------------------------


def spread_over_pixels(mixture, n):
    """The same single-pixel mixture at n pixels of one sample."""
    def repeat(t):
        return t[..., None].expand(*t.shape, n)

    return GaussianMixture(repeat(mixture.means), repeat(mixture.log_weights), mixture.log_std[..., None])


DIRECTIONS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0.5, -0.5, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_transported_normals_have_the_mixtures_law(rng, spread):
    """20000 points, five directions: KS with p > 1e-3 sees a CDF that is off by 0.014. A map that
    forgets to update the weights between axes, or orders the channels otherwise, is off by 0.1."""
    one = random_mixture(rng, b=1, k=4, c=3, space=(), spread=spread)
    m = spread_over_pixels(one, 20_000)
    x = gaussian_to_mixture(m, torch.randn(1, 3, 20_000, generator=rng, dtype=torch.float64))[0].T
    for direction in DIRECTIONS:
        assert kstest((x @ direction).numpy(), projected_cdf(one, direction)).pvalue > 1e-3


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_samples_become_independent_normals(rng, spread):
    m = spread_over_pixels(random_mixture(rng, b=1, k=4, c=3, space=(), spread=spread), 20_000)
    z = mixture_to_gaussian(m, m.sample(rng))[0]
    for direction in DIRECTIONS:
        unit = direction / direction.norm()
        assert kstest((unit @ z).numpy(), "norm").pvalue > 1e-3
    # Independence, not just no correlation: squares are uncorrelated too. std of an estimate: 0.007.
    assert (torch.corrcoef(z) - torch.eye(3)).abs().max() < 0.03
    assert (torch.corrcoef(z.square()) - torch.eye(3)).abs().max() < 0.03


def test_change_of_variables(rng):
    """log p(x) = log N(z) + log |det dz/dx|, the Jacobian by central differences in float64. With the
    axes given, nothing else of the map depends on x."""
    m = ordinary(rng, 5, 3, space=(6,), dtype=torch.float64)
    axes = orthonormal(principal_axes(m))
    x = m.sample(rng)
    h = 1e-5
    columns = []
    for c in range(3):
        step = torch.zeros(3, 1, dtype=torch.float64)
        step[c] = h
        difference = mixture_to_gaussian(m, x + step, axes) - mixture_to_gaussian(m, x - step, axes)
        columns.append(difference / (2 * h))
    jacobian = torch.stack(columns, dim=-1).movedim(1, -2)                      # (B,S,C,C)
    z = mixture_to_gaussian(m, x, axes)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(normal + jacobian.det().abs().log(), log_density(m, x), rtol=0, atol=1e-7)


def test_axes_decide_the_map_but_not_the_law(rng):
    """A flipped axis gives another point of equal standing."""
    m = ordinary(rng, 4, 3, dtype=torch.float64)
    z = torch.randn(m.mean().shape, generator=rng, dtype=torch.float64)
    axes = principal_axes(m)
    flipped = axes * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    assert not torch.allclose(gaussian_to_mixture(m, z, axes), gaussian_to_mixture(m, z, flipped))
    mirrored = z * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    torch.testing.assert_close(gaussian_to_mixture(m, mirrored, flipped), gaussian_to_mixture(m, z, axes))


# ---- far points ------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [5.0, 8.0, 20.0, 50.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_far_out_are_exact(rng, distance, dtype):
    """One channel, so that the map is Phi^-1(F(x)), in log space by scipy. Relative to |z|: 1e-5 in
    float32, where (x - mean)/std itself is good to 1e-6."""
    m = random_mixture(rng, b=1, k=4, c=1, space=(50,), dtype=torch.float64)
    sign = torch.where(torch.rand(50, generator=rng) < 0.5, -1.0, 1.0).double()
    x = m.mean() + sign * distance * m.var.sqrt()
    z = mixture_to_gaussian(m.map(lambda t: t.to(dtype)), x.to(dtype))
    t = ((x.unsqueeze(1) - m.means) / m.var.sqrt().unsqueeze(1))[0, :, 0].numpy()
    log_w = m.log_weights[0, :, 0].numpy()
    lower, upper = (logsumexp(log_w + log_ndtr(s * t), axis=0) for s in (1, -1))
    expected = np.where(lower < upper, ndtri_exp(lower), -ndtri_exp(upper))
    error = np.abs(z[0, 0].double().numpy() - expected) / np.maximum(1, np.abs(expected))
    assert error.max() < (1e-5 if dtype == torch.float32 else 1e-9), error.max()


@pytest.mark.parametrize("distance", [10.0, 50.0, 1000.0])
def test_far_points_of_many_channels_are_finite(rng, distance):
    m = ordinary(rng, 8, 4)
    x = m.mean() + distance * torch.randn(m.mean().shape, generator=rng)
    assert mixture_to_gaussian(m, x).isfinite().all()


@pytest.mark.parametrize("log_std", [-12.0, -6.0, 4.0])
def test_any_width(rng, log_std):
    """Late in sampling the stds are tiny beside the distances: finite, and within the mixture."""
    m = random_mixture(rng, k=8, c=4, log_std=(log_std, log_std), dtype=torch.float32)
    z = torch.randn(m.mean().shape, generator=rng)
    x = gaussian_to_mixture(m, z)
    std = m.var.sqrt().amax()
    nearest = (x.unsqueeze(1) - m.means).norm(dim=2).amin(1)
    assert x.isfinite().all() and (nearest < 6 * std + 1e-4).all()


# ---- recorded numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["z1", "z3"])
def test_recorded_draws(name):
    """Their eigenvectors given. 2e-5: theirs stops after 16 Newton steps with a pdf floor of 1e-6."""
    r = load("gm_ops")
    m, axes = mixture(r, "in."), recorded_axes(r[f"kr.{name}.axis.eigvecs"])
    diagonal = axes.mT @ m.covariance() @ axes
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-5
    for i, z in enumerate(r[f"in.{name}"].unbind(1)):
        assert_close(gaussian_to_mixture(m, z, axes=axes), r[f"kr.{name}.axis.gm_samples"][:, i], 2e-5)


def test_recorded_inverse():
    """Theirs takes erfinv of a float32 CDF in [-1, 1], clamped to 1 - 1e-6: |z| <= 4.89, and an error
    of 2^-24/phi(z) on the way there. Ours is exact, so it is compared where theirs is good."""
    r = load("gm_ops")
    m, axes = mixture(r, "in."), recorded_axes(r["kr.z3.axis.eigvecs"])
    for i, x in enumerate(r["in.samples3"].unbind(1)):
        z, theirs = mixture_to_gaussian(m, x, axes=axes), r["kr.inverse.samples3"][:, i]
        good = z.abs() < 4.5
        assert good.float().mean() > 0.9
        bound = 1e-5 + 4 * 2.0**-24 * (2 * torch.pi) ** 0.5 * (0.5 * z.square()).exp()
        assert ((z - theirs).abs() <= bound)[good].all()
        assert (theirs[z.abs() > 4.9].abs() > 4.5).all()
