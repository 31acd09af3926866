"""The nodes' own logic that needs no ComfyUI: mixing, labels, latents, traces.

The pack is imported under another name, as ComfyUI does it, and past nodes/__init__.py, which needs a host.
"""

import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pack():
    names = {"gmflow_pack": ROOT, "gmflow_pack.nodes": ROOT / "nodes"}
    for name, folder in names.items():
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    yield lambda name: import_module(f"gmflow_pack.{name}")
    for name in [name for name in sys.modules if name.startswith("gmflow_pack")]:
        del sys.modules[name]


def mixture(pack, rng, k=4, b=2):
    core = pack("gmflow_core")
    means = torch.randn(b, k, 3, 4, 4, generator=rng)
    logits = torch.randn(b, k, 1, 4, 4, generator=rng)
    return core.GaussianMixture.from_logits(means, logits, torch.randn(b, 1, 1, 1, 1, generator=rng) - 1)


# ---- combined conditionings ---------------------------------------------------------------------

def test_a_pool_has_the_mean_and_variance_of_the_sum(pack, rng):
    parts, strengths = [mixture(pack, rng), mixture(pack, rng, k=3)], [1.0, 0.5]
    pooled = pack("nodes.capture").pool(parts, strengths)
    assert pooled.components == 7
    torch.testing.assert_close(pooled.weights.sum(1), torch.ones_like(pooled.weights.sum(1)))
    shares = [2 / 3, 1 / 3]
    moments = [part.moments() for part in parts]
    mean = sum(s * m.mean for s, m in zip(shares, moments, strict=True))
    second = sum(s * (m.var + m.mean.square().mean(1, keepdim=True)) for s, m in zip(shares, moments, strict=True))
    torch.testing.assert_close(pooled.mean(), mean)
    torch.testing.assert_close(pooled.moments().var, second - mean.square().mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_pool_of_one_is_itself_and_zero_strength_weighs_nothing(pack, rng):
    pool, one, other = pack("nodes.capture").pool, mixture(pack, rng), mixture(pack, rng)
    assert pool([one], [0.3]) is one
    torch.testing.assert_close(pool([one, other], [1.0, 0.0]).mean(), one.mean())
    with pytest.raises(ValueError, match="strengths >= 0 that are not all 0"):
        pool([one, other], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"\[1.0, -0.5\]"):
        pool([one, other], [1.0, -0.5])


def test_somebody_elses_guidance_moves_the_mixture_as_a_whole(pack, rng):
    mixing, posterior = pack("nodes.capture"), mixture(pack, rng)
    wanted = torch.randn(2, 3, 4, 4, generator=rng)
    guided = mixing.guided_by_mean(posterior, wanted)
    torch.testing.assert_close(guided.posterior.mean(), wanted)
    torch.testing.assert_close(guided.posterior.moments().var, posterior.moments().var)
    cfg = pack("gmflow_core").guide_cfg(posterior, mixture(pack, rng), 3.0)
    torch.testing.assert_close(mixing.moved(posterior, cfg.posterior.mean()).means, cfg.posterior.means)


def test_a_capture_keeps_chunks_by_conditioning(pack):
    capture = pack("nodes.capture").Capture()
    packed = torch.arange(24.0).reshape(6, 4)
    capture.add(packed, ["a", "b", "c"])
    assert torch.equal(capture.packed["b"], packed[2:4]) and list(capture.packed) == ["a", "b", "c"]


# ---- settings -----------------------------------------------------------------------------------

def test_when_guidance_acts(pack):
    Guidance = pack("nodes.guidance").Guidance
    assert Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.8) and Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.2)
    assert not Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.81) and not Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.1)
    assert not Guidance(0.0).acts_at(0.5)
    assert Guidance(0.0, method="vanilla CFG", cfg_scale=2.0).acts_at(0.5)
    assert not Guidance(0.5, method="vanilla CFG", cfg_scale=1.0).acts_at(0.5)


@pytest.mark.parametrize("settings, message", [
    (dict(scale=1.0), r"in \[0, 1\), got 1.0"), (dict(scale=-0.1), "got -0.1"), (dict(scale=float("nan")), "got nan"),
    (dict(orthogonal=2.0), "orthogonal"), (dict(method="cfg"), "method must be one of"),
    (dict(cfg_scale=0.5), "cfg_scale must be >= 1"), (dict(interval=(0.2, 0.8)), "start before it ends"),
])
def test_bad_guidance(pack, settings, message):
    with pytest.raises(ValueError, match=message):
        pack("nodes.guidance").Guidance(**settings)


def test_sigmas_of_foreign_schedulers(pack):
    clean = pack("nodes.solving").clean_sigmas
    assert clean(torch.tensor([1.00001, 0.5, 0.5, 0.0])).tolist() == [1.0, 0.5, 0.0]
    assert clean(torch.tensor([14.6, 1.0, 0.0])).tolist() == pytest.approx([14.6, 1.0, 0.0])  # the solver refuses it


