"""Traces and panels: what is kept, what is drawn, and the numbers beside it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from gmflow_core import GaussianMixture, flow_sigmas, guide_probabilistic, sample_gm_ode, unguided
from gmflow_core.inspection import views
from gmflow_core.inspection.beliefs import reorder, weight_entropy
from gmflow_core.inspection.charts import REST, Axes, component_colour, marginal_density, marginal_grid, share_chart
from gmflow_core.inspection.pixels import save_pixels
from gmflow_core.inspection.scene import ARRANGEMENTS, arranged, look
from gmflow_core.inspection.statistics import statistics
from gmflow_core.inspection.tiles import evened
from gmflow_core.inspection.trace import Recorder, Trace, TraceStep, pick
from gmflow_core.inspection.views import VIEWS, draw


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


def test_the_images_that_are_kept_are_those_of_the_batch(rng):
    """Tilts are worked out for the first images alone: the same as for all of them."""
    state = rng.get_state()
    some, _ = record(rng, recorder=Recorder(images=2))
    rng.set_state(state)
    whole, _ = record(rng)
    for a, b in zip(some.steps, whole.steps, strict=True):
        assert torch.equal(a.x, b.x[:2])
        torch.testing.assert_close(a.divergence, b.divergence[:2])
        for name in ("conditional", "guided", "corrected"):
            for part in ("means", "log_weights", "log_std"):
                torch.testing.assert_close(getattr(getattr(a, name), part), getattr(getattr(b, name), part)[:2])


def summary(values: np.ndarray) -> dict:
    return {"mean": values.mean(), "p5": np.percentile(values, 5), "median": np.percentile(values, 50),
            "p95": np.percentile(values, 95)}


def test_numbers_agree_with_a_computation_of_their_own(rng):
    """Every number of every step against numpy in double precision, from the trace's own tensors."""
    trace, _ = record(rng)
    numbers = json.loads(json.dumps(statistics(trace, image=1, pixel=(3, 1))))
    assert numbers["format"] == 1 and [s["step"] for s in numbers["steps"]] == [0, 1, 2]
    for said, step in zip(numbers["steps"], trace.steps, strict=True):
        def parts(mixture):
            means, logits = (t[1].double().numpy() for t in (mixture.means, mixture.log_weights))
            w = np.exp(logits[:, 0]) / np.exp(logits[:, 0]).sum(0)                  # (K,H,W)
            return means, w, (w[:, None] * means).sum(0)
        means, w, mean = parts(step.corrected)
        entropy = -(w * np.log2(w)).sum(0)
        between = np.sqrt((w[:, None] * (means - mean) ** 2).sum(0).mean(0))
        expected = {
            "entropy_bits": summary(entropy), "effective_components": summary(2**entropy),
            "std_between": summary(between),
            "guidance_shift": summary(np.sqrt(((parts(step.guided)[2] - parts(step.conditional)[2]) ** 2).mean(0))),
            "correction_shift": summary(np.sqrt(((mean - parts(step.guided)[2]) ** 2).mean(0))),
            "guidance_kl": summary(step.divergence[1].double().numpy()),
        }
        for name, values in expected.items():
            assert said[name] == pytest.approx(values, rel=1e-4, abs=2e-6), name
        assert said["log_std"] == pytest.approx(step.corrected.log_std[1].item(), abs=1e-6)
        assert said["std_within"] == pytest.approx(math.exp(step.corrected.log_std[1].item()), rel=1e-4)
        # The order of components is arbitrary: compare what does not depend on it.
        assert sum(said["weights"]) == pytest.approx(1, abs=1e-5)
        assert sum(said["dominance"]) == pytest.approx(1, abs=1e-5)
        assert [sum(said["hypotheses"][name]) for name in ("weights", "dominance")] == pytest.approx([1, 1], abs=1e-5)
        centres = np.array(numbers["hypotheses"])                                   # (N,C)
        label = ((means[:, None] - centres[None, :, :, None, None]) ** 2).sum(2).argmin(1)      # (K,H,W)
        merged = np.stack([(w * (label == n)).sum(0) for n in range(len(centres))])
        assert said["hypotheses"]["weights"] == pytest.approx(merged.mean((1, 2)), abs=1e-5)
        share = [(merged.argmax(0) == n).mean() for n in range(len(centres))]
        assert said["hypotheses"]["dominance"] == pytest.approx(share, abs=1e-5)
        pixel = said["pixel"]
        assert (pixel["x"], pixel["y"], pixel["std"]) == (3, 1, said["std_within"])
        assert pixel["weights"] == pytest.approx(w[:, 1, 3], abs=2e-6)
        assert np.array(pixel["means"]) == pytest.approx(means[:, :, 1, 3], abs=2e-6)
    assert "pixel" not in statistics(trace)["steps"][0]
    with pytest.raises(ValueError, match=r"pixel_x: got 16; .* so 0 to 15"):
        statistics(trace, pixel=(16, 0))


