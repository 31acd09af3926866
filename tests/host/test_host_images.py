"""Image to image, masks and stages, with GM samplers and with the core's."""

import pytest
import torch


@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_denoise_keeps_more_of_the_image(digits, recognised, solver):
    g = digits()
    first = g.gm(guidance=0.3)
    kept, half, little = g.latents(
        first, *(g.gm(guidance=0.3, latent_image=first, denoise=d, seed=77, solver=solver) for d in (0.6, 0.2))
    )
    near, far = (little - kept).abs().mean(), (half - kept).abs().mean()
    assert 0 < near < far and recognised(half) >= 9 and recognised(little) >= 9


def masked(g, image):
    """The image with a mask that lets the right half be painted."""
    solid = g.add("SolidMask", value=0.0, width=16, height=16)
    right = g.add("SolidMask", value=1.0, width=8, height=16)
    mask = g.add("MaskComposite", destination=solid, source=right, x=8, y=0, operation="add")
    return g.add("SetLatentNoiseMask", samples=image, mask=mask)


@pytest.mark.parametrize("how", ["GM-ODE", "GM-SDE", "advanced ODE", "advanced SDE", "gm guider, euler", "core"])
def test_a_noise_mask_is_kept(digits, how):
    g = digits(batch=2, labels="5")
    image = g.gm(steps=2, seed=1)
    latent = masked(g, image)
    if how.startswith("GM"):
        painted = g.gm(solver=how, latent_image=latent, seed=2, steps=4)
    elif how == "core":
        painted = g.core(latent_image=latent, seed=2, steps=4)
    else:
        euler = "KSamplerSelect", {"sampler_name": "euler"}
        kind, widgets = (f"SamplerGMFlow{how[-3:]}", {}) if how.startswith("adv") else euler
        sampler = g.add(kind, **widgets)
        painted = g.custom(sampler, latent_image=latent, seed=2, steps=4, node="SamplerCustomAdvanced")
    before, after = g.latents(image, painted)
    torch.testing.assert_close(after[..., :8], before[..., :8], atol=1e-5, rtol=0)
    assert (after[..., 8:] - before[..., 8:]).abs().mean() > 0.02


@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE", "core"])
def test_differential_diffusion(digits, solver):
    """A mask in grades: what it frees late changes less than what it frees at once."""
    g = digits(batch=2, labels="5")
    image, model = g.gm(steps=2, seed=1), g.add("DifferentialDiffusion", model=g.model)

    def painted(value):
        """The left quarter kept, the next one freed by ``value``, the right half free."""
        kept = g.add("SolidMask", value=0.0, width=16, height=16)
        for x, width, v in ((4, 4, value), (8, 8, 1.0)):
            part = g.add("SolidMask", value=v, width=width, height=16)
            kept = g.add("MaskComposite", destination=kept, source=part, x=x, y=0, operation="add")
        latent = g.add("SetLatentNoiseMask", samples=image, mask=kept)
        return (g.core if solver == "core" else g.gm)(model=model, latent_image=latent, seed=2,
                                                      **({} if solver == "core" else {"solver": solver}))

    before, late, early = g.latents(image, painted(0.2), painted(1.0))
    assert late.isfinite().all()
    change_late, change_early = (late - before).abs(), (early - before).abs()
    assert change_late[..., :4].max() < 1e-5 and change_late[..., 8:].mean() > 0.02
    assert 0 < change_late[..., 4:8].mean() < change_early[..., 4:8].mean()


def test_two_stages_are_one(digits):
    g = digits(batch=2, labels="6")
    sigmas = g.add("GMFlowScheduler", model=g.model, steps=6)
    split = g.add("SplitSigmas", sigmas=sigmas, step=3)
    sampler = g.add("SamplerGMFlowODE", order=1, substeps=8)
    quiet = g.add("DisableNoise")
    for node in ("GMFlowSamplerCustom", "SamplerCustomAdvanced"):
        whole = g.custom(sampler, sigmas=sigmas, node=node)
        first = g.custom(sampler, sigmas=split.out(0), node=node)
        second = g.custom(sampler, sigmas=split.out(1), noise=quiet, latent_image=first, node=node)
        a, b = g.latents(whole, second)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    mixed = g.custom(g.add("KSamplerSelect", sampler_name="euler"), sigmas=split.out(1), noise=quiet,
                     latent_image=first)
    assert g.latents(mixed).isfinite().all()


def test_denoised_output(digits):
    """After a first stage it is the current guess, without the noise that is left."""
    g = digits(batch=2, labels="6")
    split = g.add("SplitSigmas", sigmas=g.add("GMFlowScheduler", model=g.model, steps=6), step=3)
    for node in ("GMFlowSamplerCustom", "SamplerCustomAdvanced"):
        stage = g.custom(g.add("SamplerGMFlowODE"), sigmas=split.out(0), node=node)
        noisy, clean = g.latents(stage, stage.out(1))
        assert clean.abs().max() < 2 and noisy.std() > clean.std()
