r"""What the evaluation of evidence shows of real digits, and what else is known of them.

Shapes: B batch, H W space; images are RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core import BlockEvidence
from gmflow_core.evidence import Evidence
from gmflow_core.hints import hint

from ..data.digits import INKS, Digits

COLOUR_STD, SMALL_STD = 0.05, 0.02
BLOCK = 4


@dataclass(frozen=True, eq=False)
class Truth:
    """Real digits, a class in turn, each in an ink of its own."""

    images: Tensor
    labels: Tensor
    inks: Tensor

    @classmethod
    def choose(cls, data: Digits, count: int, generator: torch.Generator) -> Truth:
        labels = torch.arange(count) % 10
        members = [(data.labels == label).nonzero().flatten() for label in range(10)]
        index = torch.cat([
            members[label][torch.randint(len(members[label]), (1,), generator=generator)] for label in labels.tolist()
        ])
        inks = torch.randint(len(INKS), (count,), generator=generator)
        return cls(data.ink(data.grey[index], inks), labels, inks)


@dataclass(frozen=True, eq=False)
class Task:
    """What is shown of true images (B,3,H,W)."""

    evidence: Evidence
    observe: Callable[[Tensor], Tensor]         # the linear operator A: images to what is seen of them
    adjoint: Callable[[Tensor], Tensor]         # A^T
    project: Callable[[Tensor, Tensor], Tensor]  # (x, noisy truth) -> x that shows what the noisy truth shows
    seen: Tensor                                # (B,1,H,W): 1 where a pixel's colour is known; 0 nowhere
    std: float
    scale: float = 1.0                          # A A^T = scale I


def masked(truth: Tensor, mask: Tensor) -> Task:
    """The colours of a mask's pixels."""
    keep = lambda x: x * mask  # noqa: E731
    project = lambda x, known: torch.lerp(x, known, mask)  # noqa: E731
    return Task(hint(truth, mask, "colour", COLOUR_STD), keep, keep, project, mask, COLOUR_STD)


def one_pixel(truth: Tensor, generator: torch.Generator) -> Task:
    """One bright pixel's colour."""
    strength = truth.amax(1).flatten(1)                                         # (B,H W)
    bright = (strength + 1 >= 0.9 * (strength.amax(1, keepdim=True) + 1)).float()
    place = torch.multinomial(bright, 1, generator=generator)
    return masked(truth, torch.zeros_like(bright).scatter(1, place, 1.0).reshape(truth[:, :1].shape))


def half(truth: Tensor, generator: torch.Generator) -> Task:
    """The left half."""
    mask = torch.zeros_like(truth[:, :1])
    mask[..., : truth.shape[-1] // 2] = 1
    return masked(truth, mask)


def hole(truth: Tensor, generator: torch.Generator) -> Task:
    """All but 8 x 8 pixels in the middle."""
    mask, side = torch.ones_like(truth[:, :1]), truth.shape[-1]
    mask[..., side // 4 : -side // 4, side // 4 : -side // 4] = 0
    return masked(truth, mask)


def pixels10(truth: Tensor, generator: torch.Generator) -> Task:
    """A tenth of the pixels, at random."""
    return masked(truth, (torch.rand(truth[:, :1].shape, generator=generator) < 0.1).float())


def grey(truth: Tensor, generator: torch.Generator) -> Task:
    """The mean of the channels, everywhere."""
    observe = lambda x: x.mean(1, keepdim=True)  # noqa: E731
    adjoint = lambda y: y.expand(-1, 3, -1, -1) / 3  # noqa: E731
    project = lambda x, known: x + observe(known - x)  # noqa: E731
    evidence = hint(truth, torch.ones_like(truth[:, :1]), "brightness", COLOUR_STD)
    return Task(evidence, observe, adjoint, project, torch.zeros_like(truth[:, :1]), COLOUR_STD, 1 / 3)


def small4(truth: Tensor, generator: torch.Generator) -> Task:
    """The means of 4 x 4 blocks."""
    observe = lambda x: F.avg_pool2d(x, BLOCK)  # noqa: E731
    spread = lambda y: y.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)  # noqa: E731
    project = lambda x, known: x + spread(observe(known - x))  # noqa: E731
    evidence = BlockEvidence(observe(truth), BLOCK, SMALL_STD)
    return Task(evidence, observe, lambda y: spread(y) / BLOCK**2, project, torch.zeros_like(truth[:, :1]), SMALL_STD,
                1 / BLOCK**2)


TASKS = {"hint": one_pixel, "half": half, "hole": hole, "pixels10": pixels10, "grey": grey, "small4": small4}
