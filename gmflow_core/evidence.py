r"""Evidence: likelihoods p(y | x_0) as factors of a pixel's mixture. What a sampler makes of them is in ``echo``.

Shapes: B batch (1 stands for all images), C channels, ``*S`` space (any number of axes), ``*1`` ones in its place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import GaussianFactor, axes_along
from .mixture import Mixture

ROUNDS, DAMPING = 4, 0.7  # of expectation propagation


class Evidence:
    """What is known of x_0. Evidence adds: ``first + second``."""

    @property
    def parts(self) -> tuple[Evidence, ...]:
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B,C,*S) of the images that it is about; B = 1 for all of a batch."""
        raise NotImplementedError

    def __add__(self, other: Evidence) -> EvidenceSum:
        return EvidenceSum(self.parts + other.parts)

    def factor(self, posterior: Mixture) -> GaussianFactor:
        """p(y | x_0) as a factor for every pixel of a posterior."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PixelEvidence(Evidence):
    r"""y = x_0 + N(0, I/precision) at every pixel: colours. lambda = precision, h = precision y.

    Where the precision is 0 nothing is known, whatever ``value`` says. Negative precisions take back what another part
    of a sum gives.
    """

    value: Tensor      # (B,C,*S) in units of x_0
    precision: Tensor  # (B,1,*S) or (B,1,*1): 1/s_y^2

    def __post_init__(self) -> None:
        _check_part("PixelEvidence", self.value, self.precision)

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(len(self.value), len(self.precision)), *self.value.shape[1:])

    def factor(self, posterior: Mixture | None = None) -> GaussianFactor:
        precision = self.precision.expand(torch.broadcast_shapes(self.precision.shape, self.value[:, :1].shape))
        return GaussianFactor(precision, precision * self.value)


@dataclass(frozen=True, eq=False)
class DirectionEvidence(Evidence):
    r"""y = d.x_0 + N(0, 1/precision) along one direction of the channels at every pixel: brightness, or with a negative
    precision beside :class:`PixelEvidence` everything but it. Lambda = precision d d^T, h = precision y d, |d| = 1.

    A grey picture b.x_0 of std s_y is ``DirectionEvidence(y/|b|, b/|b|, |b|^2/s_y^2)``.
    """

    value: Tensor      # (B,1,*S): y
    direction: Tensor  # (B,C,*S) or (B,C,*1), unit vectors: d
    precision: Tensor  # (B,1,*S) or (B,1,*1)

    def __post_init__(self) -> None:
        _check_part("DirectionEvidence", self.value, self.precision)
        if self.direction.ndim != self.value.ndim or not self.direction.isfinite().all():
            raise ValueError(f"DirectionEvidence: direction must be finite, (B,C,*S) beside a value "
                             f"{tuple(self.value.shape)}, got {tuple(self.direction.shape)}")
        if ((self.direction.norm(dim=1) - 1).abs() > 1e-4).any():
            raise ValueError("DirectionEvidence: directions must be unit vectors: divide by their length")

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(len(self.value), len(self.precision), len(self.direction)), self.direction.shape[1],
                *self.value.shape[2:])

    def factor(self, posterior: Mixture | None = None) -> GaussianFactor:
        ones = torch.ones_like(self.precision * self.value)                      # (B,1,*S)
        direction = self.direction * ones                                        # (B,C,*S)
        along = torch.zeros_like(direction)
        along[:, :1] = self.precision
        return GaussianFactor(along, self.precision * self.value * direction, axes_along(direction))


@dataclass(frozen=True, eq=False)
class BlockEvidence(Evidence):
    r"""y = the mean of x_0 over each block of ``block`` pixels along every axis of space, + N(0, std^2):
    a small picture.

    The sum of n independent mixtures has K^n components; expectation propagation fits one Gaussian site for each pixel
    and channel instead (Minka 2001). With one component it is exact.
    """

    value: Tensor  # (B,C,*S/block)
    block: int
    std: float

    def __post_init__(self) -> None:
        if self.value.ndim < 3 or not self.value.isfinite().all():
            raise ValueError(f"BlockEvidence: value must be finite, (B,C,*S/block), got {tuple(self.value.shape)}")
        if int(self.block) != self.block or self.block < 1:
            raise ValueError(f"BlockEvidence: block must be a whole number >= 1, got {self.block}")
        if not 0 < self.std < float("inf"):
            raise ValueError(f"BlockEvidence: std must be a number > 0, got {self.std}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.value.shape[:2], *(n * self.block for n in self.value.shape[2:]))

    def factor(self, posterior: Mixture) -> GaussianFactor:
        r"""The messages to the pixels after a few rounds: with n pixels in a block and sites N(tm_i, tv_i),

            lambda_i = 1/(sum_{j != i} tv_j + n^2 s_y^2),   h_i = lambda_i (n y - sum_{j != i} tm_j),

        and the sites are the tilted mixture's moments, divided by that message. Rounds after the first are damped.
        """
        mean, var = posterior.mean(), posterior.channel_var()
        n = self.block ** (mean.ndim - 2)
        target = self._spread(n * self.value.to(mean))
        precision = shift = torch.zeros_like(mean)
        site_mean, site_var = mean, var
        for i in range(ROUNDS):
            rest_mean, rest_var = (self._spread(self._sums(site)) - site for site in (site_mean, site_var))
            new = (rest_var + (n * self.std) ** 2).reciprocal()
            step = DAMPING if i else 1.0
            precision = torch.lerp(precision, new, step)
            shift = torch.lerp(shift, new * (target - rest_mean), step)
            if i + 1 < ROUNDS:
                tilted = posterior.tilt(GaussianFactor(precision, shift))
                inverse = tilted.channel_var().reciprocal()
                site_precision = inverse - precision
                sound = site_precision > 0
                updated = site_precision.where(sound, torch.ones_like(inverse)).reciprocal()
                site_mean = torch.where(sound, updated * (inverse * tilted.mean() - shift), site_mean)
                site_var = torch.where(sound, updated, site_var)
        return GaussianFactor(precision, shift)

    def _sums(self, x: Tensor) -> Tensor:
        """Sums over the blocks of x (B,C,*S): (B,C,*S/block)."""
        for axis in range(2, x.ndim):
            x = x.unflatten(axis, (-1, self.block)).sum(axis + 1)
        return x

    def _spread(self, blocks: Tensor) -> Tensor:
        """Every block's value (B,C,*S/block) at all of its pixels: (B,C,*S)."""
        for axis in range(2, blocks.ndim):
            blocks = blocks.repeat_interleave(self.block, dim=axis)
        return blocks


