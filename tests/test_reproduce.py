"""The reproduction of the paper's 2D experiments: its pieces, and a tiny run from end to end."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracle import ExactPrior

from gmflow_core import GMMLP, GaussianMixture, GMDenoiser, GMMLPConfig, flow_sigmas, sample_gm_ode
from gmflow_core.guidance import unguided
from gmflow_core.path import reanchor, reanchor_factor
from train import reproduce
from train.data.checkerboard import Checkerboard
from train.evaluate import baselines
from train.evaluate.baselines import (
    EULER,
    LAST_SIGMA,
    SCHEDULERS,
    Still,
    mean_velocity,
    sample_euler,
    sample_scheduler,
    sample_without_reanchoring,
)
from train.reproduce import ABLATION, STEPS, Row, configs, markdown, rows, run, tile

CPU = torch.device("cpu")


@pytest.fixture
def model():
    net = GMMLP(GMMLPConfig(num_gaussians=3, width=16, num_layers=2))
    net.init_weights()
    return net


@pytest.fixture
def exact():
    """An exact denoiser: smooth, so that rounding stays rounding from step to step (sin-cos features enlarge it)."""
    return ExactPrior.example(dtype=torch.float32).denoiser


class Blob(torch.nn.Module):
    """The exact vanilla network of data from N(centre, std^2 I): velocity (x - E[x_0 | x])/sigma."""

    centre = torch.tensor([1.5, -0.5])

    def __init__(self, std: float):
        super().__init__()
        self.std, self.config, self.dummy = std, GMMLPConfig(), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, labels=None):
        s, v = sigma[:, None], self.std**2
        gain = (1 - s) * v / ((1 - s) ** 2 * v + s**2)
        return (x - self.centre - gain * (x - (1 - s) * self.centre)) / s

    def mixture(self, packed):
        return GaussianMixture(packed[:, None], torch.zeros(len(packed), 1, 1), torch.zeros(len(packed), 1, 1))


# ---- settings ----------------------------------------------------------------------------------

@pytest.mark.parametrize("quick", [True, False])
def test_configurations_are_the_papers(quick):
    all_four = configs(quick)
    assert {name: c.model.num_gaussians for name, c in all_four.items()} == {"k64": 64, "k8": 8, "k1": 1, "vanilla": 1}
    for name, c in all_four.items():
        assert c.model.num_layers == 5 and c.transition_ratio == 0.9 and c.transition_weight == 1
        assert (c.loss, c.model.constant_logstd) == (("l2", 0.0) if name == "vanilla" else ("transition", None))
    assert len({(c.steps, c.batch_size, c.lr) for c in all_four.values()}) == 1
    longer = configs(quick, 30_000)
    assert {name: replace(c, steps=all_four[name].steps) for name, c in longer.items()} == all_four
    assert longer["k8"].steps == 30_000


def test_the_command_trains_as_long_as_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(trainings, out, points, device) -> dict:
        asked.append((trainings["k1"].steps, str(out)))
        return {"rows": [], "true_samples": dict.fromkeys(reproduce.FIGURES, 0.0)}

    monkeypatch.setattr(reproduce, "run", run)
    for arguments in (["--quick"], ["--quick", "--steps", "7"], ["--steps", "9"]):
        assert reproduce.main(["checkerboard", "--device", "cpu", *arguments]) == 0
    assert asked == [(2500, "runs/reproduce-checkerboard-quick"), (7, "runs/reproduce-checkerboard-quick-7"),
                     (9, "runs/reproduce-checkerboard-9")]
    assert reproduce.main(["checkerboard", "--steps", "0"]) == 2
    assert "--steps: '0' is not a whole number >= 1" in capsys.readouterr().err
    assert reproduce.main(["checkerboard", "--device", "nonsense"]) == 2
    assert "error: --device nonsense: " in capsys.readouterr().err


def test_rows_without_diffusers_keep_euler():
    assert [r.solver for r in rows(False) if r.model == "vanilla"] == [EULER]
    assert [r.solver for r in rows(True) if r.model == "vanilla"] == [EULER, *SCHEDULERS]


# ---- the ablation ------------------------------------------------------------------------------

def test_only_the_previous_mean_is_ablated(rng, monkeypatch):
    """With the re-anchoring put back it is GM-ODE 2; without, it is not; and one step has no previous mean."""
    prior = GaussianMixture.from_logits(
        torch.randn(5, 4, 2, generator=rng), torch.randn(5, 4, 1, generator=rng), torch.full((5, 1, 1), -1.0)
    )
    start = torch.randn(5, 2, generator=rng)

    def denoiser(x, sigma):  # a network that errs more at high noise, or there would be nothing to correct
        moved = GaussianMixture(prior.means * (1 + sigma), prior.log_weights, prior.log_std)
        return unguided(reanchor(moved, start, 0.9, x, sigma))

    sigmas = torch.tensor([0.9, 0.6, 0.4, 0.2])
    want = sample_gm_ode(denoiser, start, sigmas, order=2, substeps=3)
    torch.testing.assert_close(sample_without_reanchoring(denoiser, start, sigmas[:2], 3),
                               sample_gm_ode(denoiser, start, sigmas[:2], substeps=3))
    assert (sample_without_reanchoring(denoiser, start, sigmas, 3) - want).abs().max() > 0.01
    monkeypatch.setattr(baselines, "Still", lambda posterior: posterior)
    torch.testing.assert_close(sample_without_reanchoring(denoiser, start, sigmas, 3), want)


def test_a_still_posterior_keeps_its_mean(rng):
    posterior = GaussianMixture.from_logits(torch.randn(5, 4, 2, generator=rng), torch.zeros(5, 4, 1),
                                            torch.zeros(5, 1, 1))
    factor = reanchor_factor(torch.randn(5, 2, generator=rng), 0.9, torch.randn(5, 2, generator=rng), 0.5)
    assert torch.equal(Still(posterior).tilted_mean(factor), posterior.mean())
    assert not torch.allclose(posterior.tilted_mean(factor), posterior.mean(), atol=0.01)


# ---- baselines ---------------------------------------------------------------------------------

def test_euler_is_written_out(exact, rng):
    x = torch.randn(7, 2, generator=rng)
    got, s = sample_euler(exact, x, 4), flow_sigmas(4).tolist()
    for a, b in pairwise(s):
        x = x + mean_velocity(exact, x, a) * (b - a)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=0)


def test_euler_is_diffusers(exact, rng):
    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(7, 2, generator=rng)
    solver = diffusers.FlowMatchEulerDiscreteScheduler()
    got = sample_euler(exact, x, 8)
    solver.set_timesteps(sigmas=flow_sigmas(8)[:-1].tolist())
    for sigma, t in zip(solver.sigmas.tolist(), solver.timesteps, strict=False):
        x = solver.step(mean_velocity(exact, x, sigma), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_baselines_take_the_grid_of_a_time_shift(name, exact, rng, monkeypatch):
    """The sigmas at which the network is asked, but for the schedulers' first, which is next to one."""
    pytest.importorskip("diffusers")
    asked, x = [], torch.randn(3, 2, generator=rng)
    monkeypatch.setattr(baselines, "mean_velocity", lambda denoiser, x, sigma: asked.append(sigma) or x)
    sample_scheduler(exact, x, 5, name, rng, 3.0)
    assert asked[:5] == pytest.approx(flow_sigmas(5, 3.0)[:5].tolist(), abs=2e-3)
    uniform = flow_sigmas(4, 3.0)
    torch.testing.assert_close(sample_euler(exact, x, 4, 3.0), sample_gm_ode(exact, x, uniform, order=1, substeps=1))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_schedulers_reach_a_single_point(name, steps, rng):
    pytest.importorskip("diffusers")
    got = sample_scheduler(GMDenoiser(Blob(0.0)), torch.randn(6, 2, generator=rng), steps, name, rng)
    left = 6 * LAST_SIGMA.get(name, 0)  # noise
    assert torch.allclose(got, Blob.centre.expand(6, 2), atol=max(1e-3, left))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_of_every_scheduler_is_euler(name, rng):
    """From 0.999 or so instead of 1, so nearly."""
    pytest.importorskip("diffusers")
    x, model = torch.randn(6, 2, generator=rng), Blob(0.7)
    got = sample_scheduler(GMDenoiser(model), x, 1, name, rng)
    assert torch.allclose(got, sample_euler(GMDenoiser(model), x, 1), atol=0.01)


