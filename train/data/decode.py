"""A picture file of any kind to the square of pixels that a network sees. Pillow decodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files import file_size

MODES = {1: "L", 3: "RGB"}  # Pillow's name for images of so many channels
GROUND = (255, 255, 255)    # what transparent pictures are laid on: white
LONGEST = 4                 # squares: what is longer is cut before it is enlarged
# What Pillow names, but reads only with another program's help, and films.
NOT_READ = {".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps", ".wmf"}


@cache
def suffixes() -> frozenset[str]:
    """The endings of all pictures that this Pillow reads, with the dot."""
    from PIL import Image

    Image.init()
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN) - NOT_READ


def is_image(path: Path) -> bool:
    return path.suffix.lower() in suffixes() and not path.name.startswith(".")


def decode(path: Path, size: int, channels: int = 3, note: Callable[[str], None] = lambda words: None) -> Tensor:
    """An image file, upright, its centre square at a size, as ADM and DiT cut it: (C,size,size) uint8.

    Halved by boxes while at least twice too large, then bicubic to the shorter side, then the centre. Transparent
    pictures are laid on white, and ``note`` is told so. ValueError for pixels whose range nobody knows.
    """
    import numpy as np
    from PIL import Image, ImageOps

    file_size(path)  # a pipe would wait for ever
    with Image.open(path) as image:
        high = white_level(image)
        image = ImageOps.exif_transpose(image)
        if high is not None:
            scaled = np.asarray(image, dtype=np.float64) * (255 / high) + 0.5
            image = Image.fromarray(scaled.astype(np.uint8))
        if image.has_transparency_data:
            note("transparent pictures are laid on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image.convert("RGBA"))
        image = image.convert(MODES[channels])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = without_far_ends(image, size)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def white_level(image) -> float | None:
    """The value of white in an image of more than eight bits; None for the others.

    Integers have as many bits as their file says, else the fewest of 8, 12 and 16 that hold them; floats the lowest of
    1, 255 and 65535. ValueError for values below zero or above all of those: their white is anybody's guess.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF's BitsPerSample
        return 2.0**bits - 1
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0
    low, high = image.getextrema()
    known = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 4095.0, 65535.0)
    white = next((value for value in known if high <= value), None)
    if white is None or not low >= 0:
        raise ValueError(f"pixels from {low:g} to {high:g} have no known range; save the picture in 8 or 16 bits")
    return white


def without_far_ends(image, size: int):
    """The middle of an image that is many times longer than wide: enlarged, a line of 15000 pixels has gigabytes."""
    short = min(image.size)
    keep = LONGEST * short + 8
    if max(image.size) <= keep:
        return image
    parity = (max(image.size) - keep) % 2  # so that the centre stays where it is
    width, height = (min(side, keep + parity) if side > short else side for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
