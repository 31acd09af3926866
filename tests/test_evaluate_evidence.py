"""The evaluation of evidence: its operators against their definitions, its tasks against what digits are."""

import json
from pathlib import Path

import pytest
import torch
from test_evidence import Inks

from gmflow_core import GaussianMixture, GMDenoiser, load_checkpoint
from gmflow_core.inspection.statistics import statistics
from gmflow_core.inspection.trace import Recorder
from train.data.digits import INKS, Digits
from train.evaluate.digits_metrics import dominant_inks
from train.evaluate.evidence import choices, main
from train.evaluate.evidence_exact import CASES, WEIGHTS, InkNetwork, exact_shares, inks
from train.evaluate.evidence_methods import METHODS, Problem, gaussian_of, weigh
from train.evaluate.evidence_tasks import TASKS, Truth

ROOT = Path(__file__).parents[1]


@pytest.fixture
def images(rng):
    return torch.rand(3, 3, 16, 16, generator=rng) * 2 - 1


@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_shows(name, images, rng):
    """A^T is the adjoint of A, A A^T = scale I, and a projection shows what the other picture shows."""
    task = TASKS[name](images, torch.Generator().manual_seed(1))
    x, y = (torch.randn(images.shape, generator=rng) for _ in range(2))
    seen = task.observe(y)
    torch.testing.assert_close((task.observe(x) * seen).sum(), (x * task.adjoint(seen)).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(task.observe(task.adjoint(seen)), task.scale * seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.observe(task.project(x, y)), seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_weight_of_a_residual(name, images, rng):
    """(A V A^T + s_y^2 I)^-1 for V = v I, given as a number or as matrices."""
    task = TASKS[name](images, torch.Generator().manual_seed(1))
    residual = task.observe(torch.randn(images.shape, generator=rng))
    matrices = 0.3 * torch.eye(3).reshape(1, 3, 3, 1, 1).expand(3, 3, 3, 16, 16)
    expected = residual / (0.3 * task.scale + task.std**2)
    torch.testing.assert_close(weigh(task, residual, 0.3), expected)
    torch.testing.assert_close(weigh(task, residual, matrices), expected, rtol=1e-4, atol=1e-4)


def test_one_gaussian_has_the_mixtures_moments(rng):
    m = GaussianMixture.from_logits(torch.randn(2, 4, 3, 5, generator=rng), torch.randn(2, 4, 1, 5, generator=rng),
                                    torch.zeros(2, 1, 1, 1))
    got = gaussian_of(m)
    assert got.components == 1
    torch.testing.assert_close(got.mean(), m.mean())
    torch.testing.assert_close(got.moments().var, m.moments().var)


def test_true_digits_are_in_their_inks():
    truth = Truth.choose(Digits.load(), 24, torch.Generator().manual_seed(0))
    assert truth.labels[:12].tolist() == [*range(10), 0, 1] and set(truth.inks.tolist()) <= set(range(len(INKS)))
    assert torch.equal(dominant_inks(truth.images), truth.inks)
    assert dominant_inks(-torch.ones(1, 3, 4, 4)).tolist() == [-1] and "tilt + echo" in METHODS


# ---- the prior that is known exactly ---------------------------------------------------------------


def test_the_exact_priors_network_is_the_joint_posterior(rng):
    """Every pixel's marginal, against the tests' own prior of the same inks, at a sigma for each image."""
    oracle, x = Inks(3), torch.randn(2, 2, 3, generator=rng, dtype=torch.float64)
    denoiser = GMDenoiser(InkNetwork())
    for sigma in (1.0, 0.6, 0.05):
        got = denoiser(x[..., None].float(), sigma).posterior
        expected = oracle.posterior(x, sigma)
        torch.testing.assert_close(got.means[..., 0], expected.means.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.weights[..., 0], expected.weights.float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got.var.flatten(), expected.var[..., 0].float().flatten(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_exact_shares_by_enumeration(name):
    """A draw of x_0 from the prior, weighed by its likelihood."""
    case, n = CASES[name], 200_000
    g = torch.Generator().manual_seed(1)
    ink = torch.multinomial(torch.tensor(WEIGHTS), n, replacement=True, generator=g)
    log_w = torch.zeros(n)
    for _ in range(case.pixels):
        x = inks()[ink] + 0.25 * torch.randn(n, 2, generator=g)
        log_w -= 0.5 * (x - torch.tensor(case.y)).square().sum(1) / case.std**2
    expected = torch.bincount(ink, log_w.softmax(0), minlength=3).float()
    torch.testing.assert_close(exact_shares(case), expected, rtol=0, atol=0.01)


def test_the_command_prints_the_total_variations(tmp_path, capsys):
    """Of an echo small, of a noise mask large; a second run adds what is missing and keeps what is there."""
    arguments = ["no such file", "--evidence", "exact", "--samples", "400", "--steps", "4", "--out", str(tmp_path)]
    assert main([*arguments, "--methods", "tilt + echo"]) == 0
    assert main([*arguments, "--methods", "tilt + echo", "noise mask"]) == 0
    rows = json.loads((tmp_path / "evidence.json").read_text())
    assert [(row["method"], row["calls"]) for row in rows] == [("tilt + echo", 8), ("noise mask", 4)]
    echo, mask = ([*row["tv"].values()] for row in rows)
    assert max(echo[:2]) < 0.08 and min(mask) > max(echo[:2])
    heads, _, first, *_ = (tmp_path / "evidence.md").read_text().splitlines()
    assert heads.startswith("| prior | method | steps | calls | 1 pixel, ambiguous")
    assert first in capsys.readouterr().out


def test_rows_are_of_one_tilt_of_guidance(tmp_path, monkeypatch):
    """Published and limited guidance make rows and pictures of their own; a row that does not say is published."""
    monkeypatch.setattr("train.evaluate.features.STEPS", 2)
    path = tmp_path / "evidence.json"

    def run(tilt):
        words = f"--evidence grey --methods tilt --steps 2 --samples 20 --guidance 0 0.6 --guidance-tilt {tilt} --out"
        assert main([str(ROOT / "models/gmdit_digits.safetensors"), *words.split(), str(tmp_path)]) == 0
        return json.loads(path.read_text())

    free, published = run("published")
    path.write_text(json.dumps([free, {k: v for k, v in published.items() if k != "guidance_tilt"}]))
    assert len(run("published")) == 2
    _, _, limited = run("limited")
    assert limited["guidance_tilt"] == "limited" and limited["rmse"] != published["rmse"]
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert [line.split(" | ")[3] for line in (tmp_path / "evidence.md").read_text().splitlines()[2:]] == [
        "0", "0.6 published", "0.6"]


def test_a_choice_is_the_inspectors_hypothesis(rng):
    """Every image is asked for in the colour of its own; those without colour are left out."""
    model = load_checkpoint(ROOT / "models/gmdit_digits.safetensors").model.requires_grad_(False)
    noise = torch.randn(10, 3, 16, 16, generator=rng)
    problem = Problem(model, None, noise, torch.arange(10), noise, 2, 0.3)
    rows, colours = choices(problem, list(range(10)), 1.0)
    recorder = Recorder(images=10)
    problem.solve(problem.denoiser(), callback=recorder)
    numbers = statistics(recorder.trace(), rows[0])["hypotheses"][rows[0] % 8]
    torch.testing.assert_close(colours[0], torch.tensor(numbers), rtol=0, atol=0.05)
    assert 5 <= len(rows) <= 10 and ((colours.amax(1) - colours.amin(1)) > 0.15).all()
