"""The solvers against the authors' implementation, on a small random network.

``floor`` is how far their own final latents move when the initial noise moves by 1e-6: agreement
can only be asked for as a multiple of it. Steps are also compared one by one from the recorded x_t,
where nothing accumulates.
"""

import re

import pytest
import torch
from recorded import (
    LABELS,
    assert_close,
    assert_same_mixture,
    load,
    mixture,
    recorded_axes,
    small_network,
    small_spectrum,
)

from gmflow_core import (
    GaussianMixture,
    GMDenoiser,
    Inpaint,
    SecondOrder,
    flow_sigmas,
    guide_probabilistic,
    sample_gm_ode,
    sample_gm_sde,
    solver as solver_module,
    unguided,
)
from gmflow_core.path import reanchor_factor, reverse_step

ODE_RUNS = sorted(name[: -len(".final")] for name in load("gm_ode") if name.endswith(".final"))
ODE_TRACES = sorted(name[: -len(".x_t")] for name in load("gm_ode") if name.endswith(".x_t"))
SDE_RUNS = sorted(name[: -len(".final")] for name in load("gm_sde") if name.endswith(".final") and "_spec_" in name)
SDE_PLAIN = "o2_n4_g0.3_nospec_corr0_shift1.0"


class Run:
    """The settings in a run's name, as what our solvers take."""

    def __init__(self, name: str):
        number = r"([\d.]+)"
        self.order, self.steps = map(int, re.match(r"o(\d)_n(\d+)", name).groups())
        self.substeps = int((re.search(r"_n\d+x(\d+)", name) or [0, 1])[1])
        self.guidance = float(re.search(f"_g{number}", name)[1])
        self.orthogonal = float((re.search(f"_orth{number}", name) or [0, 1])[1])
        self.second_order = SecondOrder(correction_steps=int(re.search(r"_corr(\d)", name)[1]))
        self.shift = float(re.search(f"_shift{number}$", name)[1])

    def denoiser(self, network):
        return GMDenoiser(network, LABELS, self.guidance, self.orthogonal)

    def sigmas(self):
        return flow_sigmas(self.steps, self.shift)


@pytest.fixture(scope="module")
def network():
    return small_network()


# ---- GM-ODE ----------------------------------------------------------------------------------------


def test_all_runs_are_here():
    assert len(ODE_RUNS) == 42 and len(ODE_TRACES) == 4 and len(SDE_RUNS) == 5


@pytest.mark.parametrize("name", ODE_RUNS)
def test_gm_ode_trajectory(network, name):
    r, run = load("gm_ode"), Run(name)
    got = sample_gm_ode(
        run.denoiser(network), r["noise"], run.sigmas(), order=run.order, substeps=run.substeps, shift=run.shift,
        second_order=run.second_order,
    )
    assert distance(got, r[name + ".final"]) <= 20 * r[name + ".floor"].item()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).abs().max().item()


def through(x: torch.Tensor, sigma: float, y: torch.Tensor, sigma_next: float) -> Inpaint:
    """An Inpaint without unknown pixels: x at sigma and y at sigma_next, whatever the solver does."""
    a, a_next = 1 - sigma, 1 - sigma_next
    determinant = a * sigma_next - a_next * sigma
    x_0 = (sigma_next * x - sigma * y) / determinant
    noise = (a * y - a_next * x) / determinant
    return Inpaint(torch.zeros(1), x_0, noise)


def last_posterior(denoiser, sigmas, inpaint, **settings) -> GaussianMixture:
    """The posterior in use at the last of ``sigmas``' steps, the steps before being its history."""
    seen = []
    sample_gm_ode(denoiser, torch.zeros_like(inpaint.x_0), sigmas, inpaint=inpaint, callback=seen.append, **settings)
    return seen[-1].posterior


@pytest.mark.parametrize("name", ODE_TRACES)
def test_gm_ode_step_by_step(network, name):
    """Every network step's and substep's x0_hat from the recorded x_t and, at order 2, from the
    recorded x_t of the step before; then the move to the next recorded x_t."""
    r, run = load("gm_ode"), Run(name)
    x_t, x_0, grid = r[name + ".x_t"], r[name + ".x0"], run.sigmas()
    times = (r[name + ".t"] / 1000).tolist()
    n = run.substeps
    for i in range(run.steps):
        first = max(i - 1, 0) if run.order == 2 else i
        here, there = x_t[first * n], x_t[i * n] if i > first else torch.zeros_like(x_t[0])
        sigma, later = float(grid[first]), float(grid[first + 1])
        posterior = last_posterior(
            run.denoiser(network), grid[first : i + 2], through(here, sigma, there, later),
            order=run.order, second_order=run.second_order,
        )
        for j in range(i * n, i * n + n):
            factor = reanchor_factor(x_t[i * n], times[i * n], x_t[j], times[j])
            assert_close(posterior.mean() if j == i * n else posterior.tilted_mean(factor), x_0[j], 5e-5)


