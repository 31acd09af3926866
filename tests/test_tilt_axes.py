"""Tilts with another precision at each pixel, channel or axis: against dense Gaussian algebra,
a grid integral and draws."""

import pytest
import torch
from oracle import projected_cdf, random_mixture
from scipy.stats import kstest
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from gmflow_core import GaussianFactor, GaussianMixture, gaussian_to_mixture, mixture_to_gaussian
from gmflow_core.gaussian import axes_along, diagonal, diagonalise, solve, turn, turn_back
from gmflow_core.mixture import TiltedMixture, TurnedMixture
from gmflow_core.path import Reanchoring, likelihood_factor, reanchor_factor

F64 = torch.float64
SPACE = (3, 4)


def normal(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=F64)


def random_axes(rng, c=3, space=SPACE):
    """Orthonormal axes (2,C,C,*S), of a QR decomposition."""
    return torch.linalg.qr(normal(rng, 2, *space, c, c)).Q.movedim((-2, -1), (1, 2))


def factors(rng, c=3, space=SPACE):
    """One of every kind: per sample, per pixel, per channel, along axes."""
    ones, positive = (1,) * len(space), lambda *shape: torch.rand(shape, generator=rng, dtype=F64) + 0.1
    shift = lambda: normal(rng, 2, c, *space)  # noqa: E731
    return {
        "sample": GaussianFactor(positive(2, 1, *ones), shift()),
        "pixel": GaussianFactor(positive(2, 1, *space), shift()),
        "channel": GaussianFactor(positive(2, c, *space), shift()),
        "axes": GaussianFactor(positive(2, c, *space), shift(), random_axes(rng, c, space)),
    }


def dense_tilt(m, *factors):
    """The tilted mixture in torch.distributions, batch (B,*S): every component's Gaussian algebra with full
    matrices."""
    last = lambda t, *axes: t.movedim(axes, tuple(range(-len(axes), 0)))  # noqa: E731
    c = m.channels
    v = last(m.var.expand(m.mean().shape), 1)[..., None, :]                                    # (B,*S,1,C)
    means, logits = last(m.means, 1, 2), last(m.log_weights.squeeze(2), 1)                     # (B,*S,K,C), (B,*S,K)
    matrix = sum(dense_precision(f, c, m) for f in factors)[..., None, :, :]                   # (B,*S,1,C,C)
    shift = sum(last(f.shift, 1) for f in factors)[..., None, :]                               # (B,*S,1,C)
    cov = torch.linalg.inv(torch.diag_embed(1 / v) + matrix)
    tilted = (cov @ (means / v + shift)[..., None])[..., 0]
    # N(x; mean, v) exp(h.x - x.Lambda x / 2) integrates to this, up to what all components share.
    inverse = torch.linalg.inv(cov)
    logits = (logits + 0.5 * (tilted[..., None, :] @ inverse @ tilted[..., None]).squeeze((-2, -1)) - 0.5
              * (means**2 / v).sum(-1))
    return MixtureSameFamily(Categorical(logits=logits), MultivariateNormal(tilted, cov.expand(*tilted.shape, c)))


def dense_precision(f, c, m):
    """Lambda as matrices (B,*S,C,C)."""
    shape = (2, c, *m.mean().shape[2:])
    diagonal = torch.diag_embed(f.precision.expand(shape).movedim(1, -1))
    if f.axes is None:
        return diagonal
    axes = f.axes.movedim((1, 2), (-2, -1))
    return axes @ diagonal @ axes.mT


def dense_cov(d):
    mean, w = d.component_distribution.mean, d.mixture_distribution.probs[..., None, None]
    offset = mean - d.mean[..., None, :]
    return (w * (d.component_distribution.covariance_matrix + offset[..., None] * offset[..., None, :])).sum(-3)


