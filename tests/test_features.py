"""Feature networks: the digits' by its recipe, Inception of torch-fidelity."""

import pytest
import torch
from packages import importable

from train.data.digits import INKS, Digits
from train.evaluate.features import DigitsNet, digits_features, inception, train_digits_net
from train.evaluate.image_metrics import frechet_distance, moments, quantise

CPU = torch.device("cpu")


def inked(data: Digits, seed: int):
    inks = torch.randint(len(INKS), (len(data.labels),), generator=torch.Generator().manual_seed(seed))
    return quantise(data.ink(data.grey, inks)), inks


@pytest.fixture(scope="module")
def data():
    return Digits.load()


@pytest.fixture(scope="module")
def net(data):
    """Trained on the first 1400 digits."""
    return train_digits_net(Digits(data.grey[:1400], data.labels[:1400]))


def test_the_recipe_reads_digits_it_never_saw(data, net):
    rest = Digits(data.grey[1400:], data.labels[1400:])
    pixels, inks = inked(rest, 3)
    classes, colours = net(pixels)
    assert (classes.argmax(1) == rest.labels).float().mean() > 0.93
    assert (colours.argmax(1) == inks).float().mean() > 0.99


def test_the_recipe_repeats_itself_and_leaves_the_generator(data, monkeypatch):
    monkeypatch.setattr("train.evaluate.features.STEPS", 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = train_digits_net(data), train_digits_net(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in one.parameters()) and not one.training


def test_features_see_what_is_wrong(data, net):
    """FID of 64 features grows from real digits to blurred, to one ink only, to noise."""
    features = lambda pixels: moments(net.embed(pixels))  # noqa: E731
    real, other = inked(data, 1)[0], inked(data, 2)[0]
    floor = frechet_distance(features(real), features(other))
    blurred = torch.nn.functional.avg_pool2d(other.float(), 3, 1, 1).to(torch.uint8)
    red = quantise(data.ink(data.grey, torch.zeros(len(data.labels), dtype=torch.long)))
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scores = [frechet_distance(features(real), features(x)) for x in (blurred, red, noise)]
    assert 6 * floor < min(scores) and scores[0] < min(scores[1:])


def test_digits_features_are_of_pixels(data, monkeypatch):
    monkeypatch.setattr("train.evaluate.features.STEPS", 1)
    found = digits_features(data)(inked(data, 1)[0][:1100])
    assert found.shape == (1100, 64) and found.isfinite().all() and isinstance(DigitsNet(), torch.nn.Module)


# ---- Inception ---------------------------------------------------------------------------------

def test_inception_from_a_file(tmp_path, monkeypatch, rng):
    """Random weights in the package's own layout; the features are its own."""
    importable("torch_fidelity.feature_extractor_inceptionv3", "FeatureExtractorInceptionV3")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: made.state_dict())
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    made = module.FeatureExtractorInceptionV3("made", ["2048"], str(save(tmp_path / "any.pth", {})))
    monkeypatch.undo()
    features = inception(save(tmp_path / "inception.pth", made.state_dict()), CPU)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=rng).to(torch.uint8)
    found = features(pixels)
    assert found.shape == (2, 2048) and torch.equal(found, made(pixels)[0])
    with pytest.raises(ValueError, match="Inception's weights cannot be read.*torch-fidelity's own file"):
        inception(save(tmp_path / "other.pth", {"a": torch.zeros(1)}), CPU)


def save(path, state):
    torch.save(state, path)
    return path


def test_inception_without_its_file(tmp_path):
    with pytest.raises(ValueError, match="absent.pth: no such file"):
        inception(tmp_path / "absent.pth", CPU)


def test_inception_without_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="python -m pip install torch-fidelity"):
        inception(None, CPU)
