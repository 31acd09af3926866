"""Drawing with Pillow: image grids with labels, heat maps, scatters. Pillow is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAPER = (250, 250, 248)
TEXT = (38, 38, 42)
FAINT = (104, 104, 112)

# Viridis at nine points (matplotlib, CC0): perceptually even, readable in grey and by the colour-blind.
_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


def to_uint8(images: Tensor) -> Tensor:
    """(N,C,H,W) in [-1,1], C = 1 or 3, to (N,H,W,3) uint8. More channels (latents) show their first three."""
    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def read_picture(path) -> tuple[Tensor, Tensor]:
    """A picture file (1,3,H,W) in [-1, 1] and its alpha (1,1,H,W) in [0, 1]. OSError for what is none."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    rgba = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return 2 * rgba[:, :3] - 1, rgba[:, 3:]


def heat(values: Tensor, low: float, high: float) -> Tensor:
    """Map (..., H, W) values to viridis, as images (..., 3, H, W) in [-1,1]."""
    stops = torch.tensor([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _VIRIDIS], dtype=torch.float32)
    position = ((values.float().cpu() - low) / (high - low)).clamp(0, 1) * (len(stops) - 1)
    floor = position.floor().long().clamp(max=len(stops) - 2)
    colour = torch.lerp(stops[floor], stops[floor + 1], (position - floor).unsqueeze(-1))
    return (colour / 127.5 - 1).movedim(-1, -3)


def font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Of the longest line, in pixels."""
    return max(int(font(size).getlength(line) + 0.5) for line in text.split("\n"))


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2):
    """A Pillow image of (N,C,H,W) images in rows of ``columns``, enlarged by whole pixels."""
    from PIL import Image

    pixels = to_uint8(images)
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    canvas = Image.new("RGB", (columns * (w * scale + gap) + gap, rows * (h * scale + gap) + gap), PAPER)
    for i, image in enumerate(pixels):
        tile = Image.fromarray(image.numpy()).resize((w * scale, h * scale), Image.Resampling.NEAREST)
        canvas.paste(tile, (gap + i % columns * (w * scale + gap), gap + i // columns * (h * scale + gap)))
    return canvas


def sheet(cells: Sequence[Sequence], row_titles: Sequence[str], column_titles: Sequence[str], title: str,
          note: str = ""):
    """A table of Pillow images, cells left-aligned; each title is left out if empty."""
    from PIL import Image, ImageDraw

    big, small, pad = font(24), font(16), 14
    column_titles = list(column_titles) + [""] * (max(map(len, cells)) - len(column_titles))
    left = max(text_width(t, 16) for t in row_titles) + 2 * pad if row_titles else pad
    widths = [
        max(text_width(t, 16), *(row[c].width for row in cells if c < len(row))) for c, t in enumerate(column_titles)
    ]
    heights = [max(image.height for image in row) for row in cells]
    top = pad + (28 + pad if title else 0) + (26 if any(column_titles) else 0)
    notes = note.splitlines()
    width = max(left + sum(widths) + pad * len(widths), text_width(title, 24) + 2 * pad, text_width(note, 16) + 2 * pad)
    height = top + sum(heights) + pad * len(heights) + 23 * len(notes) + (pad if notes else 0)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((pad, pad), title, TEXT, big)
    x = left
    for c, w in enumerate(widths):
        draw.text((x, top - 26), column_titles[c], FAINT, small)
        y = top
        for row, h in zip(cells, heights, strict=True):
            if c < len(row):
                canvas.paste(row[c], (x, y))
            y += h + pad
        x += w + pad
    y = top
    for label, h in zip(row_titles, heights, strict=False):
        draw.text((pad, y + h / 2), label, TEXT, small, anchor="lm")
        y += h + pad
    y = top + sum(heights) + pad * len(heights)
    for i, line in enumerate(notes):
        draw.text((pad, y + 23 * i), line, FAINT, small)
    return canvas


def colour_bar(low: float, high: float, unit: str, length: int, thickness: int = 14, beyond: bool = False):
    """A vertical viridis bar with its ends and unit written beside it.
    ``beyond``: what is higher has the last colour too."""
    from PIL import Image, ImageDraw

    ramp = heat(torch.linspace(high, low, length)[:, None].expand(-1, thickness), low, high)
    small, words = font(13), f"{'> ' * beyond}{high:.2g} {unit}".strip()
    canvas = Image.new("RGB", (thickness + 6 + max(text_width(words, 13), text_width(f"{low:.2g}", 13)), length), PAPER)
    canvas.paste(Image.fromarray(to_uint8(ramp[None])[0].numpy()), (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((thickness + 6, 0), words, TEXT, small)
    draw.text((thickness + 6, length - 1), f"{low:.2g}", TEXT, small, anchor="ls")
    return canvas


def scatter(points: Tensor, limit: float, size: int = 400):
    """Points (N,2) within [-limit, limit]^2 as a two-dimensional histogram, dark where many."""
    from PIL import Image

    cells = ((points.detach().float().cpu() / limit + 1) / 2 * size).floor().long()
    cells = cells[((cells >= 0) & (cells < size)).all(1)]
    counts = torch.bincount((size - 1 - cells[:, 1]) * size + cells[:, 0], minlength=size * size).reshape(size, size)
    shade = (255 * torch.exp(-1.5 * counts.float())).byte()
    return Image.fromarray(shade[:, :, None].expand(-1, -1, 3).contiguous().numpy())
