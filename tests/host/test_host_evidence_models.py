"""Evidence about what other models paint: latents, text-to-image adapters, one component; and what suits none."""

import pytest
import torch
import torch.nn.functional as F
from adapters import DATA, NAMES, WEIGHTS, Tiny
from conftest import assert_same
from recorded import small_network
from test_host_evidence import hinted, mask_and_picture, painted, refused  # noqa: F401

from gmflow_core import GMDenoiser, GMDiT, GMDiTConfig, SecondOrder, flow_sigmas, sample_gm_ode, save_checkpoint
from gmflow_core.hints import hint
from gmflow_core.model import SD_VAE_SCALE, LatentSpace
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT
from gmflow_core.schedule import default_substeps

MAGENTA = (255, 0, 255)
KNOWN = {(x, y): MAGENTA for x in range(8, 20) for y in range(16, 32)}  # one latent pixel across and half of the next


def expected(model, noise, evidence, labels, steps=3):
    denoiser = GMDenoiser(model, torch.tensor(labels), 0.3, tilt=GUIDANCE_TILT, evidence=evidence)
    with torch.no_grad():
        return sample_gm_ode(denoiser, noise, flow_sigmas(steps), substeps=default_substeps(steps),
                             second_order=SecondOrder(tilt=SECOND_ORDER_TILT))


@pytest.fixture
def latent_model(host):
    """The name of a tiny model of SD's latents, 8 x 8 of four channels."""
    save_checkpoint(host.models / "latents.safetensors", small_network(),
                    latent_space=LatentSpace("sd-vae", SD_VAE_SCALE))
    return "latents.safetensors"


def encoded(g, name, layout="SD", std=0.05, **options):
    """A hint through a VAE, and what the VAE makes of it: (model, latents)."""
    image, vae = g.add("LoadImage", image=name), g.add("TinyEncoder", layout=layout)
    evidence = g.add("GMFlowHint", image=image, mask=image.out(1), vae=vae, std=std)
    return (g.add("GMFlowApplyEvidence", model=g.model, evidence=evidence, **options),
            g.add("VAEEncode", pixels=image, vae=vae))


# ---- latents -------------------------------------------------------------------------------------


def test_a_hint_for_latents_is_the_encoded_picture(digits, painted, latent_model):  # noqa: F811
    """The core package's numbers; known are the latent pixels that are painted all over."""
    g = digits(batch=2, labels="3,7", model_name=latent_model, weight_dtype="float32")
    model, known = encoded(g, painted(KNOWN, (64, 64)))
    found, picture = g.latents(g.gm(model=model, guidance=0.3, steps=3), known)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, 1] = 1
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    evidence = hint(picture * SD_VAE_SCALE, mask, "colour", 0.05)
    assert_same(found * SD_VAE_SCALE, expected(small_network(), noise, evidence, [3, 7]))


def test_what_latents_are_not(digits, painted, host, latent_model):  # noqa: F811
    """One line each, which names what would be right."""
    def latents():
        return digits(batch=1, labels="1", model_name=latent_model)

    name = painted(KNOWN, (64, 64))
    g = latents()
    refused(host, g, hinted(g, name), "paints latents", "connect the model's vae to GMFlow Hint")
    g = latents()
    image = g.add("LoadImage", image=name)
    hue = g.add("GMFlowHint", image=image, kind="hue", vae=g.add("TinyEncoder", layout="SD"))
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=hue), "kind: hue", "only colour")
    g = latents()
    small = g.add("GMFlowSmallPicture", image=g.add("LoadImage", image=name))
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=small), "a small picture is about RGB")
    g = latents()
    chosen = g.add("GMFlowChoose", trace=g.gm(steps=2).out(1), hypothesis=1)
    refused(host, g, g.add("GMFlowApplyEvidence", model=g.model, evidence=chosen), "a chosen hypothesis is about RGB")
    g = latents()
    refused(host, g, encoded(g, name, "NaN")[0], "vae: it makes NaN", "half precision")
    g = latents()
    refused(host, g, encoded(g, name, "gmflux_tiny")[0], "(16, 8, 8)", "(4, 8, 8)", "this model's vae")
    g = latents()
    refused(host, g, encoded(g, painted(KNOWN, (64, 32), "flat.png"))[0], "(4, 4, 8)", "as large as the image")
    g = digits(batch=1, labels="1")
    refused(host, g, encoded(g, name)[0], "this model paints RGB pixels; leave vae of GMFlow Hint open")


def test_one_component(digits, painted, host):  # noqa: F811
    """K = 1: a plain flow model with a variance."""
    torch.manual_seed(0)
    network = GMDiT(GMDiTConfig(num_classes=10, num_gaussians=1, in_channels=3, sample_size=16, patch_size=4,
                                num_layers=1, num_heads=1, head_dim=8, logstd_width=8))
    network.init_weights()
    save_checkpoint(host.models / "one.safetensors", network)
    g = digits(batch=2, labels="3,7", model_name="one.safetensors", weight_dtype="float32")
    pixel = {(8, 4): MAGENTA}
    found = g.latents(g.gm(model=hinted(g, painted(pixel)), guidance=0.3, steps=3))
    noise = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert_same(found, expected(network, noise, hint(*mask_and_picture(pixel), "colour", 0.05), [3, 7]))


# ---- text to image -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_hint_for_a_text_to_image_adapter(host, painted, name):  # noqa: F811
    """What is painted comes near to the encoded picture, with every kind of sampler, and the rest changes too."""
    link = host.base / "models" / "loras" / f"{name}.safetensors"
    if not link.exists():
        link.symlink_to(DATA / name / "adapter" / WEIGHTS)
    g = Tiny(host, name)
    picture = painted(KNOWN, (96, 64), "wide96.png")
    hinted_models = [encoded(g, picture, name, 0.005, propagate=propagate)[0] for propagate in (True, False)]
    known = encoded(g, picture, name)[1]
    common = dict(positive=g.text, latent_image=g.empty, steps=2, seed=3)

    def core(model):
        guider = g.add("BasicGuider", model=model, conditioning=g.text)
        return [g.custom(sampler, guider=guider, steps=2, noise=g.add("RandomNoise", noise_seed=3))
                for sampler in (g.ode(), g.add("KSamplerSelect", sampler_name="euler"))]

    samples = [[g.add("GMFlowKSampler", model=model, **common), *core(model)] for model in (g.model, *hinted_models)]
    *found, latents = g.run(*(link for group in samples for link in group), known)
    if name == "gmflux2_tiny":  # four of its pixels are one of the latent
        *found, latents = (F.pixel_shuffle(x, 2) for x in (*found, latents))
    for without, propagated, alone in zip(found[:3], found[3:6], found[6:], strict=True):
        off = [(x - latents)[..., 2:4, 1].square().mean().sqrt() for x in (without, propagated, alone)]
        assert all(x.isfinite().all() for x in (propagated, alone)) and max(off[1:]) < 0.3 * off[0], (name, off)
        assert (propagated - without)[..., -2:].abs().max() > 1e-4
