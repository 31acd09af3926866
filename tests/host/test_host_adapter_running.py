"""Text-to-image adapters in a real ComfyUI: previews, cancelling, masks, reference latents, evidence, a VAE of its own,
and what other people's nodes wrap around a sampler. Latents are tiny: it is the paths that are tested."""

from __future__ import annotations

import json
import time

import pytest
import torch
from adapters import Tiny, families
from hosting import Listener, Node
from test_host_running import watch


@pytest.fixture
def listener(tiny):
    listener = Listener(tiny)
    yield listener
    listener.close()


def gm(tiny: Tiny, **inputs) -> Node:
    """GMFlowKSampler, four steps."""
    return tiny.add("GMFlowKSampler",
                    **dict(model=tiny.model, positive=tiny.text, latent_image=tiny.empty, steps=4, order=1) | inputs)


def noise(tiny: Tiny, size, name: str, seed: int = 0) -> Node:
    """A latent of this size, of noise."""
    channels = tiny.io["sample_noise"].shape[1]
    return tiny.latent(torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed)), name)


def euler_and_one_substep(tiny: Tiny, **inputs) -> list[Node]:
    """The core's euler, and GM-ODE that takes one substep with the mixture as it is: the same steps."""
    sampler = tiny.add("KSamplerSelect", sampler_name="euler")
    return [tiny.custom(sampler, **inputs), tiny.custom(tiny.ode(substeps=1, temperature=1.0), **inputs)]


# ---- running ---------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_progress_and_previews(model, listener, name, solver):
    """One step forward for every network step, each with a picture."""
    tiny = model(name)
    tiny.host.save(tiny.graph, gm(tiny, solver=solver, seed=next(tiny.host.counter)))
    progress, binary = watch(tiny.host, listener, tiny.graph)
    previews = [data for data in binary if int.from_bytes(data[:4], "big") in (1, 4)]  # 3 is a line of text
    assert [step["value"] for step in progress] == [1, 2, 3, 4] and {step["max"] for step in progress} == {4}
    assert len(previews) >= 3 and all(b"\xff\xd8" in data[:400] or b"PNG" in data[:128] for data in previews)


@families
def test_cancel_within_a_step(model, listener, name):
    """Within the many substeps of the only step; the next prompt runs."""
    tiny = model(name)
    size = (64, 64) if name == "gmflux2_tiny" else (128, 128)
    latent = noise(tiny, size, "large")
    tiny.host.save(tiny.graph, gm(tiny, latent_image=latent, steps=1, substeps=1024, seed=next(tiny.host.counter)))
    prompt_id = tiny.host.queue(tiny.graph, listener.client_id)["prompt_id"]
    while True:
        kind, payload = listener.frame()
        if kind == 1 and json.loads(payload)["type"] == "progress":
            break
    start = time.monotonic()
    tiny.host.post("/interrupt", {})
    listener.until_done(prompt_id)
    assert tiny.host.wait(prompt_id).interrupted and time.monotonic() - start < 30
    tiny = model(name)
    assert tiny.run(gm(tiny, seed=next(tiny.host.counter))).isfinite().all()


# ---- what else is in a prompt ----------------------------------------------------------------------------


@families
def test_reference_latents(model, name):
    """ReferenceLatent, as for Kontext and Edit: it acts, and GM samplers and core samplers agree on the image."""
    tiny = model(name)
    one, two = (noise(tiny, size, "reference", seed) for seed, size in enumerate([(6, 4), (4, 6)]))
    text = tiny.add("ReferenceLatent", conditioning=tiny.text, latent=one)
    text = tiny.add("ReferenceLatent", conditioning=text, latent=two)
    guider = tiny.add("BasicGuider", model=tiny.model, conditioning=text)
    euler, same, many, without = tiny.run(
        *euler_and_one_substep(tiny, guider=guider), tiny.custom(tiny.ode(), guider=guider), tiny.custom(tiny.ode()),
    )
    torch.testing.assert_close(same, euler, rtol=0, atol=1e-3)
    assert many.shape == without.shape and (many - without).abs().mean() > 1e-3