def assert_same_law(got, d, rng):
    """Mean, covariances and log densities of a mixture (B,C,*S) are those of a distribution of batch (B,*S)."""
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)  # noqa: E731
    cov = dense_cov(d)
    close(got.mean(), d.mean.movedim(-1, 1))
    close((got.weights * got.means).sum(1), got.mean())
    close(got.pixel_covariance(), cov.movedim((-2, -1), (1, 2)))
    close(got.channel_var(), cov.diagonal(dim1=-2, dim2=-1).movedim(-1, 1))
    close(got.covariance(), cov.reshape(len(cov), -1, *cov.shape[-2:]).mean(1))
    close(got.moments().var.squeeze(1), cov.diagonal(dim1=-2, dim2=-1).mean(-1))
    b = normal(rng, *got.mean().shape)
    along = torch.einsum("b...c,b...cd,b...d->b...", b.movedim(1, -1), cov, b.movedim(1, -1))
    close(got.variance_along(b).squeeze(1), along)
    flat = got.isotropic()
    assert flat.log_std.shape[2] == 1
    close(flat.moments().var, got.moments().var)
    x = got.mean() + normal(rng, *got.mean().shape)
    close(got.log_prob(x), d.log_prob(x.movedim(1, -1)))


KINDS = ["sample", "pixel", "channel", "axes"]


