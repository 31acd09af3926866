"""Text-to-image adapters in a real ComfyUI, against pi-Flow's own network and pipelines on tiny random models.

The bases are ComfyUI's own classes (tiny_pack/tiny.py), the adapters the published layout. FLUX.2 needs ComfyUI 0.33.
"""

from __future__ import annotations

import json

import pytest
import torch
from adapters import families, sigmas_of
from hosting import ROOT
from safetensors.torch import load_file

# ---- the authors' numbers ---------------------------------------------------------------------------


@families
@pytest.mark.parametrize("case", ["sample4_auto", "sample4_t1", "sample8_auto"])
@pytest.mark.parametrize("guider", ["core", "gmflow"])
def test_samples_of_the_authors_pipelines(model, tmp_path, name, case, guider):
    """Through a prompt: x at every network step, and the final."""
    tiny = model(name)
    if case not in tiny.io:
        pytest.skip("not recorded for FLUX.2")
    sampler = tiny.ode(temperature=1.0 if case.endswith("t1") else 0.0)
    path = tmp_path / "steps.safetensors"
    sampler = tiny.add("TinyRecord", sampler=sampler, path=str(path))
    own = guider == "gmflow" and tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text)
    tiny.run(tiny.custom(sampler, steps=int(case[6]), guider=own, node="SamplerCustomAdvanced"))
    found, expected = load_file(path), tiny.io
    torch.testing.assert_close(found["sigmas"][:-1], expected[f"{case}_sigma"], rtol=0, atol=1e-6)
    assert (found["x_src"].reshape(expected[f"{case}_x_src"].shape) - expected[f"{case}_x_src"]).abs().max() <= 2e-5
    assert (found["final"].reshape(expected[case].shape) - expected[case]).abs().max() <= 1e-3


# ---- the pack's nodes ----------------------------------------------------------------------------------


@families
def test_the_ksampler_is_the_advanced_graph(model, name):
    """Steps 0 are the adapter's 4, temperature and last step its own; no negative: no guidance, said once."""
    tiny = model(name)
    simple = tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=tiny.empty, seed=3,
                      steps=0, order=1)
    noise = tiny.add("RandomNoise", noise_seed=3)
    guider = tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text, guidance=0.0)
    custom = tiny.custom(tiny.ode(), noise=noise, guider=guider, node="SamplerCustomAdvanced", steps=0)
    before = tiny.host.log().count("sampling without guidance")
    got, expected = tiny.run(simple, custom)
    assert torch.equal(got, expected) and got.isfinite().all()
    assert tiny.host.log().count("sampling without guidance") == before + 1


@families
@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_guidance_by_a_negative_prompt(model, name, solver):
    tiny = model(name)
    other = tiny.add("TinyText", name=name, row=1)
    common = dict(model=tiny.model, positive=tiny.text, latent_image=tiny.empty, steps=4, solver=solver, guidance=0.3)
    guided, more, none, open_ = tiny.run(
        tiny.add("GMFlowKSampler", **common, negative=other),
        tiny.add("GMFlowKSampler", **common | {"guidance": 0.6}, negative=other),
        tiny.add("GMFlowKSampler", **common | {"guidance": 0.0}, negative=other), tiny.add("GMFlowKSampler", **common),
    )
    assert torch.equal(none, open_) and guided.isfinite().all()
    assert 0.01 < (guided - none).abs().mean() < (more - none).abs().mean()