@families
def test_grey_masks_and_mask_functions(model, name):
    """A grey noise mask, and one that depends on sigma (Differential Diffusion): as euler takes them."""
    tiny = model(name)
    mask = tiny.add("MaskComposite", destination=tiny.add("SolidMask", value=0.5, width=64, height=64),
                    source=tiny.add("SolidMask", value=0.3, width=32, height=64), x=0, y=0, operation="add")
    size = tiny.io["sample_noise"].shape[-2:]
    masked = tiny.add("SetLatentNoiseMask", samples=noise(tiny, size, "image"), mask=mask)
    differential = tiny.add("BasicGuider", model=tiny.add("DifferentialDiffusion", model=tiny.model),
                            conditioning=tiny.text)
    grey, ours, moving, our_moving, free = tiny.run(
        *euler_and_one_substep(tiny, latent_image=masked),
        *euler_and_one_substep(tiny, latent_image=masked, guider=differential), tiny.custom(tiny.ode()),
    )
    torch.testing.assert_close(ours, grey, rtol=0, atol=1e-3)
    torch.testing.assert_close(our_moving, moving, rtol=0, atol=1e-3)
    assert (grey - moving).abs().mean() > 0.01 and (ours - free).abs().mean() > 0.01


@families
def test_an_image_is_changed_from_the_tail_of_a_longer_grid(model, name):
    """denoise 0.5: noise of the grid's first sigma on the image, as the core puts it there."""
    tiny = model(name)
    size = tiny.io["sample_noise"].shape[-2:]
    image, sigmas = noise(tiny, size, "image"), tiny.add("GMFlowScheduler", model=tiny.model, steps=2, denoise=0.5)
    inputs = dict(latent_image=image, sigmas=sigmas, noise=tiny.add("RandomNoise", noise_seed=5))
    guider = tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text, guidance=0.0)
    euler, ours, simple, steps = tiny.run(
        *euler_and_one_substep(tiny, **inputs),
        gm(tiny, latent_image=image, steps=2, denoise=0.5, seed=5), tiny.custom(tiny.ode(), guider=guider, **inputs),
    )
    torch.testing.assert_close(ours, euler, rtol=0, atol=1e-3)
    assert torch.equal(simple, steps) and (simple - euler).abs().mean() > 1e-3


# ---- evidence ---------------------------------------------------------------------------------------------


def hinted(tiny: Tiny, kind: str = "colour", vae: str | None = "", **inputs) -> Node:
    """The MODEL with a hint in its left half: a red picture, encoded by the model's VAE (or another one, or none)."""
    picture = tiny.add("EmptyImage", width=128, height=64, batch_size=1, color=0xFF2010)
    mask = tiny.add("MaskComposite", destination=tiny.add("SolidMask", value=0.0, width=128, height=64),
                    source=tiny.add("SolidMask", value=1.0, width=64, height=64), x=0, y=0, operation="add")
    if vae is not None:
        inputs["vae"] = tiny.add("TinyVAE", name=vae or tiny.name)
    evidence = tiny.add("GMFlowHint", image=picture, kind=kind, mask=mask, std=0.05, **inputs)
    return tiny.add("GMFlowApplyEvidence", model=tiny.model, evidence=evidence)


@families
def test_evidence(model, name):
    """A hint in latents: its half of the image is the encoded picture, with every sampler; the other half is free."""
    tiny = model(name)
    size = (4, 8) if name == "gmflux2_tiny" else (8, 16)
    latent = noise(tiny, size, "canvas")
    given = hinted(tiny)
    picture = tiny.add("VAEEncode", vae=tiny.add("TinyVAE", name=name),
                       pixels=tiny.add("EmptyImage", width=128, height=64, batch_size=1, color=0xFF2010))
    core = tiny.add("BasicGuider", model=given, conditioning=tiny.text)
    inputs = dict(latent_image=latent, noise=tiny.add("RandomNoise", noise_seed=0))
    expected, free, *found = tiny.run(
        picture, gm(tiny, latent_image=latent), gm(tiny, model=given, latent_image=latent),
        gm(tiny, model=given, latent_image=latent, solver="GM-SDE", negative=tiny.add("TinyText", name=name, row=1)),
        tiny.custom(tiny.ode(), guider=core, **inputs),
        tiny.custom(tiny.add("KSamplerSelect", sampler_name="euler"), guider=core, **inputs),
    )
    half = expected.shape[-1] // 2
    error = [(image - expected)[..., :half].abs().mean() for image in (free, *found)]
    print(name, [f"{value:.3f}" for value in error])
    assert all(value < 0.5 * error[0] for value in error[1:])
    assert all((image - expected)[..., half:].abs().mean() > 0.1 for image in found)


@pytest.mark.parametrize("name", ["gmflux_tiny", "gmqwen_tiny"])
@pytest.mark.parametrize("build, message", [
    (lambda tiny, other: hinted(tiny, vae=None), "connect the model's vae to GMFlow Hint"),
    (lambda tiny, other: hinted(tiny, kind="brightness"), "with a vae only colour works"),
    (lambda tiny, other: hinted(tiny, vae=other), "encode it with this model's vae"),
    (lambda tiny, other: tiny.add("GMFlowApplyEvidence", model=tiny.model, evidence=tiny.add(
        "GMFlowSmallPicture", image=tiny.add("EmptyImage", width=8, height=8))), "is about RGB pixels"),
])
def test_evidence_that_does_not_suit(model, name, build, message):
    tiny = model(name)
    given = build(tiny, {"gmflux_tiny": "gmqwen_tiny", "gmqwen_tiny": "gmflux_tiny"}[name])
    tiny.host.save(tiny.graph, gm(tiny, model=given))
    error = tiny.host.refused(tiny.graph).rstrip("\n")
    assert message in error and error.startswith("ValueError: ") and "\n" not in error


