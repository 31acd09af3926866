"""The nodes' own logic that needs no ComfyUI: mixing, labels, latents, traces.

The pack is imported under another name, as ComfyUI does it, and past nodes/__init__.py, which needs a host.
"""

import json
import sys
import types
from dataclasses import replace
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
    x = torch.zeros(2, 3, 4, 4)
    capture = pack("nodes.capture").Capture(x, torch.tensor([0.25, 0.25]))
    packed = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 9, 4, 4)
    capture.add(packed, ["a", "b", "c"])
    assert torch.equal(capture.packed["b"], packed[2:4]) and list(capture.packed) == ["a", "b", "c"]
    assert capture.sigma == 0.25
    capture.add(-packed[:2], ["b"])  # a second evaluation, say of a patch that perturbs
    assert torch.equal(capture.packed["b"], packed[2:4]) and capture.parts is None
    capture.add(packed[:, :, :2], ["d", "e", "f"])
    capture.add(packed[:1], ["g"])
    assert sorted(capture.packed) == ["a", "b", "c"] and capture.parts == (1, 4, 4)
    x.fill_(7)
    assert not capture.x.any()  # whoever writes to x comes too late


def test_a_missing_mixture_names_the_patch(pack):
    capturing = pack("nodes.capture")
    capture = capturing.Capture(torch.zeros(1, 3, 8, 8), torch.tensor([0.5]))
    tiler = type("Tiler", (), {"__module__": "/x/custom_nodes/Some-Tiles.part"})()
    with pytest.raises(ValueError, match=r"positive: .* at sigma 0.500; .*\(EasyCache\)"):
        capturing.gather(capture, [], None, "positive", {}, "a GM sampler")
    capture.add(torch.zeros(2, 9, 4, 4), ["a"])
    with pytest.raises(ValueError, match=r"a GM sampler needs .*batch 2 x 4 x 4 of 1 x 8 x 8\) because of Tiler "
                                         r"of Some-Tiles; remove"):
        capturing.gather(capture, [], None, "positive", {"model_function_wrapper": tiler}, "a GM sampler")


def test_an_option_is_placed_and_put_back(pack):
    placed, options = pack("nodes.capture").placed, {"old": 1}
    with pytest.raises(KeyError), placed(options, "old", 2), placed(options, "new", 3):
        assert options == {"old": 2, "new": 3}
        raise KeyError
    assert options == {"old": 1}


def test_a_shifted_guidance_keeps_its_shape(pack, rng):
    """Tilting the moved base by the moved target gives the moved posterior: the tilt's own definition."""
    core, mixing = pack("gmflow_core.guidance"), pack("nodes.capture")
    guided = core.guide_probabilistic(mixture(pack, rng), mixture(pack, rng), 0.4)
    mean = torch.randn(2, 3, 4, 4, generator=rng)
    shifted = mixing.shifted(guided, mean)
    torch.testing.assert_close(shifted.posterior.mean(), mean)
    again = core.tilt_toward(shifted.base, shifted.anchor, shifted.target)
    torch.testing.assert_close(again.mean(), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.weights, shifted.posterior.weights, atol=1e-4, rtol=0)


def test_patches_are_named(pack):
    patches = pack("nodes.patches")

    def cfg(args):
        return args

    cfg.__qualname__, cfg.__module__ = "Node.patch.<locals>.cfg", "C:\\ui\\custom_nodes\\Pack-1.nodes"
    options = {"sampler_cfg_function": cfg, "sampler_pre_cfg_function": [cfg], "sampler_post_cfg_function": [cfg]}
    assert patches.replacing_cfg(options) == ["Node of Pack-1"] * 2 and patches.replacing_cfg({}) == []
    cache = type("Cache", (), {"name": "LazyCache"})()
    assert patches.evaluating({"transformer_options": {"easycache": cache}}) == "LazyCache"


# ---- settings -----------------------------------------------------------------------------------

