"""Pictures as people have them: transparent, deep, turned, thin, in odd formats, behind links,
in folders named train and val."""

import os

import numpy as np
import pytest
import torch
from child import output_of
from PIL import Image, features

from train.data.decode import decode, suffixes, white_level
from train.data.images import ImageFolder, find_images, fingerprint


def full(value, dtype, size=(16, 16)):
    return np.full(size, value, dtype=dtype)


# ---- decoding ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_and_said(tmp_path, mode):
    """A hidden red behind full transparency is white, half of black is grey."""
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 128), (0, 0, 8, 16))
    if mode == "P":
        image = Image.new("P", (16, 16), 0)
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    notes = []
    pixels = decode(tmp_path / "a.png", 16, note=notes.append)
    assert (pixels[:, :, 12:] == 255).all() and notes == ["transparent pictures are laid on white"]
    if mode != "P":
        assert (pixels[:, :, :4].float() - 127).abs().max() <= 1


def test_a_note_is_said_once(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGBA", (16, 16), (255, 0, 0, i)).save(tmp_path / "a" / f"{i}.png")
    data = ImageFolder.load(tmp_path, 3, 16)
    for i in range(3):
        data.read(i)
    assert capsys.readouterr().err.count("laid on white") == 1


def test_sixteen_bits_keep_their_turn(tmp_path):
    pixels = full(0, np.uint16)
    pixels[:8] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise"
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = decode(tmp_path / "a.png", 16)
    assert (turned[:, :, 8:] == 255).all() and (turned[:, :, :8] == 0).all()


@pytest.mark.parametrize("value, dtype, expected", [
    (65535, np.uint16, 255), (0x8000, np.uint16, 128), (257, np.uint16, 1),
    (200, np.int32, 200), (4095, np.int32, 255), (2048, np.int32, 128), (65535, np.int32, 255),
    (1.0, np.float32, 255), (0.5, np.float32, 128), (200.0, np.float32, 200), (65535.0, np.float32, 255),
])
def test_deep_pictures_are_scaled_by_their_range(tmp_path, value, dtype, expected):
    Image.fromarray(full(value, dtype)).save(tmp_path / "a.tif")
    assert (decode(tmp_path / "a.tif", 16) == expected).all()


def test_twelve_bits_are_what_the_file_says():
    image = Image.fromarray(full(4095, np.uint16))
    image.tag_v2 = {258: (12,)}
    assert white_level(image) == 4095 and white_level(Image.new("RGB", (2, 2))) is None


@pytest.mark.parametrize("value, dtype", [(-1, np.int32), (10**6, np.int32), (-0.5, np.float32), (1e6, np.float32),
                                          (np.nan, np.float32)])
def test_pixels_of_no_known_range_are_left_out_by_name(tmp_path, capsys, value, dtype):
    (tmp_path / "a").mkdir()
    Image.fromarray(full(value, dtype)).save(tmp_path / "a" / "odd.tif")
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "z.png")
    ImageFolder.load(tmp_path, 3, 16).read(0)
    said = capsys.readouterr().err
    assert "odd.tif: cannot be read, left out" in said and "have no known range" in said


THIN = """
from train.data.decode import decode
before = peak()
print(tuple(decode(sys.argv[1], 256).shape), peak() - before)
"""


def test_a_thin_picture_is_cut_before_it_is_enlarged(tmp_path):
    """15000 x 1: enlarged to 256 rows first it would have 3.8 million columns, 4.3 GB on the way."""
    Image.new("RGB", (15000, 1), (9, 9, 9)).save(tmp_path / "a.png")
    shape, cost = output_of(THIN, tmp_path / "a.png").rsplit(" ", 1)
    assert shape == "(3, 256, 256)" and int(cost) < 100 << 20


@pytest.mark.parametrize("size", [(400, 20), (401, 20), (20, 403), (1000, 37), (641, 31)])
def test_cutting_first_changes_nothing(tmp_path, size, monkeypatch):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = 127 + 60 * np.sin(x / 5) + 60 * np.sin(y / 7)
    Image.fromarray(np.stack([waves] * 3, -1).astype(np.uint8)).save(tmp_path / "a.png")
    cut = decode(tmp_path / "a.png", 64)
    monkeypatch.setattr("train.data.decode.LONGEST", 10**6)
    whole = decode(tmp_path / "a.png", 64)
    # Rounding to whole pixels may move the centre by half a one of the result.
    assert (cut.float() - whole.float()).abs().mean() < 3


