"""What callers rely on, whatever the mixture: noise, batches, history, inpainting, callbacks, errors."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracle import ExactPrior
from recorded import small_network, small_spectrum

from gmflow_core import (
    GaussianMixture,
    GMDenoiser,
    Inpaint,
    Mixture,
    SecondOrder,
    add_noise,
    flow_sigmas,
    sample_gm_ode,
    sample_gm_sde,
    unguided,
)
from gmflow_core.guidance import Blend
from gmflow_core.solver import SolverHistory, correct

PRIOR = ExactPrior.example(channels=3, dtype=torch.float32)
SOLVERS = {
    "ode1": dict(solve=sample_gm_ode, order=1, substeps=3),
    "ode2": dict(solve=sample_gm_ode, order=2, substeps=3),
    "sde1": dict(solve=sample_gm_sde, order=1),
    "sde2": dict(solve=sample_gm_sde, order=2),
}
solvers = pytest.mark.parametrize("solver", SOLVERS)


def run(solver, denoiser, x, sigmas, seed=7, **kwargs):
    settings = dict(SOLVERS[solver]) | kwargs
    solve = settings.pop("solve")
    if solve is sample_gm_sde:
        settings.setdefault("noise_sampler", recorded_noise(x, seed))
    return solve(denoiser, x, sigmas, **settings)


def recorded_noise(x, seed):
    """One generator per image, so that an image's noise does not depend on its batch."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(x.shape[0])]
    return lambda sigma, sigma_next: torch.stack(
        [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators]
    )


@pytest.fixture
def x(rng):
    return torch.randn(3, 3, 4, 4, generator=rng)


def test_noise_is_asked_for_twice_a_step(x):
    calls = []

    def noise_sampler(sigma, sigma_next):
        calls.append((sigma, sigma_next))
        return torch.zeros_like(x)

    sample_gm_sde(PRIOR.denoiser, x, torch.tensor([1.0, 0.5, 0.0]), noise_sampler=noise_sampler)
    assert calls == [(1.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 0.0)]


def test_the_first_noise_draws_x_0_and_the_second_the_transition(x):
    """At sigma_next = 0 the transition's noise has no effect, elsewhere both have."""

    def final(first, second, sigmas):
        noises = iter([torch.full_like(x, first), torch.full_like(x, second)] * 2)
        return sample_gm_sde(PRIOR.denoiser, x, torch.tensor(sigmas), order=1, noise_sampler=lambda s, n: next(noises))

    base = final(0.0, 0.0, [0.8, 0.0])
    assert torch.equal(base, final(0.0, 1.0, [0.8, 0.0]))
    assert not torch.allclose(base, final(1.0, 0.0, [0.8, 0.0]))
    moved = final(0.0, 1.0, [0.8, 0.4]) - final(0.0, 0.0, [0.8, 0.4])
    r = (0.4 / 0.8) * (0.2 / 0.6)
    torch.testing.assert_close(moved, torch.full_like(x, 0.4 * math.sqrt(1 - r**2)))


def test_default_noise_is_torchs_global_generator(x):
    finals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        finals.append(sample_gm_sde(PRIOR.denoiser, x, flow_sigmas(3)))
    assert torch.equal(finals[0], finals[1]) and not torch.allclose(finals[0], finals[2])


def test_spectrum_colours_the_first_noise_only(x):
    """A spectrum of power 0 everywhere leaves z = 0; the transition's noise stays."""
    seen = []

    def silent(gaussian):
        seen.append(gaussian)
        return torch.full_like(gaussian.mean, -200.0)

    noise = recorded_noise(x, 3)
    coloured = sample_gm_sde(PRIOR.denoiser, x, flow_sigmas(2), spectrum=silent, noise_sampler=noise)
    count = iter(range(4))
    noise = recorded_noise(x, 3)
    zeroed = sample_gm_sde(
        PRIOR.denoiser, x, flow_sigmas(2), noise_sampler=lambda s, n: noise(s, n) * (next(count) % 2)
    )
    torch.testing.assert_close(coloured, zeroed, rtol=1e-4, atol=1e-4)  # z is 1e-44, not 0: another path to a root
    assert len(seen) == 2 and seen[0].mean.shape == x.shape