def test_when_guidance_acts(pack):
    Guidance = pack("nodes.guidance").Guidance
    assert Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.8) and Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.2)
    assert not Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.81) and not Guidance(0.3, interval=(0.8, 0.2)).acts_at(0.1)
    assert not Guidance(0.0).acts_at(0.5)
    assert Guidance(0.0, method="vanilla CFG", cfg_scale=2.0).acts_at(0.5)
    assert not Guidance(0.5, method="vanilla CFG", cfg_scale=1.0).acts_at(0.5)


def test_the_nearest_cfg_scale_of_a_guided_mean(pack, rng):
    """Of a mean that CFG made it is CFG's own; across the line it does not count; without a direction it is 1."""
    nearest, (cond, uncond, other) = pack("nodes.guidance").nearest_cfg, torch.randn(3, 2, 3, 4, 4, generator=rng)
    across = other - (cond - uncond) * ((other * (cond - uncond)).sum() / (cond - uncond).square().sum())
    assert nearest(uncond + 2.5 * (cond - uncond) + across, cond, uncond) == pytest.approx(2.5, abs=1e-5)
    assert nearest(other, cond, cond) == 1


@pytest.mark.parametrize("settings, message", [
    (dict(scale=1.0), r"in \[0, 1\), got 1.0"), (dict(scale=-0.1), "got -0.1"), (dict(scale=float("nan")), "got nan"),
    (dict(orthogonal=2.0), "orthogonal"), (dict(method="cfg"), "method must be one of"),
    (dict(cfg_scale=0.5), "cfg_scale must be a finite number >= 1"),
    (dict(interval=(0.2, 0.8)), "start before it ends"),
])
def test_bad_guidance(pack, settings, message):
    with pytest.raises(ValueError, match=message):
        pack("nodes.guidance").Guidance(**settings)


def test_sigmas_of_foreign_schedulers(pack):
    clean = pack("nodes.solving").clean_sigmas
    assert clean(torch.tensor([1.00001, 0.5, 0.5, 0.0])).tolist() == [1.0, 0.5, 0.0]
    for wrong in ([14.6, 1.0, 0.0], [0.5, 0.8, 0.0], [1.0, 0.5, -0.1], [1.0, float("nan"), 0.0]):
        with pytest.raises(ValueError,
                           match=r"sigmas must fall strictly within \[0, 1\], got \[.*use GMFlow Scheduler"):
            clean(torch.tensor(wrong))


class Guider:
    """A guider whose network predicts one component per conditioning, as much of a host as a denoiser needs."""

    def __init__(self, pack, network):
        core = pack("gmflow_core.model.gmdit")
        self.pack, self.network, self.conds, self.calls = core.pack_mixture, network, {"positive": [{"uuid": "p"}]}, []
        self.watch = None

    def __call__(self, x, sigma, model_options, seed=None):
        self.calls.append((x.clone(), float(sigma[0]), model_options))

        def predict(x, sigma, options, seed):
            means = self.network(x, sigma)
            packed = self.pack(torch.cat([means, torch.zeros_like(means[:, :1])], 1), torch.zeros(len(x), 1))
            options["transformer_options"]["gmflow_capture"].add(packed, ["p"])
            return x - sigma.reshape(-1, 1, 1, 1) * means

        return predict(x, sigma, model_options, seed) if self.watch is None else self.watch(
            predict, x, sigma, model_options, seed,
        )


def host_denoiser(pack, config, wrapper, **extra_args):
    """(denoiser, guider) of a host whose model is ``wrapper(guider)``."""
    solving, space = pack("nodes.solving"), pack("gmflow_core.model").LatentSpace("rgb")
    guider = Guider(pack, lambda x, sigma: 0.5 * x)
    model = wrapper(guider)
    model.inner_model = guider
    info = pack("nodes.model_info").ModelInfo(replace(config, num_gaussians=1), None, space, None)
    extra = {"model_options": {"transformer_options": {}}, "seed": 1, "denoise_mask": None} | extra_args
    denoiser = solving.HostDenoiser(model, extra, info, torch.tensor([1.0, 0.0]))
    guider.watch = denoiser.watch
    return denoiser, guider