@pytest.mark.parametrize("ending", [".avif", ".jfif", ".jp2", ".tga", ".pgm", ".apng", ".png", ".webp", ".qoi"])
def test_every_format_that_pillow_reads(tmp_path, ending):
    assert ending in suffixes() or not features.check("avif")
    (tmp_path / "a").mkdir()
    path, kind = tmp_path / "a" / f"a{ending}", {".jfif": "JPEG", ".apng": "PNG", ".pgm": "PPM"}.get(ending)
    try:
        Image.new("L" if ending == ".pgm" else "RGB", (16, 16),
                  100 if ending == ".pgm" else (100, 100, 100)).save(path, kind)
    except (KeyError, ValueError, OSError):
        pytest.skip(f"this Pillow writes no {ending}")
    images = find_images(tmp_path)
    assert len(images.paths) == 1 and (decode(path, 16).float() - 100).abs().max() < 5


# ---- folders -----------------------------------------------------------------------------------

def tree(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)


def test_linked_folders_are_read_and_loops_are_left_out(tmp_path, capsys):
    tree(tmp_path, "store/x/1.png", "data/a/2.png", "data/b/3.png")
    os.symlink(tmp_path / "store" / "x", tmp_path / "data" / "a" / "linked")
    os.symlink(tmp_path / "data" / "a", tmp_path / "data" / "a" / "loop")
    os.symlink(tmp_path / "store", tmp_path / "data" / "c")
    images = find_images(tmp_path / "data")
    assert ([p.relative_to(tmp_path / "data").as_posix() for p in images.paths]
            == ["a/2.png", "a/linked/1.png", "b/3.png", "c/x/1.png"])
    assert capsys.readouterr().err.count("a link to a folder that is read already") == 1


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    tree(tmp_path, "train/cat/1.png", "val/cat/2.png")
    with pytest.raises(ValueError, match="train and val are parts of a data set and no classes: name one, .*train"):
        find_images(tmp_path)
    assert find_images(tmp_path / "train").classes == ("cat",)
    tree(tmp_path, "bus/1.png")  # among other classes it is a train
    assert find_images(tmp_path).classes == ("bus", "train", "val")


def test_a_class_without_a_readable_picture_is_said(tmp_path, capsys):
    tree(tmp_path, "a/1.png", "b/1.png")
    for name in ("b/1.png", "b/2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    data = ImageFolder.load(tmp_path, 3, 16)
    for i in range(3):
        data.read(i)
    said = capsys.readouterr().err
    assert said.count("none of the 2 images of the class b can be read: it is not trained") == 1


def test_a_fingerprint_is_of_contents(tmp_path):
    tree(tmp_path, "one/a/1.png", "one/b/2.png", "two/a/1.png", "two/b/2.png")
    first = fingerprint(find_images(tmp_path / "one"))
    assert fingerprint(find_images(tmp_path / "two")) == first  # a copy elsewhere
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "two" / "a" / "1.png")
    assert fingerprint(find_images(tmp_path / "two")) != first
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    assert fingerprint(find_images(tmp_path / "one")) != first


def test_a_batch_of_odd_pictures_trains(tmp_path):
    tree(tmp_path, "a/1.png")
    Image.fromarray(full(300, np.uint16)).save(tmp_path / "a" / "2.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a" / "3.png")
    x, labels = ImageFolder.load(tmp_path, 3, 16).batch(8, torch.Generator().manual_seed(0))
    assert x.shape == (8, 3, 16, 16) and x.abs().max() <= 1 and labels.tolist() == [0] * 8


def test_pipes_are_left_out_by_name(tmp_path, capsys):
    tree(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "0.png")
    images = find_images(tmp_path)
    assert fingerprint(images) == fingerprint(images)
    ImageFolder.load(tmp_path, 3, 16).read(0)
    assert "0.png: cannot be read, left out" in capsys.readouterr().err