def test_a_mask_that_depends_on_sigma_keeps_its_last_threshold_at_zero(pack, rng):
    seen = []

    def threshold(sigma, mask, extra_options):
        seen.append(float(sigma[0]))
        return (mask >= sigma[0]).float()

    latent, noise = torch.randn(1, 3, 2, 2, generator=rng), torch.randn(1, 3, 2, 2, generator=rng)
    model = types.SimpleNamespace(inner_model="guider", latent_image=latent, noise=noise)
    mask = torch.tensor([[[[0.2, 0.9], [0.2, 0.9]]]])
    extra = {"denoise_mask": mask, "model_options": {"denoise_mask_function": threshold}}
    inpaint = pack("nodes.solving").make_inpaint(model, extra, None)
    x = torch.randn(1, 3, 2, 2, generator=rng)
    out = inpaint(x, 0.5)
    torch.testing.assert_close(out[..., 0], (0.5 * latent + 0.5 * noise)[..., 0])
    torch.testing.assert_close(out[..., 1], x[..., 1])
    torch.testing.assert_close(inpaint(x, 0.0)[..., 0], latent[..., 0])
    assert seen == [0.5, 0.5]
    assert pack("nodes.solving").make_inpaint(model, {"denoise_mask": None}, None) is None


# ---- labels and latents -------------------------------------------------------------------------

@pytest.fixture
def config(pack):
    return pack("gmflow_core").GMDiTConfig(
        num_classes=10, num_gaussians=2, in_channels=3, sample_size=8, patch_size=2, num_layers=1,
        num_heads=1, head_dim=8
    )


def read(pack, conditioning, config, role="positive"):
    tensor, extra = conditioning[0]
    describe = pack("nodes.model_info")
    return describe.read_labels(tensor, extra.get(describe.LABELS), extra.get(describe.CLASSES), config, role).tolist()


def test_labels_survive_the_trip(pack, config):
    describe = pack("nodes.model_info")
    three = describe.make_conditioning([3, 0, 9], 10)
    assert read(pack, three, config) == [3, 0, 9]
    # ConditioningZeroOut asks for nothing.
    assert read(pack, [[torch.zeros_like(three[0][0]), three[0][1]]], config) == [10]
    assert read(pack, [[None, {}]], config) == [10]
    assert read(pack, describe.null_conditioning(config), config) == [10]


def test_labels_that_others_changed_are_refused(pack, config):
    make = pack("nodes.model_info").make_conditioning
    (one, extra), (two, _) = make([3], 10)[0], make([7], 10)[0]
    for tensor in ((one + two) / 2, torch.cat([one, two], dim=1)):
        with pytest.raises(ValueError, match="positive: classes can not be averaged or concatenated"):
            read(pack, [[tensor, extra]], config)
    with pytest.raises(ValueError, match="negative: this conditioning holds text"):
        read(pack, [[torch.randn(1, 77, 768), {}]], config, "negative")
    with pytest.raises(ValueError, match="its labels are made for a model of 1000 classes; this one has 10"):
        read(pack, make([3], 1000), config)


def test_latents_that_do_not_fit(pack, config):
    describe, space = pack("nodes.model_info"), pack("gmflow_core.model").LatentSpace("rgb")
    info = describe.ModelInfo(config, None, space, None)
    describe.check_latent(info, torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12))
    for shape in ((1, 4, 8, 8), (1, 3, 9, 8), (1, 3, 1, 8, 8)):
        with pytest.raises(ValueError,
                           match=r"latent: got .* 3 channels \(RGB pixels\), height and width multiples of 2"):
            describe.check_latent(info, torch.zeros(shape), None)
    describe.check_latent(info, torch.zeros(1, 3, 8, 64), None)
    with pytest.raises(ValueError, match=r"latent: 8 x 512 is 64 times the 8 x 8 that .*GMFlow Empty Latent makes one"):
        describe.check_latent(info, torch.zeros(1, 3, 8, 512), None)
    with pytest.raises(ValueError, match="NaN"):
        describe.check_latent(info, torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan))


# ---- traces -------------------------------------------------------------------------------------

def test_a_link_is_found_in_a_prompt(pack):
    connected = pack("nodes.trace_source").is_connected
    prompt = {"7": {"inputs": {"a": ["4", 1], "b": 3, "c": [1, 2, 3]}}, "8": {"inputs": {"x": ["4:2", 0]}}, "9": {}}
    assert connected(prompt, "4", 1) and connected(prompt, 4, 1) and connected(prompt, "4:2", 0)
    assert not connected(prompt, "4", 0) and not connected(prompt, "7", 1) and not connected(None, "4", 1)


def test_a_trace_is_recorded_if_asked_for_and_sampled_again_if_not(pack, rng):
    tracing, core = pack("nodes.trace_source"), pack("gmflow_core")
    posterior, runs = mixture(pack, rng), []

    def run(recorder):
        runs.append(recorder)
        core.sample_gm_ode(lambda x, s: core.unguided(posterior), torch.zeros(2, 3, 4, 4), core.flow_sigmas(3),
                           callback=recorder)
        return "latent"

    hidden = types.SimpleNamespace(unique_id="4", prompt={"5": {"inputs": {"trace": ["4", 1]}}})
    source = tracing.TraceSource(run, None)
    assert source.sample(hidden, 1) == "latent" and runs[0] is not None
    assert len(source.trace().steps) == 3 and len(runs) == 1
    late = tracing.TraceSource(run, None)
    late.sample(types.SimpleNamespace(unique_id="4", prompt={}), 1)
    assert runs[1] is None and len(late.trace().steps) == 3 and late.trace() is late.trace() and len(runs) == 3
    with pytest.raises(ValueError, match="trace: it is empty; only GM samplers leave one"):
        tracing.TraceSource(lambda recorder: None, None).trace()
