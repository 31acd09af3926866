"""Evidence in a real ComfyUI: the same numbers as ``gmflow_core``, and together with the core's nodes."""

import json

import pytest
import torch
from conftest import assert_same
from PIL import Image
from test_host_numbers import checkpoint, core_noise  # noqa: F401
from test_host_running import listener, watch  # noqa: F401

from gmflow_core import (
    Conditioned,
    GMDenoiser,
    Inpaint,
    SecondOrder,
    condition,
    flow_sigmas,
    sample_gm_ode,
    sample_gm_sde,
)
from gmflow_core.hints import COLOURLESS, hint, small_picture
from gmflow_core.noise import ImageNoise
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT
from gmflow_core.schedule import default_substeps
from train.data.digits import INKS
from train.evaluate.digits_metrics import dominant_inks

SECOND = SecondOrder(tilt=SECOND_ORDER_TILT)


@pytest.fixture
def painted(host):
    """``painted(pixels, size)``: the name of a picture in the input folder, transparent where painted, as the mask
    editor leaves it."""
    def paint(pixels, size=(16, 16), name="hint.png"):
        image = Image.new("RGBA", size, (0, 0, 0, 255))
        for place, colour in pixels.items():
            image.putpixel(place, (*colour, 0))
        image.save(host.base / "input" / name)
        return name
    return paint


def mask_and_picture(pixels, size=(16, 16)):
    """The same as tensors."""
    picture, mask = torch.full((1, 3, size[1], size[0]), -1.0), torch.zeros(1, 1, size[1], size[0])
    for (x, y), colour in pixels.items():
        picture[0, :, y, x] = torch.tensor(colour) / 127.5 - 1
        mask[0, 0, y, x] = 1
    return picture, mask


MAGENTA = {(8, 4): (255, 0, 255)}


def hinted(g, name, kind="colour", std=0.05, **options):
    """A model with a painted hint."""
    image = g.add("LoadImage", image=name)
    evidence = g.add("GMFlowHint", image=image, mask=image.out(1), kind=kind, std=std)
    return g.add("GMFlowApplyEvidence", model=g.model, evidence=evidence, **options)


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("guidance", [0.0, 0.45])
def test_a_hint_is_the_core_package_s(digits, painted, checkpoint, guidance, propagate):  # noqa: F811
    g = digits(batch=3, labels="0,3,7")
    model = hinted(g, painted(MAGENTA), propagate=propagate)
    found = g.latents(g.gm(model=model, guidance=guidance, steps=5, seed=11))
    given = Conditioned(hint(*mask_and_picture(MAGENTA), "colour", 0.05), propagate)
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([0, 3, 7]), guidance, tilt=GUIDANCE_TILT, evidence=given)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(3, 11), flow_sigmas(5),
                                 substeps=default_substeps(5), second_order=SECOND)
    assert_same(found, expected)
    if propagate:  # the digits are in the ink of their one painted pixel
        assert dominant_inks(found).tolist() == [list(INKS).index("magenta")] * 3


def test_gm_sde_end_percent_and_limit_are_the_core_package_s(digits, painted, checkpoint):  # noqa: F811
    g = digits(batch=2, labels="3,7")
    model = hinted(g, painted(MAGENTA), kind="hue", std=0.3, end_percent=0.3, limit=2.0)
    found = g.latents(g.gm(model=model, guidance=0.3, solver="GM-SDE", steps=4, seed=11))
    given = Conditioned(hint(*mask_and_picture(MAGENTA), "hue", 0.3), limit=2.0, until=0.7)
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([3, 7]), 0.3, tilt=GUIDANCE_TILT, evidence=given)
    with torch.no_grad():
        expected = sample_gm_sde(
            denoiser, core_noise(2, 11), flow_sigmas(4), spectrum=checkpoint.spectrum, second_order=SECOND,
            noise_sampler=ImageNoise(11, range(2), (3, 16, 16), torch.device("cpu")),
        )
    assert_same(found, expected)


def test_a_core_guider_conditions_afterwards(digits, painted, checkpoint):  # noqa: F811
    """Core guiders with GM samplers: the guided posterior is conditioned, echo and all."""
    g = digits(batch=2, labels="2")
    model = hinted(g, painted(MAGENTA))
    guider = g.add("BasicGuider", model=model, conditioning=g.positive)
    found = g.latents(g.custom(g.add("SamplerGMFlowODE"), guider, steps=4))
    given = hint(*mask_and_picture(MAGENTA), "colour", 0.05)
    denoiser = condition(GMDenoiser(checkpoint.model, torch.tensor([2, 2])), given)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(2, 0), flow_sigmas(4),
                                 substeps=default_substeps(4), second_order=SECOND)
    assert_same(found, expected)