@pytest.mark.parametrize("name", [EULER, *SCHEDULERS])
def test_many_steps_reach_the_data(name, rng):
    """200 steps from noise end in N(centre, 0.7^2 I)."""
    if name in SCHEDULERS:
        pytest.importorskip("diffusers")
    x, model = torch.randn(20_000, 2, generator=rng), Blob(0.7)
    with torch.no_grad():
        if name in SCHEDULERS:
            got = sample_scheduler(GMDenoiser(model), x, 200, name, rng)
        else:
            got = sample_euler(GMDenoiser(model), x, 200)
    assert torch.allclose(got.mean(0), Blob.centre, atol=0.02)
    assert torch.allclose(got.std(0), torch.tensor(0.7), atol=0.015)


def test_sde_schedulers_repeat_their_noise(model):
    pytest.importorskip("diffusers")
    x = torch.randn(6, 2)
    with torch.no_grad():
        a, b, c = (sample_scheduler(GMDenoiser(model), x, 4, "SDE-DPM++ 2M", torch.Generator().manual_seed(s))
                   for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- pictures and tables -----------------------------------------------------------------------

def colour(image) -> list[float]:
    """Its mean red, green and blue."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(-1, 3).float().mean(0).tolist()


def test_tile_tells_inside_from_outside(rng):
    true = Checkerboard.load().batch(5000, rng)[0]
    good, bad = (colour(tile(p, 94)) for p in (true, true + torch.tensor([2.0, 0.0])))
    assert good[2] > good[0] and bad[0] > bad[2]  # blue, orange
    assert tile(torch.empty(0, 2), 94).getextrema() == ((232, 255),) * 3  # the faint board alone


def test_table_has_a_line_for_every_row():
    row = {"outside": 0.25, "kl": 0.5, "wasserstein": 0.0123, "spread": 1.0, "uneven": float("nan")}
    result = {"true_samples": row, "rows": [{"model": "k8", "solver": "GM-ODE 2", "steps": n, **row} for n in STEPS]}
    text = markdown(result)
    assert text.count("| GMFlow K=8, GM-ODE 2 |") == 5
    assert "| 25.0 % |" in text and "| 0.012 |" in text and "| - |" in text


# ---- from end to end ---------------------------------------------------------------------------

def tiny() -> dict:
    def shrink(c):
        return replace(c, steps=4, batch_size=16, save_every=2, log_every=2,
                       model=replace(c.model, width=16, num_layers=2))
    return {name: shrink(c) for name, c in configs(True).items()}


def test_a_tiny_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "STEPS", (1, 2))
    result = run(tiny(), tmp_path, 64, CPU)
    table = rows(baselines.has_diffusers())
    assert len(result["rows"]) == 2 * len(table)
    assert {p.name for p in tmp_path.iterdir()} == {"k1", "k8", "k64", "vanilla", "figures.json", "table.md",
                                                    "figure2.png", "figure3.png"}
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert stored["points"] == 64 and stored["steps"]["k64"] == 4
    assert bool(stored["left_out"]) == (not baselines.has_diffusers())
    assert ABLATION in (tmp_path / "table.md").read_text()
    for row in result["rows"]:
        assert 0 <= row["outside"] <= 1 and row["kl"] > 0 and row["wasserstein"] > 0
    again = run(tiny(), tmp_path, 64, CPU)  # finished trainings are reused, samples are the same
    numbers = [[{k: v for k, v in r.items() if v == v} for r in a["rows"]] for a in (again, result)]
    same = numbers[0] == numbers[1]
    assert same and {k: again["seconds"][k] for k in tiny()} == {k: result["seconds"][k] for k in tiny()}


def test_without_diffusers_the_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "STEPS", (1,))
    monkeypatch.setattr(reproduce, "has_diffusers", lambda: False)
    result = run(tiny(), tmp_path, 32, CPU)
    assert result["left_out"] == list(SCHEDULERS)
    assert "pip install" in capsys.readouterr().err


def test_another_configuration_in_the_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "configs", lambda quick, steps: tiny())
    monkeypatch.setattr(reproduce, "STEPS", (1,))
    assert reproduce.main(["checkerboard", "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 0
    monkeypatch.setattr(reproduce, "configs", lambda quick, steps: {k: replace(c, lr=1e-5) for k, c in tiny().items()})
    assert reproduce.main(["checkerboard", "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_row_titles():
    assert Row("k64", "GM-ODE 2").title == "GMFlow K=64, GM-ODE 2"
