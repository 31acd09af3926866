"""GM samplers and the GM guider in ComfyUI: the same numbers as ``gmflow_core``, and what a seed decides."""

import pytest
import torch
from conftest import assert_same
from test_host_basics import BUNDLED

from gmflow_core import GMDenoiser, SecondOrder, flow_sigmas, load_checkpoint, sample_gm_ode, sample_gm_sde
from gmflow_core.noise import ImageNoise
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT
from gmflow_core.schedule import default_substeps

NODES = SecondOrder(tilt=SECOND_ORDER_TILT)  # the nodes' default


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(BUNDLED)


def core_noise(batch: int, seed: int) -> torch.Tensor:
    return torch.randn((batch, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


# ---- the same numbers ------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 0.45])
def test_gm_ode_is_the_core_package_s(digits, checkpoint, guidance, order):
    g = digits(batch=4, labels="0,3,7,9")
    found = g.latents(g.gm(guidance=guidance, order=order, steps=6, seed=11))
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([0, 3, 7, 9]), guidance, tilt=GUIDANCE_TILT)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(4, 11), flow_sigmas(6), order=order, substeps=default_substeps(6),
                                 second_order=NODES)
    assert_same(found, expected)


@pytest.mark.parametrize("guidance", [0.0, 0.45])
def test_gm_sde_is_the_core_package_s(digits, checkpoint, guidance):
    g = digits(batch=2, labels="3,7")
    found = g.latents(g.gm(guidance=guidance, solver="GM-SDE", steps=4, seed=11))
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([3, 7]), guidance, tilt=GUIDANCE_TILT)
    with torch.no_grad():
        expected = sample_gm_sde(
            denoiser, core_noise(2, 11), flow_sigmas(4), spectrum=checkpoint.spectrum,
            noise_sampler=ImageNoise(11, range(2), (3, 16, 16), torch.device("cpu")), second_order=NODES,
        )
    assert_same(found, expected)


@pytest.mark.parametrize("order", [1, 2])
def test_the_published_tilt_of_the_simple_node_is_of_order_and_guidance(digits, checkpoint, order):
    g = digits(batch=2, labels="3,7")
    found = g.latents(g.gm(guidance=0.45, order=order, steps=4, seed=11, tilt="published"))
    denoiser = GMDenoiser(checkpoint.model, torch.tensor([3, 7]), 0.45)
    with torch.no_grad():
        expected = sample_gm_ode(denoiser, core_noise(2, 11), flow_sigmas(4), order=order, substeps=default_substeps(4))
    assert_same(found, expected)


def test_shift_and_denoise_are_the_core_package_s(digits, checkpoint):
    g = digits(batch=2, labels="5")
    found = g.latents(g.gm(guidance=0.3, shift=2.5, denoise=0.6, steps=3, substeps=5, orthogonal=0.4, seed=4))
    sigmas = flow_sigmas(3, 2.5, 0.6)
    with torch.no_grad():  # from an empty image, which is all zeros
        expected = sample_gm_ode(
            GMDenoiser(checkpoint.model, torch.tensor([5, 5]), 0.3, 0.4, tilt=GUIDANCE_TILT),
            core_noise(2, 4) * sigmas[0], sigmas, substeps=5, shift=2.5, second_order=NODES,
        )
    assert_same(found, expected)


@pytest.mark.parametrize("solver", ["ODE", "SDE"])
@pytest.mark.parametrize("node", ["SamplerCustomAdvanced", "GMFlowSamplerCustom"])
def test_the_simple_node_is_the_advanced_graph(digits, solver, node):
    g = digits(batch=3, labels="2")
    simple = g.gm(solver=f"GM-{solver}", steps=4, seed=7, guidance=0.45)
    advanced = g.custom(g.add(f"SamplerGMFlow{solver}"), steps=4, seed=7, node=node)
    a, b = g.latents(simple, advanced)
    assert torch.equal(a, b)


def test_a_core_guider_without_guidance_is_guidance_zero(digits):
    g = digits(batch=3, labels="2")
    basic = g.custom(g.add("SamplerGMFlowODE"), g.add("BasicGuider", model=g.model, conditioning=g.positive), steps=4)
    one = g.custom(g.add("SamplerGMFlowODE"),
                   g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=1.0), steps=4)
    a, b, c = g.latents(basic, one, g.gm(guidance=0.0, steps=4))
    assert_same(a, c)
    assert_same(b, c)


def test_core_cfg_is_the_vanilla_method(digits):
    """CFGGuider under a GM sampler shifts the mixture as a whole, as the guider's own vanilla CFG does."""
    g = digits(batch=3, labels="2")
    core = g.custom(g.add("SamplerGMFlowODE"),
                    g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=2.0), steps=4)
    own = g.custom(g.add("SamplerGMFlowODE"), g.add("GMFlowGuider", model=g.model, positive=g.positive,
                                                    method="vanilla CFG", cfg_scale=2.0), steps=4)
    first = [g.custom(g.add("SamplerGMFlowODE", order=1), guider, steps=4)
             for guider in (core_guider(g), own_guider(g))]
    a, b, c, d = g.latents(core, own, *first)
    torch.testing.assert_close(c, d, atol=1e-4, rtol=0)
    # The second order's correction leans on the conditional posterior in one, on the shifted in the other.
    assert (a - b).abs().max() < 0.5


def core_guider(g):
    return g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=2.0)


def own_guider(g):
    return g.add("GMFlowGuider", model=g.model, positive=g.positive, method="vanilla CFG", cfg_scale=2.0)


# ---- seeds -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
@pytest.mark.parametrize("node", ["GMFlowKSampler", "GMFlowSamplerCustom"])
def test_an_image_is_the_same_in_any_batch(digits, node, solver):
    g = digits(batch=4, labels="5")
    third = g.add("LatentFromBatch", samples=g.empty, batch_index=2, length=1)

    def sample(latent):
        if node == "GMFlowKSampler":
            return g.gm(solver=solver, steps=4, seed=9, latent_image=latent)
        return g.custom(g.add(f"SamplerGMFlow{solver[3:]}"), steps=4, seed=9, latent_image=latent)

    batch, alone = g.latents(sample(g.empty), sample(third))
    assert_same(batch[2:3], alone)
    assert not torch.allclose(batch[1], batch[2], atol=0.1)


@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_the_same_seed_gives_the_same_pixels(digits, solver):
    """Really sampled twice: another number of steps between makes the cache forget."""
    def sample(steps, seed=2**64 - 1):
        g = digits(batch=2, labels="5")
        return g.latents(g.gm(solver=solver, steps=steps, seed=seed))

    first, other, again = sample(3), sample(2), sample(3)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, sample(3, seed=1))


def test_repeated_latents_get_noise_of_their_own(digits):
    g = digits(batch=2, labels="5")
    repeated = g.add("RepeatLatentBatch", samples=g.empty, amount=2)
    latent = g.latents(g.gm(latent_image=repeated, steps=2, solver="GM-SDE"))
    assert len(latent) == 4 and len({tuple(x.flatten().tolist()) for x in latent}) == 4