def plain(guider):
    return lambda x, sigma, denoise_mask, model_options, seed: guider(x, sigma, model_options, seed)


def lying(guider):
    return lambda x, sigma, denoise_mask, **rest: guider(x, 0.8 * sigma, **rest)


def brighter(guider):
    return lambda x, sigma, denoise_mask, **rest: guider(x, sigma, **rest) + 0.25


def thinking(guider):
    """Several calls, the last one counts; writes to the sampler's x."""
    def model(x, sigma, denoise_mask, **rest):
        guider(x + 1, sigma, **rest)
        x.mul_(2)
        return guider(x, sigma, **rest)

    return model


def test_what_is_wrapped_around_a_guider_acts(pack, config, rng):
    """Against euler's rule: x_0 is what the whole model answers, whatever sigma and x the network saw."""
    x = torch.randn(2, 3, 4, 4, generator=rng)
    for wrapper, expected in (
        (plain, x * (1 - 0.5 * 0.5)), (lying, x * (1 - 0.4 * 0.5)), (brighter, x * (1 - 0.5 * 0.5) + 0.25),
        (thinking, 2 * x * (1 - 0.5 * 0.5)),
    ):
        denoiser, guider = host_denoiser(pack, config, wrapper)
        seen = x.clone()
        guided = denoiser(seen, 0.5)
        answer = guided.posterior.mean() if guided.blend is None else guided.blend(guided.posterior.mean())
        torch.testing.assert_close(answer, expected)
        assert (guided.blend is None) == (wrapper is not brighter)
        assert torch.equal(seen, 2 * x if wrapper is thinking else x)
        denoiser(seen, 0.25)
        # One dict, in which patches keep state.
        assert all(options is denoiser.model_options for *_, options in guider.calls)
        assert denoiser.model_options == {"transformer_options": {}}


def test_a_guider_that_is_not_asked_is_an_error(pack, config):
    denoiser, _ = host_denoiser(pack, config, lambda guider: lambda x, sigma, **rest: x)
    with pytest.raises(ValueError, match="guider: it was not asked at sigma 0.500"):
        denoiser(torch.zeros(1, 3, 4, 4), 0.5)


def test_a_mask_may_depend_on_sigma(pack, config, rng):
    """The host's function is asked at the sigma that the network saw; its mask is the blend's weight."""
    seen = []

    def threshold(sigma, mask, extra_options):
        seen.append(float(sigma[0]))
        return (mask >= sigma[0]).float()

    latent = torch.randn(1, 3, 4, 4, generator=rng)
    mask = torch.rand(1, 1, 4, 4, generator=rng)
    options = {"transformer_options": {}, "denoise_mask_function": threshold}

    def masking(guider):
        def model(x, sigma, denoise_mask, model_options, seed):
            at = threshold(0.8 * sigma, denoise_mask, None)
            return guider(x, 0.8 * sigma, model_options, seed) * at + latent * (1 - at)

        return model

    denoiser, _ = host_denoiser(pack, config, masking, denoise_mask=mask, model_options=options)
    blend = denoiser(torch.randn(1, 3, 4, 4, generator=rng), 0.5).blend
    assert seen == pytest.approx([0.4, 0.4]) and torch.equal(blend.weight, (mask >= 0.4).float().expand(1, 3, 4, 4))
    torch.testing.assert_close(blend.offset, (latent * (mask < 0.4)).expand(1, 3, 4, 4))


# ---- models with an adapter ---------------------------------------------------------------------


def adapter_info(pack, name):
    family = next(family for family in pack("gmflow_core.adapter").FAMILIES if family.name == name)
    return pack("nodes.adapter_info").AdapterInfo(family, 8, 128, 4)