def test_divergence_of_guidance_agrees_with_sampling(rng):
    """KL(guided || conditional) by Monte Carlo with torch.distributions, of a few pixels."""
    trace, _ = record(rng, size=2, b=1, std=-0.5)
    step = pick(trace, 0, 0)

    def distribution(mixture):
        means = mixture.means[0].permute(2, 3, 0, 1).double()                       # (H,W,K,C)
        scale = mixture.log_std.double().exp().expand_as(means[None])[0]
        components = torch.distributions.Independent(torch.distributions.Normal(means, scale), 1)
        weights = mixture.log_weights[0, :, 0].permute(1, 2, 0).double()
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), components)

    torch.manual_seed(0)
    guided, conditional = distribution(step.guided), distribution(step.conditional)
    x = guided.sample((200_000,))
    difference = guided.log_prob(x) - conditional.log_prob(x)
    error = difference.std(0) / math.sqrt(len(x))
    assert ((difference.mean(0) - step.divergence[0]).abs() < 5 * error + 2e-3).all() and step.divergence.max() > 0.02


def test_components_keep_their_order_over_the_steps(rng):
    """One prior that the denoiser returns in another order at every call: the numbers do not notice."""
    cond = mixture(rng, b=1, k=4)
    orders = [torch.rand(cond.log_weights.shape, generator=rng).argsort(1) for _ in range(3)]
    recorder = Recorder()
    sample_gm_ode(
        lambda x, s: unguided(reorder(cond, orders[round(3 - 3 * s)])), torch.randn(1, 3, 16, 16, generator=rng),
        flow_sigmas(3), order=1, callback=recorder,
    )
    steps = statistics(recorder.trace())["steps"]
    for name in ("weights", "dominance"):
        assert steps[0][name] == pytest.approx(steps[1][name], abs=1e-4)
        assert steps[0][name] == pytest.approx(steps[2][name], abs=1e-4)
    assert steps[0]["hypotheses"]["weights"] == pytest.approx(steps[2]["hypotheses"]["weights"], abs=1e-4)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("k, c, size", [(1, 3, 16), (8, 4, 16), (64, 3, 16), (8, 3, 64), (2, 1, 128)])
def test_every_view_draws(rng, view, k, c, size):
    trace, _ = record(rng, k=k, c=c, size=size, b=1)
    panel = draw(trace, view, -1, 0, "aligned", k, lambda x: x[:, :3])
    assert 380 <= panel.width <= 2400 and 200 <= panel.height <= 2400
    assert len(panel.getcolors(1 << 24)) > 16  # it is not blank


def test_orders(rng):
    cond = mixture(rng, b=1)
    assert torch.equal(arranged(cond, "raw", 8).means, cond.means)
    ranked = arranged(cond, "ranked", 8)
    assert (ranked.weights[:, :-1] >= ranked.weights[:, 1:]).all()
    for order in ARRANGEMENTS:
        assert arranged(cond, order, 3).components == 3
        torch.testing.assert_close(arranged(cond, order, 99).mean(), cond.mean())
    torch.testing.assert_close(arranged(cond, "aligned", 3).mean(), cond.mean())  # merged, nothing lost


