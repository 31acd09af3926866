"""Training from a folder of images: what is found, how it is cut, what happens to broken files, resume."""

import numpy as np
import pytest
import torch
from PIL import Image

from gmflow_core import load_checkpoint
from train.__main__ import main
from train.config import PRESETS, override
from train.data.images import ImageFolder, decode, find_images
from train.data.open import open_data
from train.step import step_generator
from train.trainer import CHECKPOINT, Trainer

CPU = torch.device("cpu")
SMALL = ["model.sample_size=16", "model.num_layers=1", "model.num_heads=1", "model.head_dim=16", "model.logstd_width=8",
         "spectrum.base_size=[3, 16, 16]", "steps=4", "batch_size=4", "precision=float32", "save_every=2",
         "log_every=1"]


def picture(path, size=(20, 16), colour=(255, 0, 0), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes; the name says the order, the shade the image: cat 1..3, Dog 4..5, eel 6."""
    root = tmp_path / "pictures"
    for i, name in enumerate(["cat/a.png", "cat/b.PNG", "cat/deep/c.png", "Dog/d.png", "Dog/e.bmp", "eel/f.png"],
                             start=1):
        picture(root / name, (20 + i, 16 + 3 * i), (10 * i, 0, 0))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    return root


def config_for(folder, *settings):
    return override(PRESETS["images64"], [f"data_path={folder}", *SMALL, *settings])


def test_classes_are_the_sorted_folders(folder):
    found = find_images(folder)
    assert found.classes == ("Dog", "cat", "eel")
    assert [p.name for p in found.paths] == ["d.png", "e.bmp", "a.png", "b.PNG", "c.png", "f.png"]
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 2]


def test_images_without_class_folders_are_one_class(tmp_path, capsys):
    picture(tmp_path / "only" / "a.png")
    (tmp_path / "only" / "empty").mkdir()
    found = find_images(tmp_path / "only")
    assert found.classes == ("only",) and found.labels.tolist() == [0]
    picture(tmp_path / "only" / "b" / "b.png")
    assert find_images(tmp_path / "only").classes == ("b",)
    said = capsys.readouterr().err
    assert "1 images that lie beside the class folders are not used" in said and "are no classes: empty" in said


@pytest.mark.parametrize("name, message", [
    (None, "no folder of images was given: --data FOLDER"),
    ("absent", "does not exist; the data must be a folder"),
    ("file.png", "is a file; the data must be a folder"),
    ("empty", r"no images in it; expected .*CLASS"),
])
def test_bad_folders_are_named(tmp_path, name, message):
    picture(tmp_path / "file.png")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        find_images(name and tmp_path / name)


@pytest.mark.parametrize("size", [(16, 16), (100, 41), (41, 100), (33, 32), (5, 9), (1, 7)])
def test_decode_takes_the_centre_square(tmp_path, size):
    """A horizontal ramp stays a ramp about the same centre, whatever the size."""
    w, h = size
    ramp = np.tile(np.linspace(0, 255, w), (h, 1)).round().astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "ramp.png")
    pixels = decode(tmp_path / "ramp.png", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    if w >= 16:
        share = min(1, h / w)
        middle = pixels[0].float().mean(0)
        assert abs(middle.mean() - 127.5) < 8
        assert abs((middle[-1] - middle[0]) / (255 * share) - 1) < 0.15


def test_decode_is_adms(tmp_path):
    """Against the crop of guided-diffusion, written out."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (75, 118, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    half = image.resize((59, 37), resample=Image.BOX)
    arr = np.array(half.resize((29, 18), resample=Image.BOX).resize((round(29 * 16 / 18), 16), resample=Image.BICUBIC))
    x = (arr.shape[1] - 16) // 2
    assert np.array_equal(decode(tmp_path / "a.png", 16).permute(1, 2, 0).numpy(), arr[:, x : x + 16])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_decode_makes_rgb_of_every_mode(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture(path, (16, 16), (255, 255, 255), mode)
    assert (decode(path, 16) == 255).all() and decode(path, 16, channels=1).shape == (1, 16, 16)


def test_decode_of_sixteen_bits_and_of_a_turned_photo(tmp_path):
    Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (decode(tmp_path / "deep.png", 16) == 128).all()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # the camera lay on its side: 6 says "turn me clockwise"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 16)
    assert (turned[:, :, 8:] == 255).all() and (turned[:, :, :8] == 0).all()


def test_a_batch_is_a_function_of_the_generator(folder):
    data = ImageFolder.load(folder, 3, 16)
    images, labels = data.batch(64, step_generator(0, 5))
    again, same = ImageFolder.load(folder, 3, 16, workers=1).batch(64, step_generator(0, 5))
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert images.shape == (64, 3, 16, 16) and images.min() >= -1 and images.max() <= 1
    assert set(labels.tolist()) == {0, 1, 2}
    choice = data.choose(64, step_generator(0, 5))
    part, part_labels = data.fetch(choice[16:32])
    assert torch.equal(part, images[16:32]) and torch.equal(part_labels, labels[16:32])


def test_half_of_the_images_are_mirrored(tmp_path):
    left = np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(left).save(tmp_path / "a" / "a.png")
    images, _ = ImageFolder.load(tmp_path, 3, 16).batch(200, step_generator(0, 0))
    whole = images[images[:, 0, 0, 0] == 1]
    assert 70 < len(whole) < 130 and (whole[..., :8] == 1).all() and (whole[..., 8:] == -1).all()
    images, _ = ImageFolder.load(tmp_path, 3, 16, flip=False).batch(50, step_generator(0, 0))
    assert (images[:, 0, 0, 0] == 1).all()


def test_broken_images_are_reported_once_and_replaced(folder, capsys):
    (folder / "cat" / "b.PNG").write_bytes(b"this is no picture")
    whole = (folder / "cat" / "a.png").read_bytes()
    (folder / "cat" / "a.png").write_bytes(whole[: len(whole) // 2])
    data = ImageFolder.load(folder, 3, 16)
    for step in range(3):
        images, labels = data.batch(40, step_generator(0, step))
        shades = ((images[:, 0, 0, 0] + 1) * 12.75).round()
        assert set(shades.int().tolist()) == {3, 4, 5, 6}  # in place of 1 and 2 the next one, 3
        assert (labels == torch.tensor([-1, -1, -1, 1, 0, 0, 2])[shades.long()]).all()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("cannot be read, left out" in line for line in said)


def test_only_broken_images_are_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        ImageFolder.load(tmp_path, 3, 16).batch(2, step_generator(0, 0))


def test_small_sets_are_decoded_once(folder, monkeypatch):
    import train.data.images as module

    decoded = []
    monkeypatch.setattr(module, "decode", lambda path, *a: decoded.append(path) or decode(path, *a))
    data = ImageFolder.load(folder, 3, 16, workers=1)
    for step in range(5):
        data.batch(20, step_generator(0, step))
    assert len(decoded) == 6 and all(value.dtype == torch.uint8 for value in data.cache.values())
    monkeypatch.setattr(module, "CACHE_BYTES", 100)
    large = ImageFolder.load(folder, 3, 16)
    assert large.cache is None
    assert torch.equal(large.batch(8, step_generator(0, 0))[0], data.batch(8, step_generator(0, 0))[0])


# ---- runs --------------------------------------------------------------------------------------

def test_the_data_gives_the_number_of_classes(folder):
    data, config = open_data(config_for(folder))
    assert config.model.num_classes == 3 and data.class_names == ("Dog", "cat", "eel")
    assert open_data(config_for(folder, "model.num_classes=3"))[1].classes == "model"
    with pytest.raises(ValueError, match="the data has 3 classes, the model 5: --set classes=data"):
        open_data(config_for(folder, "model.num_classes=5"))


def test_a_run_remembers_its_classes(folder, tmp_path, capsys):
    trainer = Trainer(config_for(folder), tmp_path / "run", CPU)
    trainer.train_step()
    trainer.save()
    checkpoint = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert checkpoint.class_names == ("Dog", "cat", "eel") and checkpoint.config.num_classes == 3
    assert "data_path" not in checkpoint.training["config"] and checkpoint.latent_space.kind == "rgb"
    picture(folder / "cat" / "new.png")
    folder.rename(tmp_path / "moved")  # the same data elsewhere, with one more image
    again = Trainer(config_for(tmp_path / "moved"), tmp_path / "run", CPU)
    assert again.step == 1 and "the data has 7 samples now, 6 when the run was saved" in capsys.readouterr().err
    (tmp_path / "moved" / "eel").rename(tmp_path / "moved" / "fox")
    with pytest.raises(ValueError, match="holds a run of other classes"):
        Trainer(config_for(tmp_path / "moved"), tmp_path / "run", CPU)
    picture(tmp_path / "moved" / "eel" / "f.png")
    with pytest.raises(ValueError, match="another configuration"):
        Trainer(config_for(tmp_path / "moved"), tmp_path / "run", CPU)


def test_command_trains_on_a_folder(folder, tmp_path, monkeypatch, capsys):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    monkeypatch.setattr("sys.argv", ["train", "--preset", "images64", "--data", str(folder), "--out",
                                     str(tmp_path / "run"), *settings])
    assert main() == 0
    assert (tmp_path / "run" / "samples-000004.png").exists() and str(tmp_path / "run") in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["train", "--preset", "images64", "--out", str(tmp_path / "none")])
    assert main() == 2 and capsys.readouterr().err.startswith("error: no folder of images was given")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("settings, message", [
    (["model.in_channels=4", "spectrum.base_size=[4, 16, 16]"], "images have 1 or 3 channels"),
    (["data=digits", "classes=model"], "data digits needs no folder and would ignore"),
    (["data=checkerboard"], "data checkerboard needs no folder and would ignore"),
    (["data=digits", "classes=model", "data_path=null"], "the data has 10 classes, the model 1000"),
    (["data=checkerboard", "data_path=null"], r"samples of shape \(2,\), the model takes \(3, 16, 16\)"),
    (["data=cats"], "data must be one of digits, checkerboard, imagefolder"),
    (["model.sample_size=32"], r"spectrum.base_size \[3, 16, 16\] must be the model's sample \[3, 32, 32\]"),
    (["model=3"], "set a field of model: model.num_classes, "),
    (["workers=0"], "workers must be >= 1"),
])
def test_data_that_does_not_suit_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_data(config_for(folder, *settings))


def test_images_for_a_2d_model_are_refused(folder):
    with pytest.raises(ValueError, match="needs a GM-DiT"):
        open_data(override(PRESETS["checkerboard"], ["data=imagefolder", f"data_path={folder}"]))


def test_grey_images_need_one_channel(folder):
    data, _ = open_data(config_for(folder, "model.in_channels=1", "spectrum.base_size=[1, 16, 16]"))
    assert data.batch(2, step_generator(0, 0))[0].shape == (2, 1, 16, 16)


def test_a_folder_may_be_called_by_a_number():
    assert override(PRESETS["images64"], ["data_path=2024"]).data_path == "2024"