def network_denoiser(labels, guidance=0.3):
    return GMDenoiser(small_network(), torch.tensor(labels), guidance)


def assert_same_image(got, expected):
    """All but 2 % of the values within 1e-3. Products of another batch size round otherwise, and the
    draw of x0_hat multiplies that where its CDF is flat or two axes are near each other in variance:
    measured 2e-5 for the ODE; for the SDE one pixel of 64 differs by 2e-3."""
    assert ((got - expected).abs() > 1e-3).float().mean() <= 0.02


@solvers
def test_an_image_does_not_depend_on_its_batch(rng, solver):
    x, labels = torch.randn(3, 4, 8, 8, generator=rng), [3, 7, 1]
    together = run(solver, network_denoiser(labels), x, flow_sigmas(4))
    for i in range(3):
        alone = run(solver, network_denoiser(labels[i : i + 1]), x[i : i + 1], flow_sigmas(4), seed=7 + i)
        assert_same_image(together[i : i + 1], alone)


def test_spectral_sampling_does_not_depend_on_the_batch(rng):
    x, labels = torch.randn(2, 4, 8, 8, generator=rng), [3, 7]
    spectrum = small_spectrum()
    together = run("sde1", network_denoiser(labels), x, flow_sigmas(2), spectrum=spectrum)
    alone = run("sde1", network_denoiser(labels[1:]), x[1:], flow_sigmas(2), seed=8, spectrum=spectrum)
    assert_same_image(together[1:], alone)


@solvers
def test_no_history_leaks_between_calls(x, solver):
    denoiser = PRIOR.gaussian_denoiser
    first = run(solver, denoiser, x, flow_sigmas(4))
    run(solver, denoiser, -2 * x, flow_sigmas(3))
    assert torch.equal(run(solver, denoiser, x, flow_sigmas(4)), first)


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_first_step_of_order_two_is_of_order_one(x, kind):
    sigmas = torch.tensor([0.9, 0.4])
    denoiser = PRIOR.gaussian_denoiser
    assert torch.equal(run(kind + "1", denoiser, x, sigmas), run(kind + "2", denoiser, x, sigmas))
    longer = torch.tensor([0.9, 0.4, 0.1])
    assert not torch.allclose(run(kind + "1", denoiser, x, longer), run(kind + "2", denoiser, x, longer))


@solvers
def test_input_is_left_alone_and_output_is_like_it(x, solver):
    before = x.clone()
    got = run(solver, PRIOR.denoiser, x, flow_sigmas(3))
    assert torch.equal(x, before) and got.shape == x.shape and got.dtype == x.dtype and got.isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("space", [(), (6,), (2, 3, 2)], ids=str)