def test_what_is_not_there_is_refused(rng):
    trace, _ = record(rng)
    with pytest.raises(ValueError, match=r"step: got 3; this trace has steps 0 to 2 \(-1 is the last\)"):
        pick(trace, 3, 0)
    with pytest.raises(ValueError, match="image: got 3; this trace holds images 0 to 2, the first of the batch"):
        pick(trace, 0, 3)
    with pytest.raises(ValueError, match="view must be one of components, .*got 'aura'"):
        draw(trace, "aura", 0, 0, "aligned", 8, lambda x: x)
    with pytest.raises(ValueError, match="order must be one of aligned, ranked, raw, got 'random'"):
        draw(trace, "components", 0, 0, "random", 8, lambda x: x)
    for pixel, words in (((16, 0), "pixel_x: got 16; .* 16 x 16 .*, so 0 to 15"), ((0, -1), "pixel_y: got -1")):
        with pytest.raises(ValueError, match=words):
            draw(trace, "pixel", 0, 0, "aligned", 8, lambda x: x, pixel)
        draw(trace, "winners", 0, 0, "aligned", 8, lambda x: x, pixel)  # which needs no pixel
    for read in (statistics, lambda trace: draw(trace, "sheet", 0, 0, "aligned", 8, lambda x: x)):
        with pytest.raises(ValueError, match="trace: it holds no steps"):
            read(Trace(()))
    assert pick(trace, -1, 0).sigma == pytest.approx(1 / 3)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"max_components: got {count}; at least one"):
            statistics(trace, 0, count)
        with pytest.raises(ValueError, match=f"max_components: got {count}; at least one"):
            draw(trace, "winners", 0, 0, "raw", count, lambda x: x)


@pytest.mark.parametrize("part, value",
                         [("means", math.nan), ("means", math.inf), ("log_weights", math.nan), ("log_std", -math.inf)])
def test_a_mixture_that_is_not_finite_is_named(rng, part, value):
    trace, _ = record(rng)
    getattr(trace.steps[1].guided, part)[2].view(-1)[0] = value
    for read in (lambda: pick(trace, 1, 2), lambda: statistics(trace, 2),
                 lambda: draw(trace, "components", 1, 2, "raw", 8, lambda x: x)):
        with pytest.raises(ValueError,
                           match="trace: step 1, image 2, guided: the mixture holds NaN or infinite values"):
            read()
    assert pick(trace, 1, 1).x.isfinite().all()  # the others are as they were


def test_a_weight_of_zero_is_fine(rng):
    mix = mixture(rng, b=1, k=3)
    logits = mix.log_weights.clone()
    logits[:, 1] = -math.inf
    step = TraceStep(1.0, 0.5, mix.mean(), *3 * [GaussianMixture.from_logits(mix.means, logits, mix.log_std)])
    numbers = statistics(Trace((step,)))
    json.dumps(numbers, allow_nan=False)
    for view in VIEWS:
        for order in ARRANGEMENTS:
            draw(Trace((step,)), view, 0, 0, order, 3, lambda x: x)


@pytest.mark.parametrize("decode, words", [
    (lambda x: x[0], r"got \(3, 16, 16\) for \(1, 3, 16, 16\)"), (lambda x: x.numpy(), "got ndarray"),
    (lambda x: x[..., :8], r"got \(1, 3, 16, 8\)"), (lambda x: x[:0], r"got \(0, 3, 16, 16\)"),
])
def test_a_decoder_that_gives_something_else_is_named(rng, decode, words):
    trace, _ = record(rng)
    with pytest.raises(ValueError, match=f"decode: {words}.* of the same proportions"):
        draw(trace, "entropy", 0, 0, "raw", 8, decode)