def test_vanilla_cfg_of_our_guider_conditions_as_the_core_s_does(digits, painted):
    """It goes through the core's CFG, so evidence comes after it, with a GM sampler and with a core one."""
    g = digits(batch=2, labels="2")
    model = hinted(g, painted(MAGENTA))
    ours = g.add("GMFlowGuider", model=model, positive=g.positive, negative=g.negative, method="vanilla CFG",
                 cfg_scale=2.0)
    core = g.add("CFGGuider", model=model, positive=g.positive, negative=g.negative, cfg=2.0)
    plain = g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=2.0)
    for sampler in (g.add("SamplerGMFlowODE"), g.add("KSamplerSelect", sampler_name="euler")):
        found, expected, without = (g.latents(g.custom(sampler, guider, steps=4)) for guider in (ours, core, plain))
        assert_same(found, expected)
        assert (found - without).abs().mean() > 0.01


def test_a_core_sampler_gets_the_tilted_mean(digits, painted, checkpoint):  # noqa: F811
    """Euler on the mean of the tilted posterior: by hand, with the formula for a colour."""
    g = digits(batch=2, labels="2")
    model = hinted(g, painted(MAGENTA))
    sigmas = g.add("GMFlowScheduler", model=g.model, steps=4)
    euler = g.add("KSamplerSelect", sampler_name="euler")
    found = g.latents(g.custom(euler, g.add("BasicGuider", model=model, conditioning=g.positive), sigmas))
    picture, mask = mask_and_picture(MAGENTA)
    x, grid = core_noise(2, 0), flow_sigmas(4).tolist()
    with torch.no_grad():
        for s, t in zip(grid, grid[1:], strict=False):
            m = GMDenoiser(checkpoint.model, torch.tensor([2, 2]))(x, s).posterior
            precision, means = mask / 0.05**2, m.means
            h, grow = (precision * picture).unsqueeze(1), (1 + precision * m.var).unsqueeze(1)
            exponent = (h * means - 0.5 * precision.unsqueeze(1) * means**2).sum(2, keepdim=True) / grow
            w = (m.log_weights + exponent).softmax(1)
            mean = (w * (means + m.var.unsqueeze(1) * h) / grow).sum(1)
            x = mean + (x - mean) * (t / s)
    assert_same(found, x)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_core_samplers_keep_a_hint(digits, painted, sampler):
    """It draws its own pixel nearer."""
    g = digits(batch=2, labels="2,3")
    with_hint, without = g.latents(*(g.core(model=m, sampler_name=sampler, steps=6, cfg=1.5)
                                     for m in (hinted(g, painted(MAGENTA), std=0.02), g.model)))
    wanted = torch.tensor([1.0, -1.0, 1.0])
    off, plain = ((x[..., 4, 8] - wanted).square().mean().sqrt() for x in (with_hint, without))
    assert with_hint.isfinite().all() and off < 0.8 * plain


def test_exactness_and_propagation_together(digits, painted, checkpoint):  # noqa: F811
    """A noise mask keeps what evidence only draws near, denoise below 1 starts from the image."""
    g = digits(batch=1, labels="5")
    pixels = {(x, y): (0, 255, 255) for x in range(6, 8) for y in range(16)}
    name = painted(pixels)
    image = g.add("LoadImage", image=name)
    model = hinted(g, name)
    pixel = g.add("VAELoader", vae_name="pixel_space")
    encoded, free = g.add("VAEEncode", pixels=image, vae=pixel), g.add("InvertMask", mask=image.out(1))
    latent = g.add("SetLatentNoiseMask", samples=encoded, mask=free)
    found = g.latents(g.gm(model=model, latent_image=latent, guidance=0.3, steps=4, seed=3))
    picture, mask = mask_and_picture(pixels)
    noise = core_noise(1, 3)
    evidence = hint(picture, mask, "colour", 0.05)
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([5]), 0.3, tilt=GUIDANCE_TILT, evidence=evidence)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, noise, flow_sigmas(4), substeps=default_substeps(4), second_order=SECOND,
                                 inpaint=Inpaint(1 - mask, picture, noise))
    assert_same(found, expected)
    assert (found[:, :, :, 6:8] - picture[:, :, :, 6:8]).abs().max() < 1e-3


