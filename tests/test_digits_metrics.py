"""What only the digits have, on images whose answer is known."""

import pytest
import torch

from train.data.digits import INKS, Digits
from train.evaluate.digits_metrics import digit_metrics, grey8, hue_metrics, hues, train_svm


@pytest.fixture(scope="module")
def data():
    return Digits.load()


@pytest.fixture(scope="module")
def real(data):
    inks = torch.randint(6, (len(data.labels),), generator=torch.Generator().manual_seed(1))
    return data.ink(data.grey, inks)


def test_hue_is_colorsys(rng):
    import colorsys

    images = 2 * torch.rand(1, 3, 8, 8, generator=rng) - 1
    hue, inked = hues(images)
    for y in range(8):
        for x in range(8):
            rgb = ((images[0, :, y, x] + 1) / 2).tolist()
            h, _, v = colorsys.rgb_to_hsv(*rgb)
            if max(rgb) - min(rgb) > 0.1:
                assert hue[0, y, x].item() == pytest.approx(360 * h, abs=1e-3)
            assert inked[0, y, x].item() == (v >= 0.5)


def test_real_digits_are_perfect(real):
    figures = hue_metrics(real)
    assert figures["on_palette"] == 1 and figures["one_ink"] == 1
    assert 0.14 < figures["ink_min"] < figures["ink_max"] < 0.19


def test_hue_faults_show(data, real):
    orange = data.ink(data.grey, torch.zeros(1797, dtype=torch.long))
    orange[:, 1] = (orange[:, 0] + 1) / 2 - 1  # green at half of red: 30 degrees, off the palette
    assert hue_metrics(orange)["on_palette"] == 0
    grey = data.grey.expand(-1, 3, -1, -1) * 2 - 1
    assert hue_metrics(grey)["on_palette"] == 0  # no hue at all is not on the palette
    halves = real.clone()
    halves[..., 8:] = real.roll(1, 0)[..., 8:]  # the right half from another image
    figures = hue_metrics(halves)
    assert figures["on_palette"] == 1 and figures["one_ink"] < 0.9


def test_svm_reads_inked_digits_it_never_saw(data):
    part = Digits(data.grey[:1200], data.labels[:1200])
    inks = torch.randint(len(INKS), (597,), generator=torch.Generator().manual_seed(2))
    features = grey8(data.ink(data.grey[1200:], inks))
    score = train_svm(part).score(features.numpy(), data.labels[1200:].numpy())
    assert score > 0.94


def test_all_figures_of_real_digits(data, real):
    figures = digit_metrics(real, data.labels, train_svm(data))
    assert figures["accuracy"] > 0.99 and 0.09 < figures["class_min"] < figures["class_max"] < 0.11
    others = digit_metrics(real, (data.labels + 1) % 10, train_svm(data))
    assert others["accuracy"] < 0.01
