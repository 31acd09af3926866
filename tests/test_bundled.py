"""The checkpoints that come with the project: what they are, and a small sample of their quality.

docs/digits.md and docs/characters.md are of 1,000 samples by ``python -m train.evaluate``; here 100 or so, with bounds
that leave room for the sampling error of so few images.
"""

from dataclasses import fields, replace

import pytest
import torch
from kinds import KINDS, judge

from gmflow_core import GMDenoiser, GMDiTConfig, flow_sigmas, load_checkpoint, sample_gm_ode
from gmflow_core.__main__ import MODELS
from gmflow_core.guidance import Blend
from gmflow_core.path import add_noise
from gmflow_core.solver import SecondOrder
from train.config import FREE, PRESETS, TrainConfig
from train.data.digits import Digits
from train.evaluate.digits_metrics import digit_metrics, train_svm
from train.evaluate.features import digits_features
from train.evaluate.image_metrics import frechet_distance, moments, quantise
from train.evaluate.reference import DigitImages, measure_reference
from train.evaluate.settings import Setting, sample_images

pytestmark = pytest.mark.slow


NAMES = {"digits": tuple("0123456789"), "characters": KINDS}
LOADED = {name: MODELS / f"gmdit_{name}.safetensors" for name in NAMES}


@pytest.fixture(scope="module", params=list(NAMES))
def model(request):
    return request.param, load_checkpoint(LOADED[request.param])


def test_what_it_is(model):
    name, checkpoint = model
    assert LOADED[name].stat().st_size <= 12e6
    assert isinstance(checkpoint.config, GMDiTConfig) and checkpoint.config.num_gaussians == 8
    made = replace(PRESETS[name].model, num_classes=len(NAMES[name]))
    assert checkpoint.config == made and checkpoint.spectrum is not None
    assert checkpoint.class_names == NAMES[name] and checkpoint.latent_space.kind == "rgb"


def test_it_was_made_by_the_committed_preset(model):
    """Settings that are newer than the file must be at their defaults, which do what was done then."""
    name, checkpoint = model
    preset = {k: v for k, v in PRESETS[name].to_dict().items() if k not in ("model", "spectrum", *FREE)}
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    training = checkpoint.training
    stored = {k: v for k, v in training["config"].items() if k not in FREE}
    assert stored == {k: preset[k] for k in stored} and training["step"] == preset["steps"]
    assert all(preset[k] == defaults[k] for k in preset if k not in stored)
    steps, losses = zip(*training["log"], strict=True)
    assert steps[-1] == preset["steps"] and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def judges():
    features = digits_features(Digits.load())
    return train_svm(Digits.load()), features, measure_reference(DigitImages(), features, 2000)


@pytest.mark.parametrize("setting, accuracy, one_ink, fid", [
    (Setting("gm-ode2", 8), 0.70, 0.97, 6),
    (Setting("gm-ode2", 4, 0.3), 0.96, 0.97, 8),
    (Setting("gm-sde2", 8, 0.3), 0.93, 0.97, 8),
])
def test_quality_of_digits(judges, setting, accuracy, one_ink, fid):
    checkpoint = load_checkpoint(LOADED["digits"])
    svm, features, reference = judges
    labels = torch.arange(100) % 10
    images = sample_images(checkpoint, setting, labels, seed=0)
    figures = digit_metrics(images, labels, svm)
    found = frechet_distance(reference.moments, moments(features(quantise(images))))
    print(setting.title, setting.guidance_title, found, figures)
    assert figures["accuracy"] >= accuracy and figures["one_ink"] >= one_ink and found < fid


@pytest.mark.parametrize("value, most", [(0.5, 1.13), (0.98, 1.05)])
def test_soft_masks_and_substeps(value, most):
    """Distances to the source (docs/faq.md). At 0.5 sixteen substeps add 10 %, nearly all of it in the step to sigma 0,
    where the mask is a factor; before that step they harden nothing."""
    checkpoint = load_checkpoint(LOADED["digits"])
    labels, sigmas, rng = torch.arange(40) % 10, flow_sigmas(8), torch.Generator().manual_seed(21)
    start, noise = torch.randn((2, 40, 3, 16, 16), generator=rng)
    limited = SecondOrder(tilt="limited")

    def masked(x, sigma):
        seen = torch.lerp(add_noise(source, noise, sigma), x, value)
        return replace(free(seen, sigma), blend=Blend(torch.full_like(x, value), (1 - value) * source, seen))

    def distance(order, substeps):
        x = sample_gm_ode(masked, noise.clone(), sigmas, order=order, substeps=substeps, second_order=limited)
        return (x - source).abs().mean().item()

    with torch.no_grad():
        source = sample_gm_ode(GMDenoiser(checkpoint.model, labels, 0.3), start, sigmas, substeps=16,
                               second_order=limited)
        free = GMDenoiser(checkpoint.model, labels)
        euler, one, early, many = distance(1, 1), *(distance(2, n) for n in (1, [16] * 7 + [1], 16))
    print(f"MASK {value}: euler {127.5 * euler:.2f}, one {127.5 * one:.2f}, {early / one:.3f}, {many / one:.3f}")
    assert 0.99 < early / one < 1.02 and early < many < most * one
    assert one == pytest.approx(euler, rel=0.2) and many == pytest.approx(euler, rel=0.2)


@pytest.fixture(scope="module")
def kind_of():
    return judge()


@pytest.mark.parametrize("setting, least", [
    (Setting("gm-ode2", 8), 0.8), (Setting("gm-ode2", 4, 0.4), 0.9), (Setting("gm-sde2", 8, 0.4), 0.9),
])
def test_characters_are_of_the_kind_asked_for(kind_of, setting, least):
    labels = torch.arange(96) % 16
    images = sample_images(load_checkpoint(LOADED["characters"]), setting, labels, seed=0)
    assert (kind_of(images) == labels).float().mean() >= least