def test_any_space_ode(rng, order, space):
    """One network step of many substeps is the probability-flow ODE of the exact prior, as scipy solves it."""
    prior = ExactPrior.example(channels=3)
    x = torch.randn(2, 3, *space, generator=rng, dtype=torch.float64)
    got = sample_gm_ode(prior.denoiser, x, torch.tensor([0.9, 0.3]), order=order, substeps=200)
    expected = prior.solve_ode(x.movedim(1, -1).reshape(-1, 3), 0.9, 0.3)                       # (N,C)
    torch.testing.assert_close(got.movedim(1, -1).reshape(-1, 3), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("solver", ["sde1", "sde2"])
@pytest.mark.parametrize("space", [(6,), (2, 3, 2)], ids=str)
def test_any_space_sde(rng, solver, space):
    """An image's axes of space only say where its pixels are: the same pixels in one row are drawn the same."""
    x = torch.randn(2, 3, *space, generator=rng)
    row, noise = x.flatten(2), recorded_noise(x, 7)
    expected = run(solver, PRIOR.denoiser, x, flow_sigmas(3, 2.0))
    got = run(solver, PRIOR.denoiser, row, flow_sigmas(3, 2.0), noise_sampler=lambda *s: noise(*s).flatten(2))
    torch.testing.assert_close(got, expected.flatten(2), atol=1e-5, rtol=0)


# ---- inpainting, partial denoising -----------------------------------------------------------------


@solvers
def test_inpaint_keeps_known_pixels(x, rng, solver):
    """At every callback (each step's x) and, exactly, at the end."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, :2] = 1
    x_0, noise = torch.randn(2, *x.shape, generator=rng)
    seen = []
    got = run(solver, PRIOR.denoiser, x, flow_sigmas(4, 3.0), inpaint=Inpaint(mask, x_0, noise), callback=seen.append)
    known = (mask == 0).expand_as(x)
    for info in seen:
        expected = add_noise(x_0, noise, info.sigma)
        torch.testing.assert_close(info.x[known], expected[known], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[known], x_0[known], rtol=0, atol=1e-6)
    assert not torch.isclose(got[~known], x_0[~known], atol=1e-3).all()


def test_inpaint_blends_where_the_mask_is_between(x, rng):
    x_0, noise = torch.randn(2, *x.shape, generator=rng)
    got = Inpaint(torch.full((1, 1, 4, 4), 0.25), x_0, noise)(x, 0.6)
    torch.testing.assert_close(got, 0.25 * x + 0.75 * (0.4 * x_0 + 0.6 * noise))


def masked(mask, x_0, noise):
    """A denoiser under a noise mask, as hosts treat one: x is blended for the network, and so is what comes of x_0."""
    def denoiser(x, sigma):
        seen = torch.lerp(add_noise(x_0, noise, sigma), x, mask)
        return replace(PRIOR.denoiser(seen, sigma), blend=Blend(mask, (1 - mask) * x_0, seen))

    return denoiser


def blended(weight, x_0):
    """The exact denoiser, with a blend of its x_0 and this one."""
    return lambda x, sigma: replace(PRIOR.denoiser(x, sigma), blend=Blend(weight, (1 - weight) * x_0, x))


@solvers
def test_a_blend_is_one_of_x_0_once_a_step(x, rng, solver):
    """Against its definition: x_next of the blended x_0 is (1 - m) of a step to the known x_0 and m of the solver's
    own."""
    x_0, sigmas = torch.randn(x.shape, generator=rng), torch.tensor([0.8, 0.5])
    mask = torch.rand(1, 1, 4, 4, generator=rng)
    free = run(solver, PRIOR.denoiser, x, sigmas)
    got = run(solver, blended(mask, x_0), x, sigmas)
    if solver.startswith("ode"):
        to_known = x + (x - x_0) / 0.8 * (0.5 - 0.8)
        torch.testing.assert_close(got, mask * free + (1 - mask) * to_known, atol=1e-5, rtol=0)
    else:  # the noise of the transition is the same, so x_next is affine in x_0
        known, doubled = (run(solver, blended(weight, x_0), x, sigmas) for weight in (0.0, 2.0))
        torch.testing.assert_close(got, mask * free + (1 - mask) * known, atol=1e-5, rtol=0)
        torch.testing.assert_close(doubled, 2 * free - known, atol=1e-5, rtol=0)
    opened = run(solver, blended(1.0, torch.zeros_like(x)), x, sigmas)
    torch.testing.assert_close(opened, free, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_a_network_that_sees_another_x(x, order):
    """Euler's rule with x_0 = what the network makes of its own x; without substeps that is the whole definition."""
    sigmas, y, history = torch.tensor([0.9, 0.6, 0.2]), x, None

    def denoiser(x, sigma):
        return replace(PRIOR.denoiser(0.9 * x, sigma), blend=Blend(1.0, torch.zeros_like(x), 0.9 * x))

    for s, s_next in ((0.9, 0.6), (0.6, 0.2)):
        guided = PRIOR.denoiser(0.9 * y, s)
        posterior, _ = correct(guided, 0.9 * y, s, s - s_next, history, SecondOrder())
        history = SolverHistory(guided.posterior, 0.9 * y, s, s - s_next) if order == 2 else None
        y = y + (y - posterior.mean()) / s * (s_next - s)
    torch.testing.assert_close(sample_gm_ode(denoiser, x, sigmas, order=order), y, atol=1e-5, rtol=0)


@solvers
def test_a_known_pixel_stays_known(x, rng, solver):
    x_0, noise = torch.randn(2, *x.shape, generator=rng)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    seen = []
    got = run(solver, masked(mask, x_0, noise), noise.clone(), flow_sigmas(4, 3.0), callback=seen.append)
    torch.testing.assert_close(got[..., 2:], x_0[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[-1].denoised[..., 2:], x_0[..., 2:], rtol=0, atol=1e-5)
    assert not torch.isclose(got[..., :2], x_0[..., :2], atol=1e-3).all()


@pytest.mark.parametrize("value", [0.5, 0.9, 0.98])
def test_a_soft_mask_does_not_harden_with_substeps(rng, value):
    """The distance to the source: Euler's by its own formula, and GM-ODE's whatever the substeps."""
    x_0, noise = torch.randn(2, 40, 3, 4, 4, generator=rng)
    mask, sigmas = torch.full((1, 1, 4, 4), value), flow_sigmas(8)
    x, denoiser = noise, masked(mask, x_0, noise)
    for s, s_next in pairwise(sigmas):
        guided = denoiser(x, float(s))
        x = torch.lerp(guided.blend(guided.posterior.mean()), x, float(s_next / s))
    euler = (x - x_0).abs().mean()
    for order in (1, 2):
        images = (sample_gm_ode(denoiser, noise, sigmas, order=order, substeps=n) for n in (1, 4, 16, 64))
        found = [(image - x_0).abs().mean() / euler for image in images]
        assert max(found) < 1.1 * found[0] and min(found) > 0.9 * found[0] and 0.8 < found[0] < 1.2, (order, found)
        assert order == 2 or found[0] == pytest.approx(1, abs=1e-4)


def test_interrupts(x):
    """Before every substep and every draw; what it raises ends the run there."""
    calls = []

    def third():
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    sample_gm_ode(PRIOR.denoiser, x, flow_sigmas(2), substeps=5, interrupt=lambda: calls.append(0))
    assert len(calls) == 10
    calls.clear()
    sample_gm_sde(PRIOR.denoiser, x, flow_sigmas(2), interrupt=lambda: calls.append(0))
    assert len(calls) == 2
    for solve, settings in ((sample_gm_ode, dict(substeps=64)), (sample_gm_sde, {})):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            solve(PRIOR.denoiser, x, flow_sigmas(4), interrupt=third, **settings)
        assert len(calls) == 3


@pytest.mark.parametrize("name", ["c_a", "c_b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_coefficients_are_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        SecondOrder(**{name: value})


def test_inpaint_everywhere_open_changes_nothing(x):
    free = Inpaint(torch.ones(1), torch.zeros_like(x), torch.zeros_like(x))
    closed = run("ode2", PRIOR.denoiser, x, flow_sigmas(4), inpaint=free)
    torch.testing.assert_close(closed, run("ode2", PRIOR.denoiser, x, flow_sigmas(4)))


@solvers
def test_start_from_a_later_sigma(solver, rng):
    """A partly noised image: steps end at 0 and stay near the image they came from."""
    image = PRIOR.means[torch.randint(4, (1, 4, 4), generator=rng)].movedim(-1, 1)
    sigmas = flow_sigmas(4, denoise=0.25)
    assert sigmas[0] == 0.25
    x = add_noise(image, torch.randn(image.shape, generator=rng), sigmas[0].item())
    got = run(solver, ExactPrior(PRIOR.means, PRIOR.weights, 0.05).denoiser, x, sigmas)
    assert (got - image).abs().max() < 0.3  # the components are 1.5 apart and 0.05 wide


# ---- callback --------------------------------------------------------------------------------------


@solvers
def test_callback_sees_every_step(x, solver):
    seen, asked = [], []

    def denoiser(x, sigma):
        asked.append((x, sigma))
        return PRIOR.gaussian_denoiser(x, sigma)

    sigmas = flow_sigmas(4, 2.0)
    run(solver, denoiser, x, sigmas, callback=seen.append)
    assert [info.index for info in seen] == [0, 1, 2, 3] and {info.steps for info in seen} == {4}
    assert [info.sigma for info in seen] == sigmas[:-1].tolist()
    assert [info.sigma_next for info in seen] == sigmas[1:].tolist()
    for info, (x_asked, sigma) in zip(seen, asked, strict=True):
        assert info.x is x_asked and info.sigma == sigma
        torch.testing.assert_close(info.denoised, info.posterior.mean())
        assert isinstance(info.posterior, Mixture)
    assert torch.equal(seen[0].x, x)
    corrected = [info.posterior is not info.guided.posterior for info in seen]
    assert corrected == [False] + [solver.endswith("2")] * 3


def test_an_exception_in_the_callback_stops_the_run(x):
    class Cancelled(Exception):
        pass

    def cancel(info):
        if info.index == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        run("ode2", PRIOR.denoiser, x, flow_sigmas(4), callback=cancel)


# ---- errors ----------------------------------------------------------------------------------------


def never(x, sigma):
    raise AssertionError("the denoiser must not be asked before the settings are checked")


@solvers
@pytest.mark.parametrize(
    "sigmas", [[0.5], [], [0.5, 0.7], [0.5, 0.5, 0.0], [1.2, 0.5], [0.5, -0.1], [math.nan, 0.0]], ids=str
)
def test_bad_sigmas_are_refused(x, solver, sigmas):
    with pytest.raises(ValueError, match="sigmas must"):
        run(solver, never, x, torch.tensor(sigmas))


@pytest.mark.parametrize("solver, kwargs, word", [
    ("ode1", dict(order=3), "order"), ("sde1", dict(order=0), "order"),
    ("ode1", dict(substeps=0), "substeps"), ("ode1", dict(substeps=1.5), "substeps"),
    ("ode1", dict(shift=0.0), "shift"), ("ode1", dict(shift=-2.0), "shift"),
])
def test_bad_settings_are_refused(x, solver, kwargs, word):
    with pytest.raises(ValueError, match=word):
        run(solver, never, x, flow_sigmas(2), **kwargs)


def test_a_bad_temperature_is_refused(x):
    with pytest.raises(ValueError, match="temperature"):
        run("ode1", PRIOR.denoiser, x, flow_sigmas(2), temperature=0.0)


def test_unguided_denoisers_may_have_one_component(x):
    """N(x/2, I) as posterior: one step by hand; in several it is two equal components of half the weight each."""
    def of(k):
        def denoiser(x, sigma):
            means = (0.5 * x).unsqueeze(1).repeat(1, k, 1, 1, 1)
            logits = torch.full_like(means[:, :, :1], -math.log(k))
            return unguided(GaussianMixture(means, logits, torch.zeros(3, 1, 1, 1, 1)))
        return denoiser

    s, t = 0.8, 0.3
    z, e = (draw.expand_as(x) for draw in torch.randn((2, 3, 1, 4, 4)))  # equal in all channels, whose order is open
    x_0, noise = 0.5 * x + z, iter((z, e, z, e))
    r = t / s * (1 - s) / (1 - t)
    expected = r * t / s * x + (1 - r**2) * (1 - t) * x_0 + (1 - r**2) ** 0.5 * t * e
    for order in ("sde1", "sde2"):
        got = run(order, of(1), x, torch.tensor([s, t]), noise_sampler=lambda *step: next(noise))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(run(order, of(1), x, flow_sigmas(3)), run(order, of(2), x, flow_sigmas(3)),
                                   atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", [sample_gm_ode, sample_gm_sde])
def test_half_precision_noise_is_computed_in_float32(dtype, solver):
    torch.manual_seed(0)
    x, sigmas = torch.randn(2, 3, 4, 4).to(dtype), flow_sigmas(3)
    noise = lambda s, t: torch.ones(2, 3, 4, 4)  # noqa: E731
    options = {"substeps": 3} if solver is sample_gm_ode else {"noise_sampler": noise}
    sample = solver(PRIOR.denoiser, x, sigmas, **options)
    assert sample.dtype == torch.float32 and torch.equal(sample, solver(PRIOR.denoiser, x.float(), sigmas, **options))


def test_sigmas_that_float32_cannot_square():
    with pytest.raises(ValueError, match="0 or at least 1e-12, got 1e-20"):
        sample_gm_ode(PRIOR.denoiser, torch.zeros(1, 3, 4, 4), torch.tensor([1.0, 1e-20, 0.0]))