@pytest.mark.parametrize("c, space", [(3, SPACE), (1, (5,)), (2, ())], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tilt_is_the_product_of_densities(rng, kind, c, space):
    m = random_mixture(rng, c=c, space=space)
    f = factors(rng, c, space)[kind]
    assert_same_law(m.tilt(f), dense_tilt(m, f), rng)
    torch.testing.assert_close(m.tilted_mean(f), m.tilt(f).mean())


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_tilts_add_whatever_their_kinds(rng, first, second):
    m, f, g = random_mixture(rng, c=3), factors(rng)[first], factors(rng)[second]
    expected = dense_tilt(m, f, g)
    assert_same_law(m.tilt(f).tilt(g), expected, rng)
    assert_same_law(m.tilt(f + g), expected, rng)
    assert_same_law(m.tilt(f + g - f), dense_tilt(m, g), rng)
    torch.testing.assert_close((f + g).matrix(), dense_precision(f, 3, m).movedim((-2, -1), (1, 2)) + g.matrix())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tilt_can_be_moved_and_sharpened(rng, kind):
    m, f = random_mixture(rng, c=3), factors(rng)[kind]
    by, t = normal(rng, 2, 3, *SPACE), 0.6
    expected = dense_tilt(m, f)
    components = expected.component_distribution
    moved = MultivariateNormal(components.mean + by.movedim(1, -1).unsqueeze(-2), components.covariance_matrix)
    assert_same_law(m.tilt(f).shifted(by), MixtureSameFamily(expected.mixture_distribution, moved), rng)
    sharp = MixtureSameFamily(Categorical(logits=expected.mixture_distribution.logits / t),
                              MultivariateNormal(components.mean, t * components.covariance_matrix))
    assert_same_law(m.tilt(f).temperature(t), sharp, rng)
    g = factors(rng)["pixel"]
    again = dense_tilt(m, f, g)  # what is moved back is tilted as if it had never been away
    assert_same_law(m.tilt(f).shifted(by).shifted(-by).tilt(g), again, rng)


@pytest.mark.parametrize("kind", KINDS)
def test_tilts_are_reanchored(rng, kind):
    m, f = random_mixture(rng, c=3), factors(rng)[kind]
    x, y = normal(rng, 2, 2, 3, *SPACE)
    later = Reanchoring(m.tilt(f), x, 0.9, [0.6, 0.2])
    for i, sigma in enumerate((0.6, 0.2)):
        expected = dense_tilt(m, f, reanchor_factor(x, 0.9, y, sigma)).mean.movedim(-1, 1)
        torch.testing.assert_close(later.mean(i, y), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(m.tilt(f).tilted_mean(likelihood_factor(y, sigma)),
                                   dense_tilt(m, f, likelihood_factor(y, sigma)).mean.movedim(-1, 1),
                                   rtol=1e-9, atol=1e-10)


def test_a_precision_per_channel_knows_no_other_axes_once_its_base_is_lost(rng):
    m, f = random_mixture(rng, c=3), factors(rng)
    stored = m.tilt(f["channel"]).map(lambda t: t)
    with pytest.raises(ValueError, match="other axes"):
        stored.tilt(f["axes"])


@pytest.mark.parametrize("draw", ["transport", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_tilted_distribution(rng, kind, draw):
    """20000 draws in four directions, as in the tests of plain mixtures: KS at p < 1e-3."""
    one = random_mixture(rng, b=1, k=3, c=3, space=(), spread=2.0)
    n = 20_000
    m = one.map(lambda t: t[..., None].expand(*t.shape, n if t is not one.log_std else 1))
    f = factors(rng, 3, (1,))[kind]

    def many(t, fixed=False):
        return None if t is None else t[:1].expand(1, *t.shape[1:-1], 1 if fixed else n)

    f = GaussianFactor(many(f.precision, kind == "sample"), many(f.shift), many(f.axes))
    tilted = m.tilt(f)
    x = tilted.sample(rng) if draw == "sample" else gaussian_to_mixture(tilted, normal(rng, 1, 3, n))
    first = tilted.map(lambda t: t[..., :1])
    pixel = f.axes[0, :, :, 0] if kind == "axes" else torch.eye(3, dtype=F64)
    # Along each axis, and one across: there the variance of a component is that of its axes, weighted.
    var = (tilted.inner.var if kind == "axes" else tilted.var).expand(1, 3, -1)[0, :, 0]
    for direction in [*torch.eye(3, dtype=F64), torch.full((3,), 3**-0.5, dtype=F64)]:
        v = (direction.square() * var).sum()
        along = GaussianMixture(first.means, first.log_weights, 0.5 * v.log().reshape(1, 1, 1, 1))
        d = pixel @ direction
        assert kstest((d @ x[0]).numpy(), projected_cdf(along.map(lambda t: t[..., 0]), d)).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_to_gaussians_and_back(rng, kind):
    m = random_mixture(rng, c=3).tilt(factors(rng)[kind])
    z = normal(rng, 2, 3, *SPACE)
    torch.testing.assert_close(mixture_to_gaussian(m, gaussian_to_mixture(m, z)), z, rtol=1e-6, atol=1e-6)


def test_what_has_one_precision_a_sample_takes_the_plain_way(rng):
    """No tensor of a pixel's size more than before: the variance stays one number, and nothing is turned."""
    m = random_mixture(rng, c=3)
    f = factors(rng)["sample"]
    tilted = m.tilt(f).tilt(f)
    assert type(tilted) is TiltedMixture and tilted.var.shape == (2, 1, 1, 1)
    assert tilted.log_std.shape == (2, 1, 1, 1, 1)
    assert type(m.tilt(factors(rng)["axes"]).tilt(f)) is TurnedMixture


# ---- axes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 2, 3, 5])
def test_axes_along_a_direction_are_orthonormal_and_begin_with_it(rng, c):
    d = normal(rng, 2, c, *SPACE)
    d = d / d.norm(dim=1, keepdim=True)
    d[:, :, 0, 0] = torch.eye(c, dtype=F64)[0]
    d[:, :, 0, 1] = -torch.eye(c, dtype=F64)[0]
    axes = axes_along(d)
    gram = torch.einsum("bcj...,bcl...->bjl...", axes, axes)
    torch.testing.assert_close(gram, diagonal(torch.ones_like(d)))
    torch.testing.assert_close((axes[:, :, 0] * d).sum(1).abs(), torch.ones_like(d[:, 0]))


def test_turning_back_is_the_inverse_of_turning(rng):
    axes, x, many = random_axes(rng), normal(rng, 2, 3, *SPACE), normal(rng, 2, 5, 3, *SPACE)
    torch.testing.assert_close(turn_back(turn(x, axes), axes), x)
    torch.testing.assert_close(turn_back(turn(many, axes), axes), many)
    torch.testing.assert_close(turn(x, axes)[1, 2, 0, 1], axes[1, :, 2, 0, 1] @ x[1, :, 0, 1])


def test_eigenvectors_and_linear_equations_per_pixel(rng):
    root = normal(rng, 2, 3, 3, *SPACE)
    matrix = torch.einsum("bcj...,bdj...->bcd...", root, root) + diagonal(torch.full((2, 3, *SPACE), 0.1, dtype=F64))
    values, axes = diagonalise(matrix)
    torch.testing.assert_close(GaussianFactor(values, torch.zeros_like(values), axes).matrix(), matrix)
    x = normal(rng, 2, 3, *SPACE)
    torch.testing.assert_close(solve(matrix, torch.einsum("bcd...,bd...->bc...", matrix, x)), x)