# ---- what panels say ---------------------------------------------------------------------------

def test_winners_are_of_all_components_not_only_of_those_shown(rng):
    means, logits = torch.randn(1, 10, 3, 8, 8, generator=rng), torch.zeros(1, 10, 1, 8, 8)
    logits[:, 8] = 3.0
    mix = GaussianMixture.from_logits(means, logits, torch.zeros(1, 1, 1, 1, 1))
    panel = draw(Trace((TraceStep(1.0, 0.5, mix.mean(), mix, mix, mix),)), "winners", 0, 0, "raw", 4, lambda x: x)
    area = {colour: count for count, colour in panel.getcolors(1 << 24)}
    assert area[component_colour(8)] >= 192 * 192
    assert all(area.get(component_colour(k), 0) < 400 for k in range(4))


def test_an_animation_has_one_scale_over_all_steps(rng):
    trace, _ = record(rng)
    scenes = [look(trace, step, 0, "raw", 8, lambda x: x, steady=True) for step in range(3)]
    std = lambda step: step.corrected.log_std.exp().flatten()  # noqa: E731
    scales = [scene.scale(std) for scene in scenes]
    assert scales[0] == scales[1] == scales[2] == (max(float(std(step)) for step in scenes[0].steps), False)
    assert look(trace, 1, 0, "raw", 8, lambda x: x).scale(std) == (float(std(scenes[1].step)), False)


def test_a_scale_is_not_ruled_by_a_few_pixels(rng):
    scene = look(record(rng)[0], 0, 0, "raw", 8, lambda x: x)
    values = torch.linspace(0, 1, 1000)
    assert scene.scale(lambda step: values) == (1.0, False)
    values[-3:] = 50.0
    top, beyond = scene.scale(lambda step: values)
    assert beyond and 0.99 < top < 1
    assert scene.scale(lambda step: torch.zeros(5)) == (1.0, False)


def test_what_no_part_holds_is_grey_in_a_chart_of_shares():
    def count(shares) -> int:
        return {colour: n for n, colour in share_chart("", [1.0, 0.5], shares).getcolors(1 << 24)}.get(REST, 0)

    whole, half = count([[0.5, 0.5]] * 2), count([[0.25, 0.25]] * 2)
    assert whole == 0 and half > 5000
    assert count([[1 / 20] * 20] * 2) > 5000  # past the twelfth


@pytest.mark.parametrize("std", [0.1, 1e-3, 1e-5])
def test_marginals_reach_their_peaks(std):
    means, weights = torch.tensor([[-1.0], [0.913]], dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64)
    grid = marginal_grid(means, std, -1.5, 1.5)
    peak = marginal_density(means, weights, std, grid).max()
    assert peak == pytest.approx(0.8 / (std * math.sqrt(2 * math.pi)), rel=1e-3)


# ---- files and frames --------------------------------------------------------------------------

@pytest.mark.parametrize("order, count", [("aligned", 3), ("raw", 8), ("ranked", 2)])
def test_pixels_for_a_page(rng, tmp_path, order, count):
    """Half precision of what the panels show, and the colours of the means."""
    trace, _ = record(rng)
    scene = look(trace, 1, 2, order, count, lambda x: x)
    assert save_pixels(scene, tmp_path / "pixels.safetensors", lambda x: x)
    tensors = load_file(tmp_path / "pixels.safetensors")
    with safe_open(tmp_path / "pixels.safetensors", "pt") as file:
        about = json.loads(file.metadata()["gmflow_pixels"])
    assert about["title"] == "Step 1 (0 to 2), sigma 0.667" and about["components"] == 8 and about["bits"] == 3
    assert about["parts"].startswith({"aligned": "hypotheses", "ranked": "components by their rank",
                                      "raw": "components as the network"}[order])
    assert about["std"] == pytest.approx(pick(trace, 1, 2).corrected.log_std.exp().item(), abs=1e-6)
    assert len(about["colours"]) == count
    shown = arranged(pick(trace, 1, 2).corrected, order, count, scene.centres)
    torch.testing.assert_close(tensors["weights"].float(), shown.weights[0, :, 0].permute(1, 2, 0),
                               atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tensors["means"][3, 5].float(), shown.means[0, :, :, 3, 5], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tensors["entropy"].float(), weight_entropy(pick(trace, 1, 2).corrected)[0],
                               atol=2e-3, rtol=0)
    expected = ((torch.cat([scene.step.corrected.mean(), shown.means[0]]).clamp(-1, 1) + 1) * 127.5).round().byte()
    assert torch.equal(tensors["rgb"], expected.permute(2, 3, 0, 1))


