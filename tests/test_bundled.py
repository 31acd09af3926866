"""The checkpoints that come with the project: what they are, and a small sample of their quality.

docs/digits.md and docs/characters.md are of 1,000 samples by ``python -m train.evaluate``; here 100 or so, with bounds
that leave room for the sampling error of so few images.
"""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC

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


DATA = Path(__file__).parent / "data"
KINDS = ("blob", "clay", "critter", "cutout", "landscape", "marble", "mood", "peep", "pixel person", "pixel robot",
         "planet", "sprout", "thumb", "voxel person", "voxel robot", "waves")
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


def edges(images: torch.Tensor) -> np.ndarray:
    """(B,3,24,24) in [-1, 1]: where brightness changes, and a little of it, averaged over small squares."""
    grey = images.mean(1, keepdim=True) / 2
    down, right = (torch.nn.functional.avg_pool2d(grey.diff(dim=d).abs(), 3, ceil_mode=True) for d in (2, 3))
    return torch.cat([t.flatten(1) for t in (down, right, 0.3 * torch.nn.functional.avg_pool2d(grey, 6))], 1).numpy()


@pytest.fixture(scope="module")
def which_kind():
    """Tells the kinds apart, from twenty real pictures of each: a row of tests/data/characters.png."""
    with Image.open(DATA / "characters.png") as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    real = pixels.unflatten(0, (16, 24)).unflatten(2, (20, 24)).permute(0, 2, 4, 1, 3).flatten(0, 1) / 127.5 - 1
    kinds, every_fourth = np.arange(16).repeat(20), np.arange(320) % 4 == 0
    features = edges(real)
    held_out = SVC(C=10).fit(features[~every_fourth], kinds[~every_fourth]).predict(features[every_fourth])
    assert (held_out == kinds[every_fourth]).mean() > 0.9
    return SVC(C=10).fit(features, kinds)


@pytest.mark.parametrize("setting, least", [
    (Setting("gm-ode2", 8), 0.8), (Setting("gm-ode2", 4, 0.4), 0.9), (Setting("gm-sde2", 8, 0.4), 0.9),
])
def test_characters_are_of_the_kind_asked_for(which_kind, setting, least):
    labels = torch.arange(96) % 16
    images = sample_images(load_checkpoint(LOADED["characters"]), setting, labels, seed=0)
    assert (which_kind.predict(edges(images)) == labels.numpy()).mean() >= least
