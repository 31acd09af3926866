"""GM-ODE as text-to-image adapters sample, against pi-Flow's own loop on stored mixtures (tests/data/piflow/policy).

Their mixtures do not depend on x, so that nothing amplifies an error: x is compared at every network step.
"""

import json
from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
import torch
from recorded import DATA, load, mixture

from gmflow_core import GaussianMixture, flow_sigmas, sample_gm_ode, sample_gm_sde, unguided, velocity_to_posterior
from gmflow_core.sampler import SamplerOptions, sample, temperatures
from gmflow_core.schedule import substeps_by_length

CASES = json.loads((DATA / "piflow" / "policy.json").read_text())
# Theirs: float noise adds one.
DEVIATING = {"small/n2/fsss1": [64, 64], "small/n4/fsss1": [32] * 4, "small/n8/fsss1": [16] * 8}


@pytest.mark.parametrize("name", CASES)
def test_policy(name):
    r, case, steps = load("piflow/policy"), CASES[name], CASES[name]["nfe"]
    group = name.rpartition("/")[0]
    sigmas = flow_sigmas(steps, case["shift"], final_step=case["final_step_size_scale"])
    torch.testing.assert_close(sigmas[:-1], r[f"{name}/sigma_src"], rtol=0, atol=1e-6)
    seen = []

    def denoiser(x, sigma):
        seen.append(x)
        return unguided(velocity_to_posterior(mixture(r, f"{group}/mixture{len(seen) - 1}/"), x, sigma))

    temperatures = [case["temperature"] or 1.0] * (steps - 1) + [1.0]
    final = sample_gm_ode(denoiser, r[f"{name.split('/')[0]}/noise"], sigmas, order=1, substeps=case["num_substeps"],
                          shift=case["shift"], temperature=temperatures)
    assert (torch.stack(seen) - r[f"{name}/x_src"]).abs().max() <= 1e-5
    assert (final - r[f"{name}/final"]).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("/auto")])
def test_the_recipe_is_the_authors(name):
    """Options that name nothing but the recipe: temperature and substeps are theirs."""
    r, case = load("piflow/policy"), CASES[name]
    group, used = name.rpartition("/")[0], []

    def denoiser(x, sigma):
        used.append(sigma)
        return unguided(velocity_to_posterior(mixture(r, f"{group}/mixture{len(used) - 1}/"), x, sigma))

    options = SamplerOptions(order=1, temperature=0.0, shift=3.2, recipe="piflow")
    final = sample(denoiser, r[f"{name.split('/')[0]}/noise"], flow_sigmas(case["nfe"], 3.2, final_step=0.5), options)
    assert (final - r[f"{name}/final"]).abs().max() <= 2e-5


def test_temperatures():
    """min(1, 0.1 (N - 1)) in every step but the one to 0, none with one step; a given one in the same steps."""
    for steps in range(1, 14):
        ends, stops = flow_sigmas(steps).tolist(), flow_sigmas(steps + 1).tolist()[:-1]
        usual = min(1.0, 0.1 * (steps - 1)) if steps > 1 else 1.0
        assert temperatures(ends) == pytest.approx([usual] * (steps - 1) + [1.0])
        assert temperatures(stops) == pytest.approx([usual] * steps)
        assert temperatures(ends, 0.25) == [0.25] * (steps - 1) + [1.0]


def test_the_other_recipe_is_temperature_one_and_equal_substeps():
    x, sigmas = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4), flow_sigmas(3, 2.0)
    run = lambda **options: sample(exact, x, sigmas, SamplerOptions(shift=2.0, **options))  # noqa: E731
    assert torch.equal(run(), run(temperature=0.0)) and torch.equal(run(), run(substeps=43))
    assert (run() - run(recipe="piflow", temperature=0.0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="recipe must be one of gmflow, piflow"):
        SamplerOptions(recipe="pi-flow")


@pytest.mark.parametrize("name", [name for name in CASES if "sub1" not in name])
def test_substeps_of_the_authors_loop(name):
    case = CASES[name]
    sigmas = flow_sigmas(case["nfe"], case["shift"], final_step=case["final_step_size_scale"])
    assert substeps_by_length(sigmas.tolist(), case["shift"]) == DEVIATING.get(name, case["num_substeps"])


@pytest.mark.parametrize("shift", [1.0, 3.2, 7.0])
@pytest.mark.parametrize("final_step", [0.5, 1.0])
def test_substeps_are_the_exact_ceiling(shift, final_step):
    for steps in range(1, 129):
        raw = [1 - Fraction(i) / (steps - 1 + Fraction(final_step)) for i in range(steps)] + [Fraction(0)]
        exact = [max(1, ceil(128 * (t - t_next))) for t, t_next in pairwise(raw)]
        sigmas = flow_sigmas(steps, shift, final_step=final_step)
        assert substeps_by_length(sigmas.tolist(), shift) == exact
    assert substeps_by_length([1.0, 0.999], 1.0) == [1]


# ---- one number, or one a step ---------------------------------------------------------------------


def exact(x, sigma):
    """The posterior of data drawn from two wide components, so that temperature and substeps matter."""
    means = torch.stack([x - 1, x + 1], dim=1)
    log_weights = torch.tensor([0.3, 0.7]).log().reshape(1, 2, 1, 1, 1).expand(len(x), 2, 1, *x.shape[2:])
    return unguided(GaussianMixture(means, log_weights, torch.zeros(len(x), 1, 1, 1, 1)))


@pytest.mark.parametrize("solve", [sample_gm_ode, sample_gm_sde])
def test_one_temperature_is_the_same_in_every_step(solve):
    x, sigmas = torch.linspace(-1, 1, 2 * 3 * 4).reshape(1, 2, 3, 4), flow_sigmas(3, 2.0)

    def run(temperature):
        torch.manual_seed(0)
        return solve(exact, x, sigmas, temperature=temperature)

    assert torch.equal(run(0.4), run([0.4] * 3)) and torch.equal(run(1.0), run([1.0] * 3))
    runs = [run(t) for t in (0.4, 1.0, [0.4, 1.0, 1.0], [1.0, 1.0, 0.4])]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(runs) for b in runs[:i])


def test_one_count_of_substeps_is_the_same_in_every_step():
    x, sigmas = torch.linspace(-1, 1, 2 * 3 * 4).reshape(1, 2, 3, 4), flow_sigmas(3, 2.0)
    run = lambda substeps: sample_gm_ode(exact, x, sigmas, substeps=substeps, shift=2.0)  # noqa: E731
    assert torch.equal(run(5), run([5, 5, 5])) and torch.equal(run(1), run((1, 1, 1)))
    runs = [run(n) for n in (1, 5, [5, 1, 1], [1, 1, 5])]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(runs) for b in runs[:i])


@pytest.mark.parametrize("name, value, word", [
    ("substeps", [1, 2], "3 steps, got 2"), ("substeps", [1, 0, 1], "got 0"), ("substeps", [1, 1.5, 1], "got 1.5"),
    ("temperature", [1.0] * 4, "3 steps, got 4"), ("temperature", [1.0, 1.0, 0.0], "got 0"),
])
def test_bad_sequences_are_refused(name, value, word):
    with pytest.raises(ValueError, match=f"{name} must be .*{word}"):
        sample_gm_ode(exact, torch.zeros(1, 2, 3, 4), flow_sigmas(3), **{name: value})
