"""GM_EVIDENCE: pictures that say something of an image whose size is not known yet, without a host.

Shapes: N pictures (1 stands for all images of a batch, others repeat), C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gmflow_core.echo import Conditioned
from ..gmflow_core.evidence import Evidence
from ..gmflow_core.hints import hint, in_colour, small_picture
from .adapter_info import AdapterInfo
from .model_info import ModelInfo

EVIDENCE = "gmflow_evidence"   # in model_options: a Placed
Info = ModelInfo | AdapterInfo
Enter = Callable[[Tensor], Tensor]  # a host's latent, as saved, to the space of the mixture


@dataclass(frozen=True, eq=False)
class Hint:
    """What a mask's pixels of a picture say; ``latents`` (N,C,h,w) if a VAE has encoded it."""

    image: Tensor           # (N,3,H,W) in [-1, 1]
    mask: Tensor            # (N,1,H,W) in [0, 1]
    kind: str
    std: float
    latents: Tensor | None = None

    def check(self, info: Info) -> None:
        _three_channels(info)
        if self.latents is None and not paints_rgb(info):
            raise ValueError("evidence: this model paints latents, and the hint is a picture; connect the model's "
                             "vae to GMFlow Hint")
        if self.latents is not None and paints_rgb(info):
            raise ValueError("evidence: this model paints RGB pixels; leave vae of GMFlow Hint open")
        if self.latents is not None and isinstance(info, AdapterInfo):
            (channels, axes), got = info.latent, (self.latents.shape[1], self.latents.ndim - 2)
            if got != (channels, axes):
                raise ValueError(f"evidence: the encoded hint has {got[0]} channels on {got[1]} axes, and "
                                 f"{info.family.name} paints {channels} on {axes}; encode it with this model's vae")

    def at(self, x: Tensor, enter: Enter) -> Evidence:
        size = (x.shape[-2], x.shape[-1])
        if self.latents is not None:
            picture = enter(self.latents)
            if picture.shape[1:] != x.shape[1:]:
                raise ValueError(f"evidence: the encoded hint is of shape {tuple(picture.shape[1:])}, the latent of "
                                 f"{tuple(x.shape[1:])}; "
                                 "make the picture as large as the image, and encode it with this model's vae")
            return hint(repeated(picture, len(x)), repeated(least(self.mask, size), len(x)), self.kind, self.std)
        picture, mask = fitted(self.image, self.mask, size)
        return hint(repeated(picture, len(x)), repeated(mask, len(x)), self.kind, self.std)


@dataclass(frozen=True, eq=False)
class SmallPicture:
    """The image, made smaller by a whole number."""

    image: Tensor  # (N,3,h,w) in [-1, 1]
    std: float

    def check(self, info: Info) -> None:
        _rgb_only(info, "a small picture")

    def at(self, x: Tensor, enter: Enter) -> Evidence:
        return small_picture(repeated(self.image, len(x)), (x.shape[-2], x.shape[-1]), self.std)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The colour of a hypothesis, for all pixels or for its own."""

    centre: Tensor       # (C,)
    std: float
    what: str            # its number, for errors
    mask: Tensor | None  # (1,1,H,W), where it has weight, 1 at most; None is everywhere

    def check(self, info: Info) -> None:
        _rgb_only(info, "a chosen hypothesis")
        if self.mask is None:
            in_colour(self.centre, (1, 1), self.std, self.what)

    def at(self, x: Tensor, enter: Enter) -> Evidence:
        size = (x.shape[-2], x.shape[-1])
        mask = None if self.mask is None else F.interpolate(self.mask, size, mode="area")
        return in_colour(self.centre, size, self.std, self.what, mask)


@dataclass(frozen=True, eq=False)
class EvidenceSource:
    """What a GM_EVIDENCE link carries."""

    parts: tuple[Hint | SmallPicture | Chosen, ...]

    def check(self, info: Info) -> None:
        """ValueError for a model that it can say nothing of."""
        for part in self.parts:
            part.check(info)

    def at(self, x: Tensor, enter: Enter) -> Evidence:
        """Evidence about x (B,C,H,W)."""
        return reduce(add, [part.at(x, enter) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Placed:
    """Evidence in a MODEL, and how it is used there; worked out once for images of one size."""

    source: EvidenceSource
    propagate: bool = True
    end_percent: float = 1.0
    limit: float = 3.0
    _known: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.end_percent <= 1:
            raise ValueError(f"end_percent must be in [0, 1], got {self.end_percent}")

    def given(self, x: Tensor, model, info: Info) -> Conditioned:
        """For x (B,C,H,W) in the space of the mixture; ``model`` is the host's."""
        until = float(model.model_sampling.percent_to_sigma(self.end_percent))
        key = (*x.shape, until)
        if key not in self._known:
            enter = lambda latent: info.enter(model.process_latent_in(latent))  # noqa: E731
            found, until = self.source.at(x.cpu(), enter), min(max(until, 0.0), 1.0)
            self._known[key] = Conditioned(found, self.propagate, self.limit, until)
        return self._known[key]


