"""The checkpoints that come with the project: what they are, and a small sample of their quality.

docs/digits.md and docs/characters.md are of 1,000 samples by ``python -m train.evaluate``; here 100 or so, with bounds
that leave room for the sampling error of so few images.
"""

from dataclasses import fields, replace

import pytest
import torch
from kinds import KINDS, judge

from gmflow_core import GMDiTConfig, load_checkpoint
from gmflow_core.__main__ import MODELS
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