def test_small_pictures_and_more_evidence(digits, painted, host, checkpoint):  # noqa: F811
    g = digits(batch=2, labels="8")
    small = Image.new("RGB", (4, 4), (60, 0, 60))
    small.save(host.base / "input" / "small.png")
    image = g.add("LoadImage", image="small.png")
    hinted_image = g.add("LoadImage", image=painted(MAGENTA))
    first = g.add("GMFlowSmallPicture", image=image)
    both = g.add("GMFlowHint", image=hinted_image, mask=hinted_image.out(1), previous=first)
    one = g.add("GMFlowApplyEvidence", model=g.model, evidence=both)
    again = g.add("GMFlowApplyEvidence", model=g.add("GMFlowApplyEvidence", model=g.model, evidence=first),
                  evidence=g.add("GMFlowHint", image=hinted_image, mask=hinted_image.out(1)))
    a, b = g.latents(g.gm(model=one, guidance=0.3, steps=3), g.gm(model=again, guidance=0.3, steps=3))
    assert torch.equal(a, b)
    picture = torch.full((1, 3, 4, 4), -1.0)
    picture[:, [0, 2]] = 60 / 127.5 - 1
    evidence = small_picture(picture, (16, 16), 0.02) + hint(*mask_and_picture(MAGENTA), "colour", 0.05)
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([8, 8]), 0.3, tilt=GUIDANCE_TILT, evidence=evidence)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(2, 0), flow_sigmas(3),
                                 substeps=default_substeps(3), second_order=SECOND)
    assert_same(a, expected)


def test_larger_pictures_are_averaged_and_batches_repeat(digits, painted, checkpoint):  # noqa: F811
    """A hint drawn at eight times the size; unpainted pixels lend no colour."""
    g = digits(batch=3, labels="1")
    name = painted({(8 * 8 + i, 4 * 8 + j): (255, 0, 255) for i in range(4) for j in range(8)}, (128, 128), "large.png")
    found = g.latents(g.gm(model=hinted(g, name), guidance=0.0, steps=3))
    picture, mask = mask_and_picture(MAGENTA)
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([1, 1, 1]), evidence=hint(picture, 0.5 * mask, "colour", 0.05))
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(3, 0), flow_sigmas(3),
                                 substeps=default_substeps(3), second_order=SECOND)
    assert_same(found, expected)


@pytest.mark.parametrize("where", ["everywhere", "its pixels"])
def test_a_chosen_hypothesis_is_painted(digits, host, where):
    """Of an undecided first step, every hypothesis that has a colour can be asked for, and most are painted in it; the
    numbers are the inspector's."""
    painted, asked = 0, 0
    for number in range(1, 9):
        g = digits(batch=1, labels="0")
        trace = g.gm(guidance=0.3, steps=8, seed=5).out(1)
        looked = g.add("GMFlowInspector", trace=trace, view="components", step=0)
        shown = g.add("PreviewAny", source=looked.out(1))
        chosen = g.add("GMFlowChoose", trace=trace, step=0, image=0, hypothesis=number, strength=1.0,
                       where=where)
        model = g.add("GMFlowApplyEvidence", model=g.model, evidence=chosen)
        saved = g.add("SaveLatent", samples=g.gm(model=model, guidance=0.3, steps=8, seed=5))
        result = host.run(g.graph)
        if not result.ok:
            assert f"hypothesis {number} has no colour" in result.error and where == "everywhere", result.error
            continue
        numbers = json.loads(result.outputs[shown[0]]["text"][0])
        colour = (torch.tensor(numbers["hypotheses"][number - 1]) + 1) / 2
        if colour.max() - colour.min() < COLOURLESS:
            continue  # asked for at its own pixels: no ink
        wanted = dominant_inks((2 * colour / colour.max() - 1).reshape(1, 3, 1, 1))
        asked, painted = asked + 1, painted + int(dominant_inks(result.latent(saved)) == wanted)
    assert asked >= 3 and painted >= 0.7 * asked, (painted, asked)


def test_evidence_leaves_a_trace(digits, painted, host):
    g = digits(batch=1, labels="4")
    sampled = g.gm(model=hinted(g, painted(MAGENTA)), guidance=0.3, steps=3)
    g.add("GMFlowInspector", trace=sampled.out(1), view="pixel", step=1, pixel_x=8, pixel_y=4)
    result = host.run(g.graph)
    assert result.ok, result.error


# ---- with what else there is ---------------------------------------------------------------------


