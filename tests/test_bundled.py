"""The checkpoint that comes with the project: what it is, and a small sample of its quality.

docs/digits.md is of 1,000 samples by ``python -m train.evaluate``; here 100, with bounds that leave
room for the sampling error of 100 images.
"""

from dataclasses import fields

import pytest
import torch

from gmflow_core import GMDiTConfig, load_checkpoint
from gmflow_core.__main__ import BUNDLED
from train.config import PRESETS, TrainConfig
from train.data.digits import Digits
from train.evaluate.digits_metrics import digit_metrics, train_svm
from train.evaluate.features import digits_features
from train.evaluate.image_metrics import frechet_distance, moments, quantise
from train.evaluate.reference import DigitImages, measure_reference
from train.evaluate.settings import Setting, sample_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(BUNDLED)


def test_what_it_is(checkpoint):
    assert BUNDLED.stat().st_size <= 12e6
    assert isinstance(checkpoint.config, GMDiTConfig) and checkpoint.config.num_gaussians == 8
    assert checkpoint.config == PRESETS["digits"].model and checkpoint.spectrum is not None
    assert checkpoint.class_names == tuple("0123456789") and checkpoint.latent_space.kind == "rgb"


def test_it_was_made_by_the_committed_preset(checkpoint):
    """Settings that are newer than the file must be at their defaults, which do what was done then."""
    preset = {k: v for k, v in PRESETS["digits"].to_dict().items() if k not in ("model", "spectrum")}
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    training = checkpoint.training
    stored = training["config"]
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
def test_quality(checkpoint, judges, setting, accuracy, one_ink, fid):
    svm, features, reference = judges
    labels = torch.arange(100) % 10
    images = sample_images(checkpoint, setting, labels, seed=0)
    figures = digit_metrics(images, labels, svm)
    found = frechet_distance(reference.moments, moments(features(quantise(images))))
    print(setting.title, setting.guidance_title, found, figures)
    assert figures["accuracy"] >= accuracy and figures["one_ink"] >= one_ink and found < fid
