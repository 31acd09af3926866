"""The evaluation of evidence: its operators against their definitions, its tasks against what digits are."""

import pytest
import torch

from gmflow_core import GaussianMixture
from train.data.digits import INKS, Digits
from train.evaluate.digits_metrics import dominant_inks
from train.evaluate.evidence_methods import METHODS, gaussian_of, weigh
from train.evaluate.evidence_tasks import TASKS, Truth


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
