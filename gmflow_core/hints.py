r"""Pictures as evidence about the images of an RGB model, whose x_0 is [-1, 1].

Shapes: B batch, H W space. Pictures are (B,3,H,W) in [-1, 1], masks (B,1,H,W) in [0, 1]: grey values of a mask scale
the precision. ``std`` is how far, in units of x_0, the picture may be off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .evidence import BlockEvidence, DirectionEvidence, Evidence, PixelEvidence

COLOURLESS = 0.1   # of [0, 1]: no hue below this difference between the strongest and the weakest channel
KINDS = ("colour", "hue", "brightness")


def hint(picture: Tensor, mask: Tensor, kind: str, std: float) -> Evidence:
    """Evidence of one of KINDS about the pixels of a mask. ValueError for anything that is none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be a number > 0, got {std}")
    if not bool((mask > 0).any()):
        raise ValueError("mask: nothing is painted: it is 0 everywhere")
    precision = mask / std**2
    if kind == "colour":
        return PixelEvidence(picture, precision)
    return hue(picture, precision) if kind == "hue" else brightness(picture, precision)


def hue(picture: Tensor, precision: Tensor) -> Evidence:
    r"""Of any brightness, on the line from black through the picture's colour: Lambda = precision (I - c c^T), centred
    on black, c the unit colour. Pixels where the picture has no colour say nothing; ValueError if none has."""
    rgb = (picture.clamp(-1, 1) + 1) / 2
    coloured = rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True) >= COLOURLESS                # (B,1,H,W)
    precision = precision * coloured
    if not bool((precision > 0).any()):
        raise ValueError("image: what is painted has no colour: for black, "
                         "grey and white use kind colour or brightness")
    grey = torch.full_like(rgb, 3**-0.5)
    along = torch.where(coloured, rgb / rgb.norm(dim=1, keepdim=True).clamp(min=COLOURLESS), grey)
    black = torch.full_like(along, -1.0)
    return PixelEvidence(black, precision) + DirectionEvidence((along * black).sum(1, keepdim=True), along, -precision)


def brightness(picture: Tensor, precision: Tensor) -> Evidence:
    r"""The mean of the channels, y = b.x_0 + noise with b = (1, 1, 1)/3: rank one, Lambda = precision b b^T."""
    value = picture.mean(1, keepdim=True)                                                         # (B,1,H,W)
    along = torch.full_like(picture[:, :, :1, :1], 3**-0.5)
    return DirectionEvidence(value * 3**0.5, along, precision / 3)


def small_picture(picture: Tensor, size: tuple[int, int], std: float) -> Evidence:
    """The block means of an image of ``size`` (H, W). ValueError if that is no whole multiple of the picture's."""
    height, width = picture.shape[-2:]
    block = size[0] // height
    if block < 1 or (block * height, block * width) != tuple(size):
        raise ValueError(f"image: {width} x {height} pixels (width x height) are no small picture of {size[1]} x "
                         f"{size[0]}: the model's size must be a whole multiple of it, the same along both sides")
    return BlockEvidence(picture, block, std)


def in_colour(centre: Tensor, size: tuple[int, int], std: float, what: str, mask: Tensor | None = None) -> Evidence:
    """Hue evidence of one colour (3,) in [-1, 1] at the pixels of a mask (B,1,H,W); None is all pixels of an image.
    Black, grey and white are no hue: with a mask that very colour is asked for, else ValueError, naming ``what``."""
    rgb = (centre.clamp(-1, 1) + 1) / 2
    coloured = float(rgb.max() - rgb.min()) >= COLOURLESS
    if mask is None and not coloured:
        values = ", ".join(f"{v:.2f}" for v in rgb.tolist())
        raise ValueError(f"{what} has no colour that could be asked for everywhere: "
                         f"its centre is ({values}) of 0 to 1; choose another one, or only its own pixels")
    picture = centre.clamp(-1, 1).reshape(1, 3, 1, 1).expand(1, 3, *size)
    mask = torch.ones_like(picture[:, :1]) if mask is None else mask
    return hint(picture, mask, "hue" if coloured else "colour", std)