@families
def test_scheduler(model, name):
    """The grid of the recorded pipelines; final step 1 and other steps where asked for; denoise keeps the tail."""
    tiny = model(name)
    add = lambda **inputs: tiny.add("GMFlowScheduler", model=tiny.model, **inputs)  # noqa: E731
    ends = [sigmas_of(tiny, add(**inputs))
            for inputs in (dict(steps=0), dict(steps=2, final_step=1.0), dict(steps=2, denoise=0.5))]
    raw = lambda *ts: torch.tensor([3.2 * t / (1 + 2.2 * t) for t in ts])  # noqa: E731
    for got, expected in zip(ends, (raw(1, 5 / 7, 3 / 7, 1 / 7, 0), raw(1, 0.5, 0), raw(3 / 7, 1 / 7, 0)),
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@families
def test_an_image_is_the_same_in_any_batch(model, name):
    one, three = model(name), model(name, batch=3)

    def add(tiny, latent):
        return tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=latent, steps=4,
                        solver="GM-SDE")

    alone = one.run(add(one, one.empty))
    batch, last = three.run(
        add(three, three.empty), add(three, three.add("LatentFromBatch", samples=three.empty, batch_index=2, length=1)),
    )
    torch.testing.assert_close(batch[:1], alone, rtol=0, atol=2e-2)
    torch.testing.assert_close(batch[2:], last, rtol=0, atol=2e-2)
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@families
def test_noise_mask_and_image_to_image(model, name):
    """Where the mask is 0 the image stays; without a mask, less denoise keeps more of it."""
    tiny = model(name)
    generator = torch.Generator().manual_seed(0)
    image = tiny.latent(torch.randn(tiny.io["sample_noise"].shape, generator=generator), "image")
    solid = tiny.add("SolidMask", value=1.0, width=32, height=64)
    mask = tiny.add("MaskComposite", destination=tiny.add("SolidMask", value=0.0, width=64, height=64), source=solid,
                    x=0, y=0, operation="add")
    masked = tiny.add("SetLatentNoiseMask", samples=image, mask=mask)
    common = dict(model=tiny.model, positive=tiny.text, steps=4)
    kept, weak, strong, original = tiny.run(
        tiny.add("GMFlowKSampler", **common, latent_image=masked),
        tiny.add("GMFlowKSampler", **common, latent_image=image, denoise=0.3),
        tiny.add("GMFlowKSampler", **common, latent_image=image), image,
    )
    half = kept.shape[-1] // 2
    assert (kept - original)[..., half + 1 :].abs().max() < 1e-4
    assert (kept - original)[..., : half - 1].abs().mean() > 0.05
    assert (weak - original).abs().mean() < (strong - original).abs().mean()


@families
@pytest.mark.parametrize("size", [(9, 5), (2, 3)])
def test_odd_sizes(model, name, size):
    tiny = model(name)
    channels = tiny.io["sample_noise"].shape[1]
    latent = tiny.latent(torch.zeros(1, channels, *size))
    got = tiny.run(tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=latent, steps=2))
    assert got.shape == (1, channels, *size) and got.isfinite().all()


@families
def test_inspector(model, name):
    """A trace in the mixture's space, in rough colours; every view."""
    tiny = model(name)
    sampler = tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=tiny.empty, steps=4)
    views = [tiny.add("GMFlowInspector", trace=sampler.out(1), view=view, step=1)
             for view in ("components", "sheet", "timeline", "pixel")]
    text = tiny.add("PreviewAny", source=views[0].out(1))
    result = tiny.host.done(tiny.graph)
    assert all(result.images(view)[0].startswith(b"\x89PNG") for view in views)
    numbers = json.loads(result.outputs[text[0]]["text"][0])
    assert len(numbers["steps"]) == 4
    assert numbers["steps"][0]["sigma"] == 1 and len(numbers["steps"][0]["weights"]) == 8


@families
def test_core_samplers_see_an_ordinary_flow_model(model, name):
    """euler on the GM grid is Euler on the recorded mean: here on the mean that the pack itself returns."""
    tiny = model(name)
    sigmas = tiny.add("GMFlowScheduler", model=tiny.model, steps=4)
    euler = tiny.custom(tiny.add("KSamplerSelect", sampler_name="euler"), sigmas=sigmas)
    ours = tiny.custom(tiny.ode(substeps=1, temperature=1.0), sigmas=sigmas)
    got, expected = tiny.run(euler, ours)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