def painted_by_core(checkpoint, evidence, *, labels, seed=0, guidance=0.3, sigmas=None,  # noqa: F811
                    batch=None, **settings):
    """The core package's GM-ODE given evidence, from the noise of a seed."""
    sigmas = flow_sigmas(3) if sigmas is None else sigmas
    steps = len(sigmas) - 1
    settings = dict(substeps=default_substeps(steps), second_order=SECOND) | settings
    denoiser = GMDenoiser(checkpoint.model, torch.tensor(labels), guidance, tilt=GUIDANCE_TILT, evidence=evidence)
    with torch.no_grad():
        return sample_gm_ode(denoiser, core_noise(batch or len(labels), seed) * sigmas[0], sigmas, **settings)


@pytest.mark.parametrize("order", [1, 2])
def test_orders_substeps_and_denoise_with_evidence(digits, painted, checkpoint, order):  # noqa: F811
    """From an empty image, which is all zeros."""
    g = digits(batch=2, labels="5")
    found = g.latents(g.gm(model=hinted(g, painted(MAGENTA)), guidance=0.3, denoise=0.6, steps=3, substeps=5,
                           order=order, seed=4))
    evidence = hint(*mask_and_picture(MAGENTA), "colour", 0.05)
    assert_same(found, painted_by_core(checkpoint, evidence, labels=[5, 5], seed=4, sigmas=flow_sigmas(3, 1.0, 0.6),
                                       substeps=5, order=order))


def test_a_batch_of_pictures_is_one_for_each_image(digits, painted, checkpoint):  # noqa: F811
    """In turn; and an image that is sampled alone by its batch_index is the same image."""
    green = {(4, 8): (0, 255, 0)}
    g = digits(batch=3, labels="1")
    first, second = (g.add("LoadImage", image=painted(p, name=f"turn{i}.png")) for i, p in enumerate((MAGENTA, green)))
    both = g.add("ImageBatch", image1=first, image2=second)
    masks = g.add("ImageToMask", image=g.add("ImageBatch", image1=g.add("MaskToImage", mask=first.out(1)),
                                             image2=g.add("MaskToImage", mask=second.out(1))), channel="red")
    model = g.add("GMFlowApplyEvidence", model=g.model, evidence=g.add("GMFlowHint", image=both, mask=masks))
    third = g.add("LatentFromBatch", samples=g.empty, batch_index=2, length=1)
    found, alone = g.latents(g.gm(model=model, steps=3, guidance=0.3),
                             g.gm(model=model, steps=3, guidance=0.3, latent_image=third))
    pictures, known = (torch.cat(t) for t in zip(*(mask_and_picture(p) for p in (MAGENTA, green, MAGENTA)),
                                                 strict=True))
    assert_same(found, painted_by_core(checkpoint, hint(pictures, known, "colour", 0.05), labels=[1, 1, 1]))
    assert dominant_inks(found).tolist() == [list(INKS).index(name) for name in ("magenta", "green", "magenta")]
    assert_same(alone, found[2:])


def test_our_guider_brings_evidence_to_core_samplers(digits, painted, checkpoint):  # noqa: F811
    """Echo and all: euler on the mean of the guided mixture."""
    g = digits(batch=2, labels="2")
    guider = g.add("GMFlowGuider", model=hinted(g, painted(MAGENTA)), positive=g.positive, guidance=0.3)
    found = g.latents(g.custom(g.add("KSamplerSelect", sampler_name="euler"), guider, steps=3))
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([2, 2]), 0.3, tilt="limited",
                          evidence=hint(*mask_and_picture(MAGENTA), "colour", 0.05))
    x, grid = core_noise(2, 0), flow_sigmas(3).tolist()
    with torch.no_grad():
        for s, t in zip(grid, grid[1:], strict=False):
            mean = denoiser(x, s).posterior.mean()
            x = mean + (x - mean) * (t / s)
    assert_same(found, x)


def test_progress_and_previews_with_evidence(digits, painted, host, listener):  # noqa: F811
    """One step forward for every network step, echo or not, each with a picture."""
    g = digits(batch=2, labels="3")
    link = g.gm(model=hinted(g, painted(MAGENTA)), steps=4, seed=next(host.counter))
    host.save(g.graph, link)
    progress, previews = watch(host, listener, g.graph)
    assert [p["value"] for p in progress] == [1, 2, 3, 4] and len(previews) >= 3


def test_cancelling_with_evidence(digits, painted, host, listener):  # noqa: F811
    g = digits(batch=2, labels="3")
    host.save(g.graph, g.gm(model=hinted(g, painted(MAGENTA)), steps=400, seed=next(host.counter)))
    prompt_id = host.queue(g.graph, listener.client_id)["prompt_id"]
    while not (frame := listener.frame())[0] == 1 or json.loads(frame[1])["type"] != "progress":
        pass
    host.post("/interrupt", {})
    assert host.wait(prompt_id).interrupted


