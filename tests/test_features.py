"""Feature networks: the digits' and any small pictures' by their recipes, Inception of torch-fidelity."""

import pytest
import torch
from packages import importable
from safetensors.torch import load_file, save_file

from train.data.digits import INKS, Digits
from train.evaluate.features import (
    DigitsNet,
    digits_features,
    inception,
    load_classifier,
    of_pixels,
    save_classifier,
    train_classifier,
    train_digits_net,
)
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


# ---- a classifier of any small pictures ----------------------------------------------------------

class Shapes:
    """Stripes down, stripes across and plain pictures of 13 x 13 in random colours, with what Images have."""

    name, class_names = "shapes", ("down", "across", "plain")

    def __init__(self, count=900):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (count,), generator=generator)
        colours = torch.rand((count, 2, 3), generator=generator)
        stripe = (torch.arange(13) // 2 % 2).float()
        masks = torch.stack([stripe.expand(13, 13), stripe[:, None].expand(13, 13), torch.zeros(13, 13)])[self.labels]
        self.images = (255 * torch.lerp(*colours[..., None, None].unbind(1), masks[:, None])).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def pixels(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def classifier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluate.features.STEPS", 200)
        return train_classifier(Shapes())


def test_the_classifier_reads_pictures_it_never_saw(classifier):
    shapes = Shapes()
    assert classifier.held_out >= 0.95
    found = classifier.judge(shapes.images / 127.5 - 1, shapes.labels)
    assert found["accuracy"] >= 0.95
    wrong = classifier.judge(shapes.images / 127.5 - 1, (shapes.labels + 1) % 3)
    assert wrong["accuracy"] == pytest.approx(
        (classifier.read(shapes.images) == (shapes.labels + 1) % 3).double().mean()
    )
    assert wrong["accuracy"] <= 0.05


def test_the_held_out_tenth_is_not_learnt_by_heart(monkeypatch):
    """Labels without meaning cannot be read where they were not seen, nor those of pictures that were shown."""
    monkeypatch.setattr("train.evaluate.features.STEPS", 200)
    shapes, seen = Shapes(200), []
    shapes.labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1))
    pixels = shapes.pixels
    shapes.pixels = lambda index: seen.append(index) or pixels(index)
    found = train_classifier(shapes)
    assert found.held_out < 0.7
    trained, read = torch.cat(seen[:-1]).unique(), seen[-1]
    assert len(trained) == 180 and len(read) == 20 and not set(trained.tolist()) & set(read.tolist())


def test_the_classifiers_features_see_shape_and_colour(classifier):
    shapes, features = Shapes(), of_pixels(classifier.net)
    real, other = moments(features(shapes.images[::2])), features(shapes.images[1::2])
    floor = frechet_distance(real, moments(other))
    green = shapes.images[1::2].clone()
    green[:, 0] = 0
    turned = shapes.images[1::2][shapes.labels[1::2] != 2]  # without the plain ones
    assert min(frechet_distance(real, moments(features(x))) for x in (green, turned)) > 5 * floor


def test_a_classifier_comes_back_from_its_file(classifier, tmp_path):
    path, images = tmp_path / "classifier.safetensors", Shapes().images
    assert load_classifier(path, "shapes") is None
    save_classifier(path, classifier, "shapes")
    again = load_classifier(path, "shapes")
    assert (again.held_out, again.classes) == (classifier.held_out, 3)
    assert torch.equal(of_pixels(again.net)(images), of_pixels(classifier.net)(images))
    assert torch.equal(again.read(images), classifier.read(images))
    assert load_classifier(path, "other images") is None
    tensors = load_file(path)
    tensors.pop("heads.bias")
    save_file(tensors, path, {"kind": "shapes", "classes": "3", "size": "13", "held_out": "1.0"})
    assert load_classifier(path, "shapes") is None


def test_a_classifier_needs_classes():
    shapes = Shapes(19)
    with pytest.raises(ValueError, match="shapes must be a folder with a subfolder for each class, of 20 images"):
        train_classifier(shapes)
    shapes.labels = None
    with pytest.raises(ValueError, match="learns to tell classes apart"):
        train_classifier(shapes)


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