# ---- the inspector -----------------------------------------------------------------------------------------


@families
def test_inspector_with_a_vae(model, name):
    """Components decoded by the model's own kind of VAE, eight (FLUX.2: sixteen) times their latents' size."""
    tiny = model(name)
    latent = noise(tiny, (2, 3) if name == "gmflux2_tiny" else (4, 6), "small")
    trace = gm(tiny, latent_image=latent, steps=2).out(1)
    vae = tiny.add("TinyVAE", name=name)
    decoded, rough = (tiny.add("GMFlowInspector", trace=trace, step=0, max_components=2, **inputs)
                      for inputs in ({"vae": vae}, {}))
    result = tiny.host.done(tiny.graph)
    assert result.images(decoded)[0].startswith(b"\x89PNG") and result.images(decoded) != result.images(rough)


# ---- other people's nodes ------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("sampler", ["SamplerGMFlowODE", "SamplerGMFlowSDE"])
def test_what_others_wrap_around(model, name, sampler):
    """Each of the tests' own wrappers, which do what well-known packs do, changes the image as it does euler's."""
    tiny = model(name)
    inner, changed = tiny.add(sampler, order=1), []
    for node in ("TestOtherSigma", "TestOtherAnswer", "TestWritesToX"):
        changed.append(tiny.custom(tiny.add(node, sampler=inner), steps=2))
    for node in ("TestAsksAgain", "TestMomentum", "TestScale", "TestOtherNetwork"):
        guider = tiny.add("CFGGuider", model=tiny.add(node, model=tiny.model), positive=tiny.text,
                          negative=tiny.add("TinyText", name=name, row=1), cfg=1.5)
        changed.append(tiny.custom(inner, guider=guider, steps=2))
    guided = tiny.add("CFGGuider", model=tiny.model, positive=tiny.text,
                      negative=tiny.add("TinyText", name=name, row=1), cfg=1.5)
    plain, guided, *changed = tiny.run(tiny.custom(inner, steps=2), tiny.custom(inner, guider=guided, steps=2),
                                       *changed)
    for index, image in enumerate(changed):
        assert image.isfinite().all() and (image - (plain if index < 3 else guided)).abs().mean() > 1e-3, index


@families
@pytest.mark.parametrize("sampler", ["SamplerGMFlowODE", "SamplerGMFlowSDE"])
def test_lanpaint_and_detail_daemon(model, name, sampler):
    """The packs themselves, where they lie beside the repository."""
    tiny = model(name)
    lacking = {"LanPaint_SamplerCustomAdvanced", "DetailDaemonSamplerNode", "LyingSigmaSampler"} - set(tiny.host.info)
    if lacking:
        pytest.skip(f"no {', '.join(sorted(lacking))} beside the repository")
    mask = tiny.add("MaskComposite", destination=tiny.add("SolidMask", value=0.0, width=64, height=64),
                    source=tiny.add("SolidMask", value=1.0, width=32, height=64), x=0, y=0, operation="add")
    size = tiny.io["sample_noise"].shape[-2:]
    image = noise(tiny, size, "image")
    masked = tiny.add("SetLatentNoiseMask", samples=image, mask=mask)
    guider = tiny.add("CFGGuider", model=tiny.model, positive=tiny.text, negative=tiny.text, cfg=1.0)
    inner = tiny.add(sampler, order=1)
    wrapped = [tiny.add(node, sampler=inner) for node in ("DetailDaemonSamplerNode", "LyingSigmaSampler")]
    inpainted = dict(guider=guider, latent_image=masked, node="LanPaint_SamplerCustomAdvanced")
    original, plain, kept, lan, daemon, lying = tiny.run(
        image, tiny.custom(inner), tiny.custom(inner, guider=guider, latent_image=masked),
        tiny.custom(inner, **inpainted), *(tiny.custom(sampler) for sampler in wrapped),
    )
    half = size[-1] // 2
    assert (lan - original)[..., half + 1 :].abs().max() < 1e-4
    changes = [(image - plain).abs().mean() for image in (daemon, lying)] + [(lan - kept).abs().mean()]
    print(name, sampler, [f"{value:.3f}" for value in changes])
    assert all(value > 1e-3 for value in changes)
