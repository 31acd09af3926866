"""What else of the core's nodes acts on a GMFlow model: patches, LoRA, merges, dtypes, hooks."""

import pytest
import torch
from conftest import assert_same
from safetensors.torch import save_file
from test_host_basics import BUNDLED

from gmflow_core.checkpoint import read_state

# ---- patches of the model --------------------------------------------------------------------------

@pytest.mark.parametrize("node, inputs", [
    ("ModelSamplingSD3", dict(shift=3.0)), ("ModelSamplingAuraFlow", dict(shift=1.73)),
    ("ModelSamplingFlux", dict(max_shift=1.15, base_shift=0.5, width=1024, height=1024)),
])
def test_shift_patches(digits, recognised, node, inputs):
    g = digits()
    patched = g.add(node, model=g.model, **inputs)
    plain, gm, core = g.latents(g.gm(guidance=0.3), g.gm(model=patched, guidance=0.3), g.core(model=patched))
    assert recognised(gm) >= 9 and recognised(core) >= 8 and not torch.equal(plain, gm)


def test_a_shift_patch_is_the_shift(digits):
    g = digits(batch=2, labels="6")
    patched = g.add("ModelSamplingSD3", model=g.model, shift=3.0)
    a, b = g.latents(g.gm(model=patched, steps=4), g.gm(shift=3.0, steps=4))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("node, inputs", [
    ("RescaleCFG", {}), ("CFGZeroStar", {}), ("Mahiro", {}), ("APG", {}), ("TCFG", {}),
    ("PerturbedAttentionGuidance", {}), ("SkipLayerGuidanceDiT", {}), ("FreSca", {}), ("RenormCFG", {}),
    ("CFGNorm", {}), ("EpsilonScaling", {}), ("HyperTile", {}),
    ("NAGuidance", {}),
])
def test_patches_of_guidance_do_no_harm(host, digits, node, inputs):
    """Patches for other models: they act on the mean, or not at all."""
    if node not in host.info:
        pytest.skip("not in this version")
    g = digits(batch=1, labels="6")  # RenormCFG fails on batches, whatever the model
    patched = g.add(node, model=g.model, **inputs)
    cfg = g.add("CFGGuider", model=patched, positive=g.positive, negative=g.negative, cfg=2.0)
    for latent in g.latents(g.gm(model=patched, steps=3), g.core(model=patched, steps=3),
                            g.custom(g.add("SamplerGMFlowODE"), cfg, steps=3)):
        assert latent.isfinite().all() and latent.abs().max() < 5


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_step_caches(digits, node):
    """They skip the network: core samplers run on; a GM sampler has no mixture then and says so."""
    g = digits(batch=1, labels="6")  # 0.3.64's EasyCache fails on batches, whatever the model
    patched = g.add(node, model=g.model, reuse_threshold=3.0, start_percent=0.1, end_percent=0.95)
    assert g.latents(g.core(model=patched, steps=10)).isfinite().all()
    g.host.save(g.graph, g.gm(model=patched, steps=10))
    result = g.host.run(g.graph)
    assert result.ok or "mixture" in result.error, result.error


def make_lora(host, name: str) -> None:
    """A patch of one layer, in the names that ComfyUI's generic loader knows."""
    shape = read_state(BUNDLED).state["transformer_blocks.0.attn1.to_q.weight"].shape
    key, rng = "diffusion_model.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    save_file({
        f"{key}.lora_up.weight": torch.randn((shape[0], 4), generator=rng) * 0.1,
        f"{key}.lora_down.weight": torch.randn((4, shape[1]), generator=rng) * 0.1,
    }, host.base / "models" / "loras" / name)


def test_lora(host, digits):
    make_lora(host, "tiny.safetensors")
    g = digits(batch=2, labels="6")
    on, off = (g.add("LoraLoaderModelOnly", model=g.model, lora_name="tiny.safetensors", strength_model=s)
               for s in (1.0, 0.0))
    plain, patched, zero, core, core_patched = g.latents(
        g.gm(steps=3), g.gm(model=on, steps=3), g.gm(model=off, steps=3), g.core(steps=3), g.core(model=on, steps=3)
    )
    assert torch.equal(plain, zero) and (plain - patched).abs().max() > 1e-3
    assert (core - core_patched).abs().max() > 1e-3


