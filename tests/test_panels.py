"""Traces and panels: what is kept, what is drawn, and the numbers beside it."""

import json
import math

import pytest
import torch

from gmflow_core import GaussianMixture, flow_sigmas, guide_probabilistic, sample_gm_ode
from gmflow_core.panels import ORDERS, VIEWS, draw, ordered
from gmflow_core.trace import Recorder, pick, statistics


def mixture(rng, k=8, c=3, size=16, b=3, std=-2.0):
    means = torch.randn(b, k, c, size, size, generator=rng).clamp(-1, 1)
    logits = 2 * torch.randn(b, k, 1, size, size, generator=rng)
    return GaussianMixture.from_logits(means, logits, torch.full((b, 1, 1, 1, 1), std))


def record(rng, steps=3, guided=True, recorder=None, **kw):
    cond, uncond = mixture(rng, **kw), mixture(rng, **kw)
    recorder = recorder or Recorder()
    x = torch.randn(cond.mean().shape, generator=rng)
    guide = lambda x, s: guide_probabilistic(cond, uncond, 0.4 if guided else 0.0)  # noqa: E731
    sample_gm_ode(guide, x, flow_sigmas(steps), callback=recorder)
    return recorder.trace(), cond


def test_a_recorder_keeps_what_the_step_saw(rng):
    trace, cond = record(rng)
    assert [step.sigma for step in trace.steps] == pytest.approx([1, 2 / 3, 1 / 3])
    first = trace.steps[0]
    assert first.conditional.means.dtype == torch.float16 and first.x.shape == (3, 3, 16, 16)
    torch.testing.assert_close(first.conditional.means.float(), cond.means, atol=1e-3, rtol=1e-3)
    assert (first.guided.mean().float() - cond.mean()).abs().max() > 0.01
    assert first.corrected is first.guided  # no history yet, so no correction: kept once
    assert trace.steps[1].corrected is not trace.steps[1].guided


def test_a_recorder_has_limits(rng):
    trace, _ = record(rng, steps=5, recorder=Recorder(images=2, steps=3))
    assert len(trace.steps) == 3 and len(trace.steps[0].x) == 2
    trace, _ = record(rng, guided=False)
    assert trace.steps[0].conditional is trace.steps[0].guided


def test_numbers_agree_with_a_computation_of_their_own(rng):
    trace, cond = record(rng, guided=False)
    numbers = json.loads(json.dumps(statistics(trace, image=1)))
    assert numbers["format"] == 1 and [s["step"] for s in numbers["steps"]] == [0, 1, 2]
    step = numbers["steps"][0]
    weights = cond.weights[1, :, 0].double()                                    # (K,H,W)
    entropy = torch.distributions.Categorical(weights.movedim(0, -1)).entropy() / math.log(2)
    assert step["entropy_bits"]["mean"] == pytest.approx(entropy.mean().item(), abs=2e-3)
    assert step["entropy_bits"]["median"] == pytest.approx(entropy.quantile(0.5).item(), abs=5e-3)
    assert step["effective_components"]["mean"] == pytest.approx((2**entropy).mean().item(), rel=2e-3)
    mean = (weights[:, None] * cond.means[1]).sum(0)
    between = ((weights[:, None] * (cond.means[1] - mean).square()).sum(0).mean(0)).sqrt()
    assert step["std_between"]["mean"] == pytest.approx(between.mean().item(), rel=2e-3)
    assert step["log_std"] == pytest.approx(-2, abs=1e-3) and step["guidance_shift"]["mean"] == 0
    assert sum(step["weights"]) == pytest.approx(1, abs=1e-4) and sum(step["dominance"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("k, c, size", [(1, 3, 16), (8, 4, 16), (64, 3, 16), (8, 3, 64)])
def test_every_view_draws(rng, view, k, c, size):
    trace, _ = record(rng, k=k, c=c, size=size, b=1)
    panel = draw(trace, view, -1, 0, "aligned", 8, lambda x: x[:, :3])
    assert panel.width >= 380 and panel.height >= 200
    assert len(panel.getcolors(1 << 24)) > 16  # it is not blank


def test_orders(rng):
    cond = mixture(rng, b=1)
    assert torch.equal(ordered(cond, "raw", 8).means, cond.means)
    ranked = ordered(cond, "ranked", 8)
    assert (ranked.weights[:, :-1] >= ranked.weights[:, 1:]).all()
    for order in ORDERS:
        assert ordered(cond, order, 3).components == 3
        torch.testing.assert_close(ordered(cond, order, 99).mean(), cond.mean())
    torch.testing.assert_close(ordered(cond, "aligned", 3).mean(), cond.mean())  # merged, nothing lost


def test_what_is_not_there_is_refused(rng):
    trace, _ = record(rng)
    with pytest.raises(ValueError, match=r"step: got 3; this trace has steps 0 to 2 \(-1 is the last\)"):
        pick(trace, 3, 0)
    with pytest.raises(ValueError, match="image: got 3; this trace holds images 0 to 2"):
        pick(trace, 0, 3)
    with pytest.raises(ValueError, match="view must be one of"):
        draw(trace, "aura", 0, 0, "aligned", 8, lambda x: x)
    with pytest.raises(ValueError, match="order must be one of"):
        draw(trace, "components", 0, 0, "random", 8, lambda x: x)
    assert pick(trace, -1, 0).sigma == pytest.approx(1 / 3)
