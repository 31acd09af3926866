"""GM samplers and the GM guider in ComfyUI: with every guider, sampler, schedule and size of the core."""

import pytest
import torch

# ---- everything with everything --------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["ODE", "SDE"])
@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider", "DualCFGGuider"])
def test_gm_samplers_with_core_guiders(digits, recognised, guider, solver):
    g = digits()
    made = {
        "BasicGuider": dict(conditioning=g.positive),
        "CFGGuider": dict(positive=g.positive, negative=g.negative, cfg=1.5),
        "DualCFGGuider": dict(cond1=g.positive, cond2=g.negative, negative=g.negative, cfg_conds=1.5,
                              cfg_cond2_negative=1.5),
    }[guider]
    link = g.custom(g.add(f"SamplerGMFlow{solver}", order=1), g.add(guider, model=g.model, **made),
                    node="SamplerCustomAdvanced")
    assert recognised(g.latents(link)) >= 7


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_sde"])
def test_core_samplers_with_the_gm_guider(digits, recognised, sampler):
    g = digits()
    guider = g.add("GMFlowGuider", model=g.model, positive=g.positive, guidance=0.3)
    for node in ("SamplerCustomAdvanced", "GMFlowSamplerCustom") if sampler == "euler" else ("SamplerCustomAdvanced",):
        link = g.custom(g.add("KSamplerSelect", sampler_name=sampler), guider, node=node)
        assert recognised(g.latents(link)) >= 9


SCHEDULES = {
    "karras": ("KarrasScheduler", dict(steps=8, sigma_max=1.0, sigma_min=0.01)),
    "exponential": ("ExponentialScheduler", dict(steps=8, sigma_max=1.0, sigma_min=0.01)),
    **{name: ("BasicScheduler", dict(scheduler=name, steps=8))
       for name in ("simple", "normal", "beta", "sgm_uniform", "ddim_uniform", "kl_optimal")},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gm_samplers_take_every_schedule(digits, recognised, name):
    node, inputs = SCHEDULES[name]
    g = digits()
    sigmas = g.add(node, **inputs, **({"model": g.model} if node == "BasicScheduler" else {}))
    guider = g.add("GMFlowGuider", model=g.model, positive=g.positive, guidance=0.3)
    ode = g.custom(g.add("SamplerGMFlowODE"), guider, sigmas, node="SamplerCustomAdvanced")
    assert recognised(g.latents(ode)) >= 8


def test_the_basic_scheduler_s_simple_is_the_gm_grid(digits):
    g = digits(batch=2, labels="1")
    both = [
        g.custom(g.add("SamplerGMFlowODE"), sigmas=sigmas)
        for sigmas in (g.add("BasicScheduler", model=g.model, scheduler="simple", steps=8),
                       g.add("GMFlowScheduler", model=g.model, steps=8))
    ]
    a, b = g.latents(*both)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


@pytest.mark.parametrize("steps, solver", [(1, "GM-ODE"), (1, "GM-SDE"), (2, "GM-ODE"), (3, "GM-SDE")])
def test_very_few_steps(digits, recognised, steps, solver):
    g = digits()
    assert recognised(g.latents(g.gm(steps=steps, solver=solver, guidance=0.3))) >= 8


def test_guidance_in_a_part_of_the_sampling(digits):
    g = digits(batch=2, labels="8")
    sampler, sigmas = g.add("SamplerGMFlowODE"), g.add("GMFlowScheduler", model=g.model, steps=4)

    def guided(**inputs):
        return g.custom(sampler, g.add("GMFlowGuider", model=g.model, positive=g.positive, **inputs), sigmas)

    off, early, late, on = g.latents(guided(guidance=0.0), guided(end_percent=0.4), guided(start_percent=0.4), guided())
    assert len({tuple(x.flatten().tolist()) for x in (off, early, late, on)}) == 4
    g = digits(batch=1, labels="8")
    wrong = g.add("GMFlowGuider", model=g.model, positive=g.positive, start_percent=0.8, end_percent=0.2)
    g.host.save(g.graph, g.custom(g.add("SamplerGMFlowODE"), wrong))
    assert "guidance must start before it ends" in g.host.refused(g.graph)


def test_advanced_coefficients(digits):
    """They reach the solver: each changes the image, and order 1 ignores those of the second order."""
    g = digits(batch=1, labels="8")
    guider, sigmas = (g.add("GMFlowGuider", model=g.model, positive=g.positive),
                      g.add("GMFlowScheduler", model=g.model, steps=5))
    variants = [{"temperature": 1.0}, {}, {"c_a": 0.5}, {"c_b": 5.0}, {"correction_steps": 2}, {"temperature": 0.5},
                {"substeps": 3}, {"tilt": "published"}, {"order": 1}, {"order": 1, "c_a": 0.5}]
    trained, *eight, ninth = g.latents(*(g.custom(g.add("SamplerGMFlowODE", **v), guider, sigmas) for v in variants))
    assert len({tuple(x.flatten().tolist()) for x in eight}) == 8 and torch.equal(eight[-1], ninth)
    assert torch.equal(trained, eight[0])  # the default is this model's own temperature
    shifted = [g.custom(g.add("SamplerGMFlowODE", shift=s), guider, sigmas) for s in (1.0, 2.0)]
    a, b = g.latents(*shifted)
    assert not torch.equal(a, b) and (a - b).abs().max() < 1
    white, coloured = g.latents(*(g.custom(g.add("SamplerGMFlowSDE", spectral=s), guider, sigmas)
                                  for s in (False, True)))
    assert not torch.equal(white, coloured)


# ---- sizes -----------------------------------------------------------------------------------------

def test_other_sizes(digits):
    """An empty latent of any kind becomes the model's channels; sizes that the patch divides work."""
    g = digits(batch=1, labels="6")
    empty = g.add("EmptyLatentImage", width=32, height=48, batch_size=1)  # in pixels or eighths, by version
    latent = g.latents(g.gm(latent_image=empty, steps=2))
    assert latent.shape[1] == 3 and latent.isfinite().all()
    bigger = g.add("LatentUpscale", samples=g.gm(steps=2), upscale_method="nearest-exact", width=192, height=192,
                   crop="disabled")
    assert g.latents(g.gm(latent_image=bigger, steps=2, denoise=0.5)).shape[2:] == (24, 24)
    large = g.gm(latent_image=bigger, steps=2, solver="GM-SDE")
    white = g.custom(g.add("SamplerGMFlowSDE", spectral=False), latent_image=bigger, steps=2)
    assert g.latents(white).isfinite().all()
    g.host.save(g.graph, large)
    assert "sizes up to 16 x 16, got 24 x 24; turn spectral off" in g.host.refused(g.graph)