@pytest.mark.parametrize("name", [name for name in ODE_TRACES if name.startswith("o1")])
def test_gm_ode_steps_between_network_calls(network, name):
    """From each recorded x_t at order 1, one network step with its substeps lands on the next one."""
    r, run = load("gm_ode"), Run(name)
    x_t, grid = torch.cat([r[name + ".x_t"], r[name + ".final"][None]]), run.sigmas()
    for i in range(run.steps):
        got = sample_gm_ode(
            run.denoiser(network), x_t[i * run.substeps], grid[i : i + 2], order=1, substeps=run.substeps,
            shift=run.shift,
        )
        assert_close(got, x_t[(i + 1) * run.substeps], 2e-5)


@pytest.mark.parametrize("scale", [0.0, 0.7])
@pytest.mark.parametrize("corrections", [0, 2])
def test_recorded_second_order(scale, corrections):
    """One correction on given mixtures: from (x_a, 0.8) to (x_b, 0.6) with h_prev 0.2, h 0.3."""
    r = load("gm_ops")
    cond = mixture(r, "in.")
    uncond = GaussianMixture(r["in.uncond_means"], r["in.uncond_logweights"], r["in.uncond_logstds"])
    previous = GaussianMixture(0.9 * uncond.means, uncond.log_weights, uncond.log_std)

    def denoiser(x, sigma):
        return unguided(previous) if sigma > 0.7 else guide_probabilistic(cond, uncond, scale)

    inpaint = through(r["in.x_a"], 0.8, r["in.x_b"], 0.6)
    options = SecondOrder(correction_steps=corrections)
    got = last_posterior(denoiser, torch.tensor([0.8, 0.6, 0.3]), inpaint, order=2, second_order=options)
    expected = mixture(r, f"gm_2nd_order.s{scale}.corr{corrections}.gm.")
    assert_same_mixture(got, expected, 1e-5)


# ---- GM-SDE ----------------------------------------------------------------------------------------


def draws(r, name):
    keys = sorted(key for key in r if key.startswith(name + ".draw"))
    return [r[key] for key in keys]


@pytest.mark.parametrize("name", SDE_RUNS)
def test_gm_sde_trajectory(network, monkeypatch, name):
    """Their draws in their order and their eigenvectors, whose signs matter, in a whole trajectory.

    The spectrum network is to be shown N(m', v'), the *target* of the guidance and the correction,
    not the moments of the tilted mixture: the runs with guidance or order 2 tell them apart.
    """
    r, run = load("gm_sde"), Run(name)
    axes = iter(recorded_axes(r[f"{name}.eigh{i:03d}.eigvecs"]) for i in range(run.steps))
    transport = solver_module.gaussian_to_mixture
    monkeypatch.setattr(solver_module, "gaussian_to_mixture", lambda m, z: transport(m, z, axes=next(axes)))
    noise = iter(draws(r, name))
    seen = []
    got = sample_gm_sde(
        run.denoiser(network), r["noise"], run.sigmas(), order=run.order, spectrum=small_spectrum(),
        noise_sampler=lambda sigma, sigma_next: next(noise).reshape(r["noise"].shape),
        second_order=run.second_order, callback=seen.append,
    )
    assert next(noise, None) is None and next(axes, None) is None
    xs = [*(info.x for info in seen), got]
    for x, expected in zip(xs, [*r[name + ".x_t"], r[name + ".final"]], strict=True):
        assert distance(x, expected) <= 2 * r[name + ".floor"].item()


@pytest.mark.parametrize("name", [*SDE_RUNS, SDE_PLAIN])
def test_recorded_transitions(name):
    """x_t, x0_hat and the transition noise to the next x_t. Without a spectrum network theirs draws
    component indices and a normal (two draws) for x0_hat where ours has one: the last of each step
    is the transition's either way."""
    r = load("gm_sde")
    grid, x_t = flow_sigmas(4).tolist(), torch.cat([r[name + ".x_t"], r[name + ".final"][None]])
    recorded = draws(r, name)
    per_step = len(recorded) // 4
    for i in range(4):
        got = reverse_step(x_t[i], r[name + ".x0"][i], recorded[per_step * (i + 1) - 1], grid[i], grid[i + 1])
        assert_close(got, x_t[i + 1], 2e-6)