def test_pixels_that_would_be_too_many_are_left_out(rng, tmp_path, monkeypatch):
    trace, _ = record(rng)
    scene = look(trace, 0, 0, "raw", 8, lambda x: x)
    assert save_pixels(scene, tmp_path / "a", lambda x: x)
    monkeypatch.setattr("gmflow_core.inspection.pixels.MOST_BYTES", 256 * (2 * 8 * 4 + 2 + 3 * 9))
    assert save_pixels(scene, tmp_path / "b", lambda x: x)  # exactly as many as allowed
    monkeypatch.setattr("gmflow_core.inspection.pixels.MOST_BYTES", 256 * (2 * 8 * 4 + 2 + 3 * 9) - 1)
    assert not save_pixels(scene, tmp_path / "c", lambda x: x) and not (tmp_path / "c").exists()


def test_a_trace_takes_the_memory_that_is_said(rng):
    """Up to 6 K (C + 1) H W bytes an image and step, x and the KL aside."""
    trace, _ = record(rng, steps=2)
    for step, different in zip(trace.steps, (2, 3), strict=True):  # the first step has no correction
        mixtures = {id(m): m for m in (step.conditional, step.guided, step.corrected)}.values()
        size = sum(t.numel() * t.element_size() for m in mixtures for t in (m.means, m.log_weights))
        assert size == different * 3 * 2 * 8 * (3 + 1) * 16 * 16
        assert size <= 3 * 6 * 8 * (3 + 1) * 16 * 16


def test_frames_of_an_animation_have_one_size(rng):
    trace, _ = record(rng, b=1, k=4)
    panels = [draw(trace, "winners", step, 0, "aligned", 4, lambda x: x) for step in range(3)]
    frames = evened([*panels, panels[0].resize((900, 20))])
    assert {frame.size for frame in frames} == {(900, max(p.height for p in panels))}
    assert frames[0].getpixel((30, 60)) == panels[0].getpixel((30, 60))


def test_more_is_further_up():
    """A chart's y axis: a picture's rows are counted from above."""
    axes = Axes((440, 250), (1.0, 0.0), (0.0, 10.0))
    heights = [axes.at(0.5, value)[1] for value in (0, 2.5, 10)]
    assert heights[0] == axes.box[3] and heights[2] == axes.box[1] and heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 4)


def test_the_difference_by_guidance_fills_its_scale_and_no_more(rng, monkeypatch):
    """Its largest value is 1, and its title says by how much it was multiplied."""
    monkeypatch.setattr(views, "sheet", lambda cells, rows, titles, *rest: (cells, titles))
    trace, _ = record(rng)
    step = pick(trace, 1, 2)
    ((cells,), titles) = draw(trace, "guidance", 1, 2, "raw", 8, lambda x: x)
    shift = (step.guided.mean() - step.conditional.mean())[0]
    expected = 127.5 * (shift / shift.abs().max() + 1)                          # (C,H,W), 0 to 255
    shown = torch.from_numpy(np.array(cells[2].resize(shift.shape[:0:-1], Image.Resampling.NEAREST)))
    assert (shown.permute(2, 0, 1) - expected).abs().max() <= 1
    assert float(titles[2].removeprefix("difference x ")) == pytest.approx(1 / float(shift.abs().max()), rel=1e-2)
