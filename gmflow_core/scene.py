"""One step of one image of a trace, ready to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .inspect import hypotheses, mean_weights, rank
from .mixture import GaussianMixture
from .pictures import colour_bar
from .tiles import tile, tile_size
from .trace import Trace, TraceStep, first_regions, pick

ORDERS = ("aligned", "ranked", "raw")

Decode = Callable[[Tensor], Tensor]


def ordered(mixture: GaussianMixture, order: str, count: int, centres: Tensor | None = None) -> GaussianMixture:
    """At most ``count`` components, comparable over the image (aligned), by weight per pixel (ranked) or as they are.

    ``centres``: the hypotheses of the trajectory, for ``aligned``; None for the mixture's own.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    count = min(count, mixture.components)
    if order == "aligned":
        return hypotheses(mixture, count, centres)
    mixture = rank(mixture) if order == "ranked" else mixture
    return GaussianMixture(mixture.means[:, :count], mixture.log_weights[:, :count], mixture.log_std)


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that a view may draw: one step of one image, and the trace around it."""

    trace: Trace
    image: int
    number: int                   # of the step, from 0
    step: TraceStep
    order: str
    count: int
    decode: Decode
    pixel: tuple[int, int]        # (x, y) in the latent

    @property
    def title(self) -> str:
        return f"Step {self.number + 1} of {len(self.trace.steps)}, sigma {self.step.sigma:.3f}"

    @cached_property
    def mean(self) -> Tensor:
        return self.decode(self.step.corrected.mean())

    @cached_property
    def steps(self) -> list[TraceStep]:
        """All steps of the image."""
        return [pick(self.trace, i, self.image) for i in range(len(self.trace.steps))]

    @cached_property
    def centres(self) -> Tensor | None:
        return first_regions(self.trace, self.image, self.count) if self.order == "aligned" else None

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The mixture that the step used, in order and cut to size."""
        return self.arranged(self.step)

    def arranged(self, step: TraceStep) -> GaussianMixture:
        return ordered(step.corrected, self.order, self.count, self.centres)

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width)"""
        return tuple(self.step.x.shape[-2:])

    @cached_property
    def size(self) -> tuple[int, int]:
        return tile_size(self.latent, self.mean.shape[-2:])

    def tile(self, image: Tensor):
        return tile(image, self.size)

    def bar(self, top: float, unit: str):
        return colour_bar(0, top, unit, self.size[1])

    @property
    def note(self) -> str:
        """What the components of this panel are."""
        shown, all_ = self.mixture.components, self.step.corrected.components
        if all_ == 1:
            return ""
        if self.order == "aligned":
            return f"The {all_} components of a pixel in {shown} hypotheses: clusters of the first step's means, the same at every step."
        if shown == all_:
            return ""
        which = f"The {shown} heaviest of {all_} components at each pixel" if self.order == "ranked" else f"Components 1 to {shown} of {all_}"
        return f"{which}; the others hold {100 * (1 - float(mean_weights(self.mixture).sum())):.1f} % of the weight."


def look(
    trace: Trace, step: int, image: int, order: str, count: int, decode: Decode, pixel: tuple[int, int] | None = None,
) -> Scene:
    """The scene of a step and an image; ValueError if there is none. ``pixel`` is the latent's middle if None."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    chosen = pick(trace, step, image)
    height, width = chosen.x.shape[-2:]
    pixel = (width // 2, height // 2) if pixel is None else pixel
    return Scene(trace, image, step % len(trace.steps), chosen, order, count, decode, pixel)
