"""Pictures and masks of the page as evidence: sizes, batches, models that they suit, without a host."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recorded import small_config, small_network
from test_nodes_without_host import pack  # noqa: F401

from gmflow_core import GMDenoiser, flow_sigmas, sample_gm_ode
from gmflow_core.inspection.statistics import chosen_hypothesis, statistics
from gmflow_core.inspection.trace import Recorder
from gmflow_core.model import SD_VAE_SCALE


@pytest.fixture
def source(pack):  # noqa: F811
    return pack("nodes.evidence_source")


def information(pack, channels, kind):  # noqa: F811
    latent_space = pack("gmflow_core").model.LatentSpace(kind)
    config = replace(small_config(), in_channels=channels)
    config = pack("gmflow_core").GMDiTConfig(**config.to_dict())
    return pack("nodes.model_info").ModelInfo(config, None, latent_space, None)


def picture(rng, n=1, height=16, width=16):
    return 2 * torch.rand(n, 3, height, width, generator=rng) - 1


# ---- sizes and batches ---------------------------------------------------------------------------


def test_larger_pictures_are_means_of_what_is_painted(source, rng):
    """By hand, block by block: the share that is painted, and the mean colour of that."""
    image, mask = picture(rng), (torch.rand(1, 1, 16, 16, generator=rng) < 0.3).float()
    mask[..., :4, :4] = 0
    colour, share = source.fitted(image, mask, (4, 4))
    for i in range(4):
        for j in range(4):
            block = (..., slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
            known = mask[block].flatten() > 0
            assert share[0, 0, i, j] == pytest.approx(known.float().mean().item())
            colours = image[block].reshape(3, -1)
            torch.testing.assert_close(colour[0, :, i, j], colours[:, known if known.any() else ~known].mean(1))


def test_smaller_pictures_are_enlarged(source, rng):
    image = picture(rng, 1, 4, 4)
    colour, share = source.fitted(image, torch.ones(1, 1, 4, 4), (8, 8))
    torch.testing.assert_close(colour, F.interpolate(image, scale_factor=2))
    assert torch.equal(share, torch.ones(1, 1, 8, 8))


def test_masks_of_latents_are_what_is_known_of_a_whole_latent_pixel(source, rng):
    mask = torch.rand(2, 1, 16, 24, generator=rng)
    got = source.least(mask, (2, 3))
    expected = mask.unflatten(3, (3, 8)).unflatten(2, (2, 8)).amin((3, 5))
    assert torch.equal(got, expected)


def test_batches_repeat_and_are_cut_in_turn(source, rng):
    two = picture(rng, 2)
    assert torch.equal(source.repeated(two, 5), two[[0, 1, 0, 1, 0]]) and torch.equal(source.repeated(two, 1), two[:1])
    assert source.repeated(two[:1], 5) is two[:1] or len(source.repeated(two[:1], 5)) == 1


def test_pictures_of_the_page(source, rng):
    """(N,H,W,3 or 4) in [0, 1]; without a mask all of it is known; masks may lack the batch's axis."""
    image = torch.rand(2, 5, 6, 4, generator=rng)
    torch.testing.assert_close(source.from_images(image), 2 * image[..., :3].permute(0, 3, 1, 2) - 1)
    x = source.from_images(image)
    assert torch.equal(source.mask_for(x, None), torch.ones(1, 1, 5, 6))
    mask = torch.rand(5, 6, generator=rng)
    assert torch.equal(source.mask_for(x, mask)[0, 0], mask)
    assert torch.equal(source.mask_for(x, 3 * mask)[0, 0], (3 * mask).clamp(max=1))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda s: s.from_images(torch.full((1, 4, 4, 3), math.nan)), "image: it holds NaN"),
    (lambda s: s.mask_for(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), math.nan)), "mask: it holds NaN"),
    (lambda s: s.mask_for(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)), "mask: nothing is painted"),
    (lambda s: s.mask_for(torch.zeros(1, 3, 4, 4), torch.zeros(1, 64, 64)), "without transparency"),
    (lambda s: s.mask_for(torch.zeros(1, 3, 4, 4), torch.ones(1, 5, 8)), "mask: 8 x 5 pixels.*an image of 4 x 4"),
    (lambda s: s.fitted(torch.zeros(1, 3, 4, 8), torch.ones(1, 1, 4, 8), (16, 16)), "image: 8 x 4 pixels.*crop it"),
])
def test_pictures_that_say_nothing_are_refused(source, make, message):
    with pytest.raises(ValueError, match=message):
        make(source)