def test_a_patch_to_another_kind_of_model_is_refused(digits):
    g = digits(batch=1, labels="6")
    patched = g.add("ModelSamplingDiscrete", model=g.model, sampling="eps")
    g.host.save(g.graph, g.gm(model=patched, steps=2))
    assert "GMFlow models are flows; remove that node" in g.host.refused(g.graph)


def test_merged_models(digits):
    g = digits(batch=1, labels="6")
    merged = g.add("ModelMergeSimple", model1=g.model, ratio=0.5,
                   model2=g.add("GMFlowLoader", model_name=BUNDLED.name, weight_dtype="float32"))
    a, b = g.latents(g.gm(steps=2), g.gm(model=merged, steps=2))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "fp8_e4m3fn", "fp8_e5m2"])
def test_weight_dtypes(digits, recognised, dtype):
    g = digits(weight_dtype=dtype)
    assert recognised(g.latents(g.gm(guidance=0.3, steps=4))) >= 9


# ---- more of the core's nodes ----------------------------------------------------------------------

def perp_neg(g):
    guider = g.add("PerpNegGuider", model=g.model, positive=g.positive, negative=g.negative,
                   empty_conditioning=g.negative, cfg=2.0)
    return [g.custom(g.add(f"SamplerGMFlow{solver}"), guider, steps=3) for solver in ("ODE", "SDE")]


def two_models(g):
    guider = g.add("DualModelGuider", model=g.model, positive=g.positive, negative=g.negative, model_negative=g.model)
    return [g.custom(g.add("SamplerGMFlowODE"), guider, steps=3)]


def cfg_override(g):
    return [g.gm(model=g.add("CFGOverride", model=g.model), steps=3)]


def sampler_custom(g):
    return [g.add(
        "SamplerCustom", model=g.model, positive=g.positive, negative=g.negative, cfg=1.5,
        sampler=g.add("SamplerGMFlowODE"), sigmas=g.add("GMFlowScheduler", model=g.model, steps=3),
        latent_image=g.empty, noise_seed=0,
    )]


def compute_dtype(g):
    return [sample(model=g.add("ModelComputeDtype", model=g.model, dtype=dtype), steps=3) for dtype in ("bf16", "fp16")
            for sample in (g.gm, g.core)]


def default_combine(g):
    other = g.add("GMFlowClassConditioning", model=g.model, labels="3")
    return [g.gm(positive=g.add("ConditioningSetDefaultCombine", cond=g.positive, cond_DEFAULT=other), steps=2)]


def seed_behaviour(g):
    return [g.gm(latent_image=g.add("LatentBatchSeedBehavior", samples=g.empty, seed_behavior="fixed"), steps=2,
                 solver="GM-SDE")]


def joined_batches(g):
    return [g.gm(latent_image=g.add("LatentBatch", samples1=g.empty, samples2=g.empty), steps=2, solver="GM-SDE")]


@pytest.mark.parametrize("build", [
    perp_neg, two_models, cfg_override, sampler_custom, compute_dtype, default_combine, seed_behaviour, joined_batches,
])
def test_more_nodes(host, digits, build):
    g = digits(batch=2, labels="6")
    try:
        links = build(g)
    except KeyError as error:
        pytest.skip(f"{error} is not in this version")
    latents = g.latents(*links, g.empty)[:-1]
    assert all(latent.isfinite().all() and 0 < latent.abs().max() < 5 for latent in latents)
    if build is seed_behaviour:
        assert_same(latents[0][:1], latents[0][1:])


def test_hooks(host, digits):
    """A LoRA for one of two conditionings: the core then evaluates them apart."""
    make_lora(host, "hook.safetensors")
    g = digits(batch=1, labels="6")
    hooks = g.add("CreateHookLoraModelOnly", lora_name="hook.safetensors", strength_model=1.0)
    pair = g.add("PairConditioningSetProperties", positive_NEW=g.positive, negative_NEW=g.negative, strength=1.0,
                 set_cond_area="default", hooks=hooks)
    plain, one, both = g.latents(g.gm(steps=3), g.gm(steps=3, positive=pair),
                                 g.gm(steps=3, positive=pair, negative=pair.out(1)))
    assert len({tuple(x.flatten().tolist()) for x in (plain, one, both)}) == 3 and both.isfinite().all()


def test_models_unloaded_between(host, digits):
    g = digits(batch=1, labels="6")
    first = g.latents(g.gm(steps=2))
    host.post("/free", {"unload_models": True, "free_memory": True})
    again = digits(batch=1, labels="6")
    assert torch.equal(first, again.latents(again.gm(steps=2)))