@families
def test_every_core_sampler_and_scheduler(model, name):
    """Each sampler runs with the adapter if it runs without."""
    tiny = model(name)
    samplers, schedulers = tiny.options("KSampler", "sampler_name"), tiny.options("KSampler", "scheduler")
    pairs = [(sampler, "simple") for sampler in samplers] + [("euler", scheduler) for scheduler in schedulers]
    failed = []
    for sampler, scheduler in pairs:
        graph = model(name)
        with_adapter, plain = (
            graph.add("KSampler", model=m, positive=graph.text, negative=graph.text, latent_image=graph.empty,
                      cfg=1.0, steps=3, sampler_name=sampler, scheduler=scheduler, seed=0)
                      for m in (graph.model, graph.base)
        )
        result = tiny.host.run({**graph.graph,
                                "save": {"class_type": "SaveLatent",
                                         "inputs": {"samples": with_adapter, "filename_prefix": "core"}}})
        if not result.ok:
            without = tiny.host.run({**graph.graph,
                                     "save": {"class_type": "SaveLatent",
                                              "inputs": {"samples": plain, "filename_prefix": "core"}}})
            failed += [(sampler, scheduler, result.error)] if without.ok else []
    assert not failed and len(pairs) > 45


@families
@pytest.mark.parametrize("solver", ["SamplerGMFlowODE", "SamplerGMFlowSDE"])
def test_core_cfg_with_a_negative(model, name, solver):
    """CFGGuider's guidance moves the mixture; at scale 1 it is none."""
    tiny = model(name)
    other, sampler = tiny.add("TinyText", name=name, row=1), tiny.add(solver)
    guiders = [tiny.add("CFGGuider", model=tiny.model, positive=tiny.text, negative=other, cfg=cfg)
               for cfg in (1.0, 3.0)]
    none, three, basic = tiny.run(*(tiny.custom(sampler, guider=guider) for guider in guiders), tiny.custom(sampler))
    torch.testing.assert_close(none, basic, rtol=0, atol=2e-2)
    assert (three - none).abs().mean() > 0.01


WORKFLOWS = {"text_to_image_flux1": "gmflux_tiny", "text_to_image_qwen": "gmqwen_tiny",
             "text_to_image_flux2": "gmflux2_tiny",
             "what_flux_is_undecided_about": "gmflux_tiny"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_workflows_run(model, workflow):
    """The committed API file on a small latent, with a stored text for its text encoders. Its loaders stay and get
    other names, but where ComfyUI does not know a size: 0.3.64 of all, no version of Qwen-Image."""
    tiny = model(WORKFLOWS[workflow])
    prompt = json.loads((ROOT / "workflows" / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    file, kept = f"{tiny.name}.safetensors", []
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("UNETLoader", "VAELoader"):
            name, tests_own = ("unet_name", "TinyBase") if kind == "UNETLoader" else ("vae_name", "TinyVAE")
            if file in tiny.options(kind, name):
                inputs[name] = file
                kept.append(kind)
            else:
                node |= {"class_type": tests_own, "inputs": tiny.graph.filled(tests_own, name=tiny.name)}
        elif kind == "CLIPTextEncode":
            node |= {"class_type": "TinyText", "inputs": {"name": tiny.name, "row": 0}}
        elif kind == "GMFlowApplyAdapter":
            inputs["adapter_name"] = file
        elif "width" in inputs:
            inputs |= {"width": 64, "height": 96}
    if "gmflux2_tiny" in tiny.options("TinyBase", "name"):
        assert kept == (["VAELoader"] if tiny.name == "gmqwen_tiny" else ["UNETLoader", "VAELoader"])
    prompt = {key: node for key, node in prompt.items() if "CLIPLoader" not in node["class_type"]}
    result = tiny.host.done(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert saved and all(result.outputs[key]["images"] for key in saved)