def evidence_in(model_options: dict) -> Placed | None:
    """The evidence in a MODEL's options."""
    return model_options.get(EVIDENCE)


# ---- pictures ----------------------------------------------------------------------------------

def paints_rgb(info: Info) -> bool:
    return isinstance(info, ModelInfo) and info.latent_space.kind == "rgb" and info.config.in_channels == 3


def _three_channels(info: Info) -> None:
    if isinstance(info, ModelInfo) and info.latent_space.kind == "rgb" and info.config.in_channels != 3:
        raise ValueError(f"evidence: it is made of RGB pictures, and this model paints pixels of "
                         f"{info.config.in_channels} channels; evidence about those is for Python (PixelEvidence)")


def _rgb_only(info: Info, what: str) -> None:
    _three_channels(info)
    if not paints_rgb(info):
        raise ValueError(f"evidence: {what} is about RGB pixels, and this model paints latents, which are no "
                         f"colours; use a hint of kind colour")


def from_images(images: Tensor) -> Tensor:
    """The host's IMAGE (N,H,W,3 or 4) in [0, 1] as (N,3,H,W) in [-1, 1]."""
    if not images.isfinite().all():
        raise ValueError("image: it holds NaN or infinite values; the node that made it failed")
    return 2 * images[..., :3].movedim(-1, 1).float() - 1


def mask_for(image: Tensor, mask: Tensor | None) -> Tensor:
    """The host's MASK (N,H,W), (H,W) or None, which is the whole picture, beside pictures (N,3,H,W): (N,1,H,W)."""
    if mask is None:
        return torch.ones_like(image[:1, :1])
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not mask.isfinite().all():
        raise ValueError("mask: it holds NaN or infinite values; the node that made it failed")
    if mask.shape[-2:] != image.shape[-2:]:
        if not bool(mask.any()):
            raise ValueError("mask: nothing is painted: it is 0 everywhere (an image without transparency brings "
                             "such a mask)")
        raise ValueError(f"mask: {mask.shape[-1]} x {mask.shape[-2]} pixels (width x height) beside an image of "
                         f"{image.shape[-1]} x {image.shape[-2]}; give both one size")
    if not bool((mask > 0).any()):
        raise ValueError("mask: nothing is painted: it is 0 everywhere")
    return mask.clamp(0, 1)


def fitted(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Picture and mask at a size (H, W), averaged over areas: what is not painted lends no colour.
    ValueError for another shape."""
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image, mask
    if abs(height * size[1] - width * size[0]) > max(height, width):  # off by more than a pixel
        raise ValueError(f"image: {width} x {height} pixels (width x height) for an image of {size[1]} x {size[0]}; "
                         "it is resized, but not to another shape: crop it first")
    n = max(len(image), len(mask))
    image, mask = repeated(image, n), repeated(mask, n)
    share = F.interpolate(mask, size, mode="area")
    colour = F.interpolate(image * mask, size, mode="area")
    return torch.where(share > 0, colour / share.clamp(min=1e-12), F.interpolate(image, size, mode="area")), share


def least(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask at the size of latents: what is known of all of a latent pixel's image pixels."""
    return -F.adaptive_max_pool2d(-mask, size)


def repeated(pictures: Tensor, batch: int) -> Tensor:
    """One picture stays one, for all; more are repeated, or cut, to a batch, as the host does it."""
    return pictures if len(pictures) == 1 else pictures[torch.arange(batch) % len(pictures)]