# ---- bad input -----------------------------------------------------------------------------------


def refused(host, g, node, *words):
    g.add("SaveLatent", samples=g.gm(model=node, steps=2))
    error = host.run(g.graph).error
    assert all(word in error for word in words) and "\n" not in error.strip(), error


def test_a_picture_without_paint_and_one_of_another_shape_are_one_line(digits, painted, host):
    refused(host, g := digits(batch=1, labels="1"), hinted(g, painted({})), "mask", "nothing is painted")
    wide = painted({(1, 1): (9, 9, 9)}, (32, 16), "wide.png")
    refused(host, g := digits(batch=1, labels="1"), hinted(g, wide), "32 x 16", "crop it")


def test_hue_of_grey_and_small_pictures_that_do_not_fit_are_one_line(digits, painted, host):
    refused(host, g := digits(batch=1, labels="1"), hinted(g, painted({(3, 3): (99, 99, 99)}), kind="hue"), "no colour")
    Image.new("RGB", (5, 5)).save(host.base / "input" / "five.png")
    g = digits(batch=1, labels="1")
    small = g.add("GMFlowSmallPicture", image=g.add("LoadImage", image="five.png"))
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=small), "5 x 5", "whole multiple")


def test_a_hypothesis_that_is_not_there_is_one_line(digits, host):
    g = digits(batch=1, labels="1")
    trace = g.gm(steps=2).out(1)
    e = g.add("GMFlowChoose", trace=trace, step=0, image=0, hypothesis=40, strength=1.0)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=e), "hypothesis: got 40", "1 to 8")
    g = digits(batch=1, labels="1")
    e = g.add("GMFlowChoose", trace=g.gm(steps=2).out(1), step=7, image=0, hypothesis=1, strength=1.0)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=e), "step: got 7")


def test_a_trace_without_steps_is_one_line(digits, host):
    """A core sampler leaves none; and an image that a trace does not hold."""
    g = digits(batch=1, labels="1")
    empty = g.custom(g.add("KSamplerSelect", sampler_name="euler"), steps=2).out(2)
    e = g.add("GMFlowChoose", trace=empty, step=0, image=0, hypothesis=1, strength=1.0)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=e), "trace: it is empty", "GM samplers")
    g = digits(batch=1, labels="1")
    e = g.add("GMFlowChoose", trace=g.gm(steps=2).out(1), step=0, image=3, hypothesis=1, strength=1.0)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=e), "image: got 3")


def test_masks_that_do_not_fit_are_one_line(digits, painted, host):
    """Of another size; and none: a picture without transparency brings a black one of 64 x 64."""
    g = digits(batch=1, labels="1")
    image, mask = g.add("LoadImage", image=painted(MAGENTA)), g.add("SolidMask", value=1.0, width=8, height=9)
    e = g.add("GMFlowHint", image=image, mask=mask)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=e), "mask: 8 x 9", "an image of 16 x 16")
    Image.new("RGB", (16, 16), (255, 0, 0)).save(host.base / "input" / "opaque.png")
    refused(host, g := digits(batch=1, labels="1"), hinted(g, "opaque.png"), "nothing is painted",
            "without transparency")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 5.0])
def test_a_std_that_is_none_is_refused(digits, painted, host, value):
    """By the page's own limits, or by the node."""
    for node in ("GMFlowHint", "GMFlowSmallPicture"):
        g = digits(batch=1, labels="1")
        e = g.add(node, image=g.add("LoadImage", image=painted(MAGENTA)), std=value)
        host.save(g.graph, g.gm(model=g.add("GMFlowApplyEvidence", model=g.model, evidence=e), steps=1))
        message = host.refused(g.graph)
        assert "std" in message and "Traceback" not in message, message


@pytest.mark.parametrize("kind", ["colour", "hue", "brightness"])
def test_no_mask_is_the_whole_picture(digits, painted, checkpoint, kind):  # noqa: F811
    g = digits(batch=1, labels="6")
    image = g.add("LoadImage", image=painted({(x, y): (200, 40, 90) for x in range(16) for y in range(16)}))
    e = g.add("GMFlowHint", image=image, kind=kind, std=0.5)
    found = g.latents(g.gm(model=g.add("GMFlowApplyEvidence", model=g.model, evidence=e), guidance=0.3, steps=3))
    picture = (torch.tensor([200.0, 40, 90]) / 127.5 - 1).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    evidence = hint(picture, torch.ones(1, 1, 16, 16), kind, 0.5)
    assert_same(found, painted_by_core(checkpoint, evidence, labels=[6]))