@pytest.mark.parametrize("name, latent, space", [
    ("FLUX.1", (2, 16, 6, 5), (2, 16, 6, 5)), ("Qwen-Image", (2, 16, 1, 6, 5), (2, 16, 6, 5)),
    ("FLUX.2", (2, 128, 3, 5), (2, 32, 6, 10)),
])
def test_latents_of_a_model_with_an_adapter(pack, rng, name, latent, space):
    info, x = adapter_info(pack, name), torch.randn(latent, generator=rng)
    assert info.enter(x).shape == space and torch.equal(info.leave(info.enter(x)), x)
    if name == "Qwen-Image":
        with pytest.raises(ValueError, match="latent: it has 3 frames or layers"):
            info.enter(x.expand(-1, -1, 3, -1, -1))


def test_lora_modules_in_comfyui_s_names(pack):
    """Every module of the published adapters has a name and, where it is a part of a layer, its rows."""
    names = {"FLUX.1": ROOT / "tests/data/piflow/keys_gmflux1.json",
             "Qwen-Image": ROOT / "tests/data/piflow/keys_gmqwen.json"}
    for name, file in names.items():
        info = adapter_info(pack, name)
        modules = {key.split(".lora_")[0] for key in json.loads(file.read_text()) if ".lora_" in key}
        found = {module: pack("nodes.adapter_info").host_module(info.family, module, 3072) for module in modules}
        assert None not in found.values()
        assert len(set(found.values())) == len(modules) == {"FLUX.1": 154, "Qwen-Image": 240}[name]
    flux, two = adapter_info(pack, "FLUX.1").family, adapter_info(pack, "FLUX.2").family
    host_module = pack("nodes.adapter_info").host_module
    assert host_module(flux, "single_transformer_blocks.37.proj_mlp", 3072) == ("single_blocks.37.linear1",
                                                                                (9216, 12288))
    assert host_module(flux, "transformer_blocks.3.attn.add_k_proj", 10) == ("double_blocks.3.txt_attn.qkv", (10, 10))
    assert host_module(flux, "time_text_embed.timestep_embedder.linear_2", 10) == ("time_in.out_layer", None)
    assert host_module(two, "single_stream_modulation.linear", 10) == ("single_stream_modulation.lin", None)
    assert host_module(two, "transformer_blocks.0.ff.net.2", 10) is None and host_module(flux, "nonsense", 10) is None


def test_a_vae_of_another_space_is_refused_for_an_adapter(pack):
    check = pack("nodes.adapter_info").check_adapter_vae
    vaes = {name: types.SimpleNamespace(latent_channels=c, latent_dim=d, output_channels=3)
            for name, c, d in (("FLUX.1", 16, 2), ("Qwen-Image", 16, 3), ("FLUX.2", 128, 2))}
    for name in vaes:
        for other, vae in vaes.items():
            if name == other:
                check(adapter_info(pack, name), vae)
            else:
                with pytest.raises(ValueError, match=f"vae: this one decodes .* connect {name}'s own VAE"):
                    check(adapter_info(pack, name), vae)


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


def test_a_trace_says_how_large_it_is(pack, rng):
    """Each tensor once: without guidance and correction the three mixtures of a step are one."""
    core, guidance = pack("gmflow_core"), pack("gmflow_core.guidance")
    q, r = mixture(pack, rng), mixture(pack, rng)
    guided = iter([core.unguided(q), guidance.guide_probabilistic(q, r, 0.4)])
    x = torch.randn(2, 3, 4, 4, generator=rng)
    record = lambda recorder: core.sample_gm_ode(  # noqa: E731
        lambda x, sigma: next(guided), x, torch.tensor([1.0, 0.5, 0.0]), order=1, callback=recorder
    )
    source = pack("nodes.trace_source").TraceSource(record, None)
    assert source._comfy_cache_tensors() == []
    source.trace()
    tensors = source._comfy_cache_tensors()
    one = 2 * (4 * 3 * 16 + 4 * 16 + 1)                                  # numbers of a mixture of two images
    assert sum(t.numel() for t in tensors) == 2 * x.numel() + one + 2 * one + 2 * 16
    assert {t.dtype for t in tensors} == {torch.float16}