@pytest.mark.parametrize("kind, channels, part, message", [
    ("sd-vae", 4, "hint", "paints latents.*connect the model's vae"),
    ("rgb", 3, "encoded", "leave vae of GMFlow Hint open"),
    ("sd-vae", 4, "small", "a small picture is about RGB pixels"),
    ("sd-vae", 4, "chosen", "a chosen hypothesis is about RGB pixels"),
    ("rgb", 1, "hint", "paints pixels of 1 channels"),
    ("rgb", 1, "small", "paints pixels of 1 channels"),
    ("rgb", 3, "grey", "hypothesis 2 has no colour"),
])
def test_models_that_evidence_does_not_suit(source, pack, rng, kind, channels, part, message):  # noqa: F811
    one = {
        "hint": source.Hint(picture(rng), torch.ones(1, 1, 16, 16), "colour", 0.05),
        "encoded": source.Hint(picture(rng), torch.ones(1, 1, 16, 16), "colour", 0.05, torch.zeros(1, 4, 2, 2)),
        "small": source.SmallPicture(picture(rng, 1, 4, 4), 0.02),
        "chosen": source.Chosen(torch.tensor([1.0, -1, -1]), 1.0, "hypothesis 2", None),
        "grey": source.Chosen(torch.tensor([0.2, 0.2, 0.2]), 1.0, "hypothesis 2", None),
    }[part]
    with pytest.raises(ValueError, match=message):
        source.EvidenceSource((one,)).check(information(pack, channels, kind))


def test_an_encoded_hint_of_another_size_is_refused(source, rng):
    encoded = source.Hint(picture(rng), torch.ones(1, 1, 16, 16), "colour", 0.05, torch.zeros(1, 4, 3, 2))
    with pytest.raises(ValueError, match=r"\(4, 3, 2\), the latent of \(4, 2, 2\)"):
        encoded.at(torch.zeros(1, 4, 2, 2), lambda latent: latent)


def test_an_encoded_hint_enters_the_mixtures_space(source, rng):
    """Scaled, and known where all of a latent pixel is."""
    mask, latents = torch.ones(1, 1, 16, 16), torch.randn(1, 4, 2, 2, generator=rng)
    mask[..., 3, 3] = 0.5
    mask[..., 12, 3] = 0
    factor = source.Hint(picture(rng), mask, "colour", 0.5, latents).at(
        torch.zeros(3, 4, 2, 2), lambda latent: latent * SD_VAE_SCALE).factor(None)
    torch.testing.assert_close(factor.precision[0, 0], torch.tensor([[2.0, 4.0], [0.0, 4.0]]))
    torch.testing.assert_close(factor.shift, factor.precision * latents * SD_VAE_SCALE)


# ---- a hypothesis --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace():
    recorder = Recorder(images=2)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sample_gm_ode(GMDenoiser(small_network(), torch.tensor([3, 7])), noise, flow_sigmas(2), substeps=2,
                      callback=recorder)
    return recorder.trace()


def test_the_colour_of_a_hypothesis_is_its_centre(trace):
    """At the first step, where the numbers list it: the mean of what is nearest to it. By their weights, the
    hypotheses' colours have the image's mean."""
    listed = statistics(trace, 1, 4)
    first, mean = trace.steps[0].corrected, torch.zeros(4)
    for number in range(1, 5):
        colour, share = chosen_hypothesis(trace, 0, 1, number, 4)
        assert share.shape == (1, 8, 8) and share.max() == 1
        weight = listed["steps"][0]["hypotheses"]["weights"][number - 1]
        assert 0 < weight / share.mean().item() <= 1.001  # the largest of its weights
        centre = torch.tensor(listed["hypotheses"][number - 1])
        others = [torch.tensor(c) for i, c in enumerate(listed["hypotheses"]) if i != number - 1]
        assert all((colour - centre).norm() < (colour - other).norm() for other in others)
        mean += weight * colour
    torch.testing.assert_close(mean, first.mean()[1].float().mean((1, 2)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("step, image, number, count, message", [
    (0, 0, 5, 4, r"hypothesis: got 5; this trace has hypotheses 1 to 4 \(max_components 4\)"),
    (0, 0, 0, 4, "hypothesis: got 0"),
    (2, 0, 1, 4, "step: got 2"),
    (0, 2, 1, 4, "image: got 2"),
])
def test_a_hypothesis_that_is_not_there(trace, step, image, number, count, message):
    with pytest.raises(ValueError, match=message):
        chosen_hypothesis(trace, step, image, number, count)
