"""Tiles of a panel: pictures and maps of one size, with captions, marks and legends. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_picture
from ..pictures import FAINT, PAPER, TEXT, font, heat, text_width, to_uint8
from .charts import PALETTE

SMALL, LARGE = 192, 256  # pixels of a tile's longer side, about: of a map, and of a picture finer than its map
MOST = 384


def tile_size(latent: Sequence[int], picture: Sequence[int]) -> tuple[int, int]:
    """(width, height) of all tiles of a panel: the latent (h, w) enlarged by whole pixels, reduced only if it is huge.

    ``picture`` is the size that the latent decodes to: one that is finer gets larger tiles.
    """
    longer = max(latent)
    enlarged = math.ceil((LARGE if max(picture) > longer else SMALL) / longer)
    factor = enlarged if longer <= MOST else MOST / longer
    return round(latent[1] * factor), round(latent[0] * factor)


def tile(image: Tensor, size: tuple[int, int]):
    """A picture (1,C,H,W) in [-1, 1] in that size: pixels stay squares, what is finer is averaged."""
    from PIL import Image

    picture = Image.fromarray(to_uint8(image)[0].numpy())
    return picture.resize(size, _filter(picture.width, size[0]))


def _filter(width: int, wanted: int):
    from PIL import Image

    return Image.Resampling.NEAREST if wanted >= width else Image.Resampling.BOX


CHECKS = ((208, 208, 204), (232, 232, 228))  # what shows through where a picture is transparent


def see_through(picture, opacity: Tensor):
    """The picture over a checkerboard, which shows as far as opacity (H,W) in [0, 1] is below one."""
    from PIL import Image

    checks = Image.new("RGB", picture.size, CHECKS[0])
    pair = Image.new("RGB", (12, 12), CHECKS[0])
    pair.paste(CHECKS[1], (0, 0, 6, 6))
    pair.paste(CHECKS[1], (6, 6, 12, 12))
    for x in range(0, picture.width, 12):
        for y in range(0, picture.height, 12):
            checks.paste(pair, (x, y))
    mask = Image.fromarray((255 * opacity).round().byte().numpy())
    mask = mask.resize(picture.size, _filter(opacity.shape[1], picture.width))
    return Image.composite(picture, checks, mask)


def caption_width(captions: Sequence[str]) -> int:
    """What a tile with the widest of these captions takes."""
    return 30 + max(text_width(text, 15) for text in captions)


def captioned(tiles: Sequence, captions: Sequence[str], colours: Sequence | None, columns: int, least: int = 0):
    """Tiles in rows, each with a caption beneath, and before it a swatch of its colour.
    A column is ``least`` wide or more."""
    from PIL import Image, ImageDraw

    width, height, gap, foot = tiles[0].width, tiles[0].height, 10, 30
    wide = max(width, least, caption_width(captions))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (wide + gap) - gap, rows * (height + foot)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = i % columns * (wide + gap), i // columns * (height + foot)
        canvas.paste(picture, (x, y))
        if colours is not None:
            pen.rectangle((x, y + height + 7, x + 11, y + height + 18), colours[i])
        pen.text((x + (0 if colours is None else 19), y + height + 13), caption, FAINT, font(15), anchor="lm")
    return canvas


def legend(colours: Sequence[tuple[int, int, int]], names: Sequence[str], rows: int = 1000):
    """Swatches with names, one below the other; those that do not fit into so many rows are counted."""
    from PIL import Image, ImageDraw

    shown = len(names) if len(names) <= rows else rows - 1
    rest = f"and {len(names) - shown} more" if shown < len(names) else ""
    lines = [*names[:shown], *([rest] if rest else [])]
    canvas = Image.new("RGB", (26 + max(text_width(line, 15) for line in lines), 24 * len(lines)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        if i < shown:
            pen.rectangle((0, 24 * i + 5, 14, 24 * i + 19), colours[i])
        pen.text((24 if i < shown else 0, 24 * i + 12), line, TEXT, font(15), anchor="lm")
    return canvas


def marked(picture, pixel: tuple[int, int], latent: Sequence[int]):
    """The picture with a box around one pixel (x, y) of the latent (h, w), all of it inside;
    a tiny one gets a box that can be seen."""
    from PIL import ImageDraw

    picture = picture.copy()
    unit = picture.width / latent[1], picture.height / latent[0]
    half = [max(u / 2, 6) for u in unit]
    centre = [min(max((p + 0.5) * u, h + 2), side - h - 2)
              for p, u, h, side in zip(pixel, unit, half, picture.size, strict=True)]
    pen = ImageDraw.Draw(picture)
    for grow, colour in ((2, (255, 255, 255)), (1, (0, 0, 0)), (0, (255, 255, 255))):
        (x, y), (a, b) = centre, half
        pen.rectangle((x - a - grow, y - b - grow, x + a + grow - 1, y + b + grow - 1), outline=colour)
    return picture


def stacked(pictures: Sequence):
    """Pictures below each other."""
    from PIL import Image

    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    return canvas


def evened(pictures: Sequence) -> list:
    """Frames of an animation: all in the size of the largest."""
    from PIL import Image

    size = max(p.width for p in pictures), max(p.height for p in pictures)
    frames = [Image.new("RGB", size, PAPER) for _ in pictures]
    for frame, picture in zip(frames, pictures, strict=True):
        frame.paste(picture, (0, 0))
    return frames


def save_animation(pictures: Sequence, path, milliseconds: int = 700) -> None:
    """Pictures as a ``.gif`` or ``.webp`` that repeats. A GIF has 256 colours:
    those of charts and maps exactly, the rest as they come."""
    from PIL import Image

    frames = evened(pictures)
    if path.suffix.lower() == ".gif":
        map_colours = to_uint8(heat(torch.linspace(0, 1, 64)[None], 0, 1)[None])[0, 0].flatten().tolist()
        exact = [channel for colour in (PAPER, TEXT, FAINT, *CHECKS, *PALETTE) for channel in colour] + map_colours
        found = stacked(frames).quantize(256 - len(exact) // 3, method=Image.Quantize.MAXCOVERAGE, kmeans=4)
        palette = Image.new("P", (1, 1))
        palette.putpalette((exact + (found.getpalette() or []))[: 3 * 256])
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first, *rest = frames
    write_picture(Path(path), first, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)