@dataclass(frozen=True, eq=False)
class EvidenceSum(Evidence):
    """All of its parts at once: their likelihoods multiply."""

    _parts: tuple[Evidence, ...]

    @property
    def parts(self) -> tuple[Evidence, ...]:
        return self._parts

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def factor(self, posterior: Mixture) -> GaussianFactor:
        return with_blocks(*split_parts(self), posterior)


# ---- helpers -----------------------------------------------------------------------------------

def split_parts(evidence: Evidence) -> tuple[GaussianFactor | None, tuple[BlockEvidence, ...]]:
    """The product of all parts that are factors whatever the posterior is, and the parts that ask it."""
    blocks = tuple(part for part in evidence.parts if isinstance(part, BlockEvidence))
    plain = [part.factor() for part in evidence.parts if isinstance(part, (PixelEvidence, DirectionEvidence))]
    return (functools.reduce(operator.add, plain) if plain else None), blocks


def with_blocks(plain: GaussianFactor | None, blocks: Sequence[BlockEvidence], posterior: Mixture) -> GaussianFactor:
    """``plain`` times the factors of the blocks, one after another,
    each for the posterior that knows the ones before."""
    total = plain
    for block in blocks:
        factor = block.factor(posterior if total is None else posterior.tilt(total))
        total = factor if total is None else total + factor
    if total is None:
        raise ValueError("evidence: a sum of no parts")
    return total


def _check_part(name: str, value: Tensor, precision: Tensor) -> None:
    """ValueError for tensors that are no evidence."""
    if value.ndim < 2 or not value.isfinite().all():
        raise ValueError(f"{name}: value must be finite and of shape (B,C,*S), got {tuple(value.shape)}")
    wanted = (1, *value.shape[2:])
    fits = precision.ndim == value.ndim and all(n in (1, m) for n, m in zip(precision.shape[1:], wanted, strict=True))
    if not fits or 1 not in (len(value), len(precision)) and len(value) != len(precision):
        raise ValueError(f"{name}: precision must be (B,1,*S) or (B,1,*1) beside a value {tuple(value.shape)}, "
                         f"got {tuple(precision.shape)}")
    if not precision.isfinite().all():
        raise ValueError(f"{name}: precision must be finite; a precision is 1 / std^2, and std > 0")
