"""The MODEL in the core's own samplers: they see a flow model that predicts the mixture's mean."""

import pytest
import torch
from test_host_basics import BUNDLED

from gmflow_core import GMDenoiser, flow_sigmas, load_checkpoint, sample_gm_ode

# Sampler, scheduler: each of both at least once, in combinations that people use.
PAIRS = [
    ("euler", "simple"), ("euler", "karras"), ("euler_ancestral", "normal"), ("heun", "beta"),
    ("dpmpp_2m", "sgm_uniform"), ("dpmpp_2m_sde", "exponential"), ("dpmpp_sde", "simple"), ("uni_pc", "simple"),
    ("ddim", "ddim_uniform"), ("lcm", "simple"),
    ("res_multistep", "beta"), ("deis", "simple"), ("dpmpp_2m", "kl_optimal"), ("dpmpp_3m_sde", "simple"),
    ("er_sde", "simple"), ("euler_cfg_pp", "linear_quadratic"),
]
# With few steps, or by their nature, these do not reach the data: only finite is asked.
ROUGH = {("euler_cfg_pp", "linear_quadratic")}


@pytest.mark.parametrize("sampler, scheduler", PAIRS)
def test_digits_are_recognised(digits, recognised, sampler, scheduler):
    g = digits()
    found = recognised(g.latents(g.core(sampler_name=sampler, scheduler=scheduler)))
    print(f"{sampler} {scheduler}: {found} of 10")
    assert found >= 8 or (sampler, scheduler) in ROUGH


def test_every_sampler_is_finite(host, digits):
    """All that this version lists, at five steps."""
    names = host.info["KSampler"]["input"]["required"]["sampler_name"]
    names = names[0] if isinstance(names[0], list) else names[1]["options"]
    g, bad = digits("3", batch=1), []
    links = [g.core(sampler_name=name, steps=5) for name in names]
    for name, latent in zip(names, g.latents(*links), strict=True):
        if not latent.isfinite().all() or latent.abs().max() > 20:
            bad.append(name)
    assert len(names) > 30 and not bad


def test_euler_is_one_component_step_of_the_mean(digits):
    """The core's Euler is GM-ODE 1 with one substep: the mean alone."""
    g = digits()
    model = load_checkpoint(BUNDLED).model
    x = torch.randn((10, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    guider = g.add("BasicGuider", model=g.model, conditioning=g.positive)
    sigmas = g.add("GMFlowScheduler", model=g.model, steps=6)
    euler = g.custom(g.add("KSamplerSelect", sampler_name="euler"), guider, sigmas, node="SamplerCustomAdvanced")
    with torch.no_grad():
        expected = sample_gm_ode(GMDenoiser(model, torch.arange(10)), x, flow_sigmas(6), order=1)
    torch.testing.assert_close(g.latents(euler), expected, atol=1e-4, rtol=0)


def test_cfg_one_is_the_conditional_alone(digits):
    g = digits(batch=2, labels="4")
    one = g.core(cfg=1.0, steps=4)
    other = g.core(cfg=1.0, steps=4, negative=g.add("ConditioningZeroOut", conditioning=g.positive))
    a, b = g.latents(one, other)
    assert torch.equal(a, b)


def test_zeroed_conditioning_is_the_null_label(digits):
    g = digits(batch=3, labels="1,2,3")
    zero = g.add("ConditioningZeroOut", conditioning=g.positive)
    a, b = g.latents(g.core(steps=4), g.core(steps=4, negative=zero))
    assert torch.equal(a, b)
    c, d, e = g.latents(g.gm(steps=4), g.gm(steps=4, negative=zero), g.gm(steps=4, negative=g.negative))
    assert torch.equal(c, d) and torch.equal(c, e)


def test_image_to_image_with_the_core(digits, recognised):
    g = digits()
    first = g.gm(guidance=0.3)
    again = g.core(latent_image=first, denoise=0.5, seed=5)
    a, b = g.latents(first, again)
    assert recognised(b) >= 8 and not torch.equal(a, b)


def test_two_stages_of_the_core(digits):
    """KSamplerAdvanced hands a noisy latent over, as with refiners."""
    g = digits(batch=2, labels="6")
    common = dict(model=g.model, positive=g.positive, negative=g.negative, steps=6, cfg=1.5, sampler_name="euler",
                  scheduler="simple", noise_seed=3)
    whole = g.add("KSamplerAdvanced", **common, latent_image=g.empty, add_noise="enable", start_at_step=0,
                  end_at_step=10_000, return_with_leftover_noise="disable")
    first = g.add("KSamplerAdvanced", **common, latent_image=g.empty, add_noise="enable", start_at_step=0,
                  end_at_step=3, return_with_leftover_noise="enable")
    second = g.add("KSamplerAdvanced", **common, latent_image=first, add_noise="disable", start_at_step=3,
                   end_at_step=10_000, return_with_leftover_noise="disable")
    a, b = g.latents(whole, second)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
