"""The checkpoint that comes with the project: what it is, and a small sample of its quality.

The README's table is measured with 100 samples a class by ``python -m train.evaluate_digits``; here 10
a class, with bounds that leave room for the sampling error of 100 images.
"""

from dataclasses import fields

import pytest
import torch

from gmflow_core import GMDiTConfig, load_checkpoint
from gmflow_core.__main__ import BUNDLED
from train.config import PRESETS, TrainConfig
from train.data import Digits
from train.evaluate_digits import Setting, measure, train_svm


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
    steps, losses = zip(*training["log"])
    assert steps[-1] == preset["steps"] and losses[-1] < losses[0]


@pytest.mark.parametrize("setting, accuracy, on_palette", [
    (Setting("gm-ode", 8, 0.0), 0.83, 0.97),
    (Setting("gm-ode", 4, 0.3), 0.96, 0.97),
    (Setting("gm-sde", 8, 0.3), 0.93, 0.97),
])
def test_quality(checkpoint, setting, accuracy, on_palette):
    data = Digits.load()
    real = data.ink(data.grey, torch.arange(1797) % 6)
    figures = measure(checkpoint, setting, data, train_svm(data), real, per_class=10)
    assert figures["accuracy"] >= accuracy and figures["one_ink"] >= on_palette
    assert figures["precision"] > 0.2 and figures["recall"] > 0.2
