"""The clock: grids, time shift and training times."""

import re
from itertools import pairwise

import pytest
import torch
from recorded import load

from gmflow_core import flow_sigmas
from gmflow_core.schedule import shift_time, substep_sigmas, training_sigmas, unshift_time

shifts = pytest.mark.parametrize("shift", [0.3, 1.0, 3.2])


@shifts
def test_shift_formula_and_inverse(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shift_time(t, shift)
    odds = (t / (1 - t))[1:-1]
    torch.testing.assert_close((sigma / (1 - sigma))[1:-1], shift * odds)
    assert sigma[0] == 0 and sigma[-1].item() == pytest.approx(1, abs=1e-15) and (sigma.diff() > 0).all()
    torch.testing.assert_close(unshift_time(sigma, shift), t, rtol=1e-14, atol=1e-15)


@shifts
@pytest.mark.parametrize("steps", [1, 3, 32])
def test_flow_sigmas(steps, shift):
    got = flow_sigmas(steps, shift)
    assert got.shape == (steps + 1,) and got.dtype == torch.float32
    assert got[0] == 1 and got[-1] == 0
    t = torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(got.double(), shift * t / (1 + (shift - 1) * t), rtol=1e-7, atol=0)


def test_denoise_keeps_the_last_intervals():
    assert torch.equal(flow_sigmas(5, 3.2, denoise=0.5), flow_sigmas(10, 3.2)[-6:])
    assert torch.equal(flow_sigmas(5, 3.2, denoise=1.0), flow_sigmas(5, 3.2))
    assert flow_sigmas(3, denoise=0.9).shape == (4,)


@shifts
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
@pytest.mark.parametrize("final_step", [0.5, 0.25, 2.0])
def test_a_last_step_of_another_length(steps, final_step, shift):
    raw = unshift_time(flow_sigmas(steps, shift, final_step=final_step).double(), shift)
    lengths = -raw.diff()
    assert raw[0] == 1 and raw[-1] == 0 and len(raw) == steps + 1
    torch.testing.assert_close(lengths[:-1], torch.full_like(lengths[:-1], 1 / (steps - 1 + final_step)),
                               rtol=0, atol=1e-6)
    assert lengths[-1].item() == pytest.approx(final_step / (steps - 1 + final_step), abs=1e-6)
    assert torch.equal(flow_sigmas(steps, shift, 0.4, final_step),
                       flow_sigmas(int(steps / 0.4), shift, 1, final_step)[-steps - 1 :])


@pytest.mark.parametrize("kwargs, word", [
    (dict(steps=4, final_step=0.0), "final_step"), (dict(steps=4, final_step=float("nan")), "final_step"),
    (dict(steps=4, final_step=float("inf")), "final_step"), (dict(steps=0), "steps"), (dict(steps=2.5), "steps"),
    (dict(steps=4, shift=0.0), "shift"), (dict(steps=4, shift=-1.0), "shift"), (dict(steps=4, denoise=0.0), "denoise"),
    (dict(steps=4, denoise=1.1), "denoise"),
])
def test_bad_grids_are_refused(kwargs, word):
    with pytest.raises(ValueError, match=word):
        flow_sigmas(**kwargs)


@shifts
def test_substeps_are_uniform_in_raw_time_and_keep_their_ends(shift):
    got = substep_sigmas(0.8, 0.3, 5, shift)
    assert got[0] == 0.8 and got[-1] == 0.3 and len(got) == 6
    raw = unshift_time(torch.tensor(got, dtype=torch.float64), shift)
    assert raw.diff().std() < 1e-15
    assert substep_sigmas(0.8, 0.3, 1, shift) == [0.8, 0.3]


def test_recorded_timesteps():
    """Every substep's timestep (1000 sigma) of the recorded GM-ODE runs. float32 there and here."""
    r = load("gm_ode")
    runs = [name[:-2] for name in r if name.endswith(".t")]
    assert len(runs) >= 4
    for run in runs:
        steps, substeps = map(int, re.search(r"_n(\d+)x(\d+)_", run).groups())
        shift = float(run.split("shift")[1])
        grid = flow_sigmas(steps, shift).tolist()
        fine = [s for a, b in pairwise(grid) for s in substep_sigmas(a, b, substeps, shift)[:-1]]
        torch.testing.assert_close(torch.tensor(fine), r[run + ".t"] / 1000, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("distribution, shift, mean, std", [
    ("uniform", 1.0, 0.0, 1.0), ("uniform", 3.2, 0.0, 1.0), ("logit-normal", 1.0, 0.0, 1.0),
    ("logit-normal", 1.0, 0.5, 0.7), ("logit-normal", 3.2, 0.0, 1.0), ("logit-normal", 3.2, 0.5, 0.7),
])
def test_recorded_time_sampler(distribution, shift, mean, std):
    """The reference's uniform sampler takes 1 - rand, as ours takes 1 - draws: one draw, one time."""
    r = load("losses")
    name = f"sampler.{distribution.replace('-', '')}.shift{shift}.mean{mean}.std{std}"
    got = training_sigmas(r[name + ".draw"], distribution, shift, mean, std)
    torch.testing.assert_close(got, r[name + ".t"] / 1000, rtol=1e-6, atol=1e-7)


def test_training_sigmas_stay_off_zero():
    draws = torch.tensor([0.0, 1.0])  # 1.0 is out of rand's range, but float32 rounds
    assert training_sigmas(draws, "uniform").tolist() == pytest.approx([1.0, 1e-7])
    assert training_sigmas(torch.tensor([-40.0, 40.0]), "logit-normal").tolist() == pytest.approx([1e-7, 1.0])


def test_training_sigmas_errors():
    with pytest.raises(ValueError, match="logit-normal"):
        training_sigmas(torch.zeros(2), "normal")
    with pytest.raises(ValueError, match="shift"):
        training_sigmas(torch.zeros(2), "uniform", shift=0.0)
