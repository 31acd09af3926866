"""One step of one image of a trace, ready to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..mixture import GaussianMixture, Mixture
from ..pictures import colour_bar, heat
from .beliefs import hypotheses, mean_weights, rank
from .statistics import check_count, first_regions
from .tiles import tile, tile_size
from .trace import Trace, TraceStep, pick

ARRANGEMENTS = ("aligned", "ranked", "raw")

Decode = Callable[[Tensor], Tensor]


def arranged(mixture: Mixture, arrangement: str, count: int, centres: Tensor | None = None) -> GaussianMixture:
    """At most ``count`` components, comparable over the image (aligned), by weight per pixel (ranked) or as they are.

    ``centres``: the hypotheses of the trajectory, for ``aligned``; None for the mixture's own.
    """
    if arrangement not in ARRANGEMENTS:
        raise ValueError(f"order must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
    count = min(count, mixture.components)
    if arrangement == "aligned":
        return hypotheses(mixture, count, centres)
    mixture = rank(mixture) if arrangement == "ranked" else mixture
    return GaussianMixture(mixture.means[:, :count], mixture.log_weights[:, :count], mixture.log_std)


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that a view may draw: one step of one image, and the trace around it."""

    trace: Trace
    image: int
    number: int                   # of the step, from 0
    step: TraceStep
    arrangement: str
    count: int
    decode: Decode
    pixel: tuple[int, int]        # (x, y) in the latent
    steady: bool = False          # colour scales of all steps at once, for an animation

    @property
    def title(self) -> str:
        last = len(self.trace.steps) - 1
        return f"Step {self.number}{f' (0 to {last})' * (last > 0)}, sigma {self.step.sigma:.3f}"

    @cached_property
    def mean(self) -> Tensor:
        return self.decode(self.step.corrected.mean())

    @cached_property
    def steps(self) -> list[TraceStep]:
        """All steps of the image."""
        return [pick(self.trace, i, self.image) for i in range(len(self.trace.steps))]

    @cached_property
    def centres(self) -> Tensor | None:
        return first_regions(self.trace, self.image, self.count) if self.arrangement == "aligned" else None

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The mixture that the step used, in order and cut to size."""
        return self.arranged(self.step)

    def arranged(self, step: TraceStep) -> GaussianMixture:
        return arranged(step.corrected, self.arrangement, self.count, self.centres)

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width)"""
        height, width = self.step.x.shape[-2:]
        return height, width

    @cached_property
    def size(self) -> tuple[int, int]:
        return tile_size(self.latent, self.mean.shape[-2:])

    def tile(self, image: Tensor):
        return tile(image, self.size)

    def bar(self, top: float, unit: str, beyond: bool = False):
        return colour_bar(0, top, unit, self.size[1], beyond=beyond)

    def maps(self, unit: str, *values: Callable[[TraceStep], Tensor | None], top: float | None = None) -> tuple:
        """Tiles of a step's maps (1,H,W) on one scale, and their colour bar.
        The scale ends at ``top``, or as :meth:`scale` has it."""
        top, beyond = (top, False) if top is not None else self.scale(*values)
        found = [value(self.step) for value in values]  # what is shown has them; another step may not
        return *(self.tile(heat(v, 0, top)) for v in found if v is not None), self.bar(top, unit, beyond)

    def scale(self, *values: Callable[[TraceStep], Tensor | None]) -> tuple[float, bool]:
        """The largest of a step's values; if a few are far above the rest, where 99.5 % of them end, and True."""
        found = [value(step) for value in values for step in (self.steps if self.steady else [self.step])]
        flat = torch.cat([v.flatten() for v in found if v is not None])
        largest, most = float(flat.max()), float(flat.kthvalue(math.ceil(0.995 * len(flat))).values)
        beyond = largest > 1.5 * most > 0
        return (most if beyond else largest) or 1.0, beyond

    @property
    def note(self) -> str:
        """What the components of this panel are."""
        shown, all_ = self.mixture.components, self.step.corrected.components
        if all_ == 1:
            return ""
        if self.arrangement == "aligned":
            many = f"{shown} hypotheses" if shown > 1 else "one hypothesis"
            return (f"The {all_} components of a pixel in {many}: clusters of the first step's means, "
                    "the same at every step.")
        how = ("by falling weight: 1 is the heaviest everywhere" if self.arrangement == "ranked"
               else "as the network numbers them")
        if shown == all_:
            return f"The {all_} components of each pixel {how}."
        rest = 100 * (1 - float(mean_weights(self.mixture).sum()))
        return f"{shown} of the {all_} components of each pixel {how}; the others hold {rest:.1f} % of the weight."


def look(
    trace: Trace, step: int, image: int, arrangement: str, count: int, decode: Decode,
    pixel: tuple[int, int] | None = None,
    steady: bool = False,
) -> Scene:
    """The scene of a step and an image; ValueError if there is none. ``pixel`` is the latent's middle if None."""
    if arrangement not in ARRANGEMENTS:
        raise ValueError(f"order must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
    check_count(count)
    chosen = pick(trace, step, image)
    height, width = chosen.x.shape[-2:]
    pixel = (width // 2, height // 2) if pixel is None else pixel
    return Scene(trace, image, step % len(trace.steps), chosen, arrangement, count, checked(decode), pixel, steady)


def checked(decode: Decode) -> Decode:
    """``decode`` whose pictures are looked at before they are drawn: ValueError for what is no picture of its input."""
    def decoded(x: Tensor) -> Tensor:
        pictures = decode(x)
        wrong = not isinstance(pictures, Tensor) or pictures.ndim != 4 or len(pictures) != len(x)
        if wrong or pictures.shape[2] * x.shape[3] != pictures.shape[3] * x.shape[2]:
            got = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
            raise ValueError(f"decode: got {got} for {tuple(x.shape)}; pictures (N,3,H',W') are expected, "
                             "one each and of the same proportions")
        return pictures

    return decoded
