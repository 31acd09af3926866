r"""How a denoiser answers for p(x_0 | x_t, y) without training: tilt, absorption and echo.

A Gaussian likelihood of pixels is one more tilt of the posterior. A mixture per pixel says nothing of how pixels hang
together, so a tilt moves the pixels that have evidence and no others. Two identities, exact for the joint posterior,
carry it further. *Absorption*: evidence lambda_0 that every pixel has is a lower noise level. *Echo*: a linear factor
exp(h.x_0) is a shift of the network's input; so the linear part of what is left goes in there, in one more call, and
the network itself combines the evidence of all pixels. Exact sampling it is not: the rest is tilted pixel by pixel.
Shapes: B batch, C channels, ``*S`` space, ``*1`` ones in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .evidence import BlockEvidence, DirectionEvidence, Evidence, PixelEvidence, split_parts, with_blocks
from .gaussian import GaussianFactor, solve
from .guidance import Guided, mean_square, unguided
from .mixture import Mixture, per_sample, space_axes

FIRST_SIGMA = 0.96  # pure noise hears no echo (a = 0): the network is asked here instead

Sigma = float | Tensor                              # a number, or (B,) where evidence makes images differ
Ask = Callable[[list[Tensor], Sigma], list[Mixture]]  # one x for all roles, or one for each -> every role's posterior


@dataclass(frozen=True)
class Conditioned:
    """Evidence and how it is used.

    ``propagate``: carry it to the pixels that have none by an echo, one more network call a step (with guidance two of
    them at once, as ever), while sigma > ``until``. ``limit``: how far an echo may shift the input of a pixel, in
    standard deviations of the noise; past it the network has never seen such inputs.
    """

    evidence: Evidence
    propagate: bool = True
    limit: float = 3.0
    until: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.evidence, Evidence):
            raise ValueError(f"evidence: got a {type(self.evidence).__name__}; expected PixelEvidence, "
                             "DirectionEvidence, BlockEvidence or a sum of them")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be a number > 0, got {self.limit}")
        if not 0 <= self.until <= 1:
            raise ValueError(f"until must be a sigma in [0, 1], got {self.until}")
        self._check_sum()

    @classmethod
    def of(cls, evidence: Evidence | Conditioned) -> Conditioned:
        """Evidence with the usual settings, or what has its own already."""
        return evidence if isinstance(evidence, Conditioned) else cls(evidence)

    def _check_sum(self) -> None:
        plain, _ = self._parts
        if plain is not None and (plain.precision < -1e-4 * plain.precision.abs().max()).any():
            raise ValueError("evidence: its parts take back more than they give: where precisions are negative, "
                             "their sum with the others' must be >= 0 along every direction")

    @cached_property
    def _parts(self) -> tuple[GaussianFactor | None, tuple[BlockEvidence, ...]]:
        return split_parts(self.evidence)

    @cached_property
    def says_nothing(self) -> bool:
        """Whether no pixel has any evidence."""
        plain, blocks = self._parts
        return not blocks and (plain is None or not bool(plain.precision.any()))

    # ---- what every pixel has --------------------------------------------------------------------

    @cached_property
    def uniform(self) -> PixelEvidence | None:
        """The part of the colours' evidence that all pixels of an image have, precision (B,1,*1);
        None if no image has any."""
        colours = [part.factor() for part in self.evidence.parts if isinstance(part, PixelEvidence)]
        if not colours:
            return None
        total = colours[0]
        for factor in colours[1:]:
            total = total + factor
        left = total.precision
        for part in self.evidence.parts:
            if isinstance(part, DirectionEvidence):
                left = left + part.precision.clamp(max=0)  # what a direction takes back was never there
        common = left.amin(space_axes(left, 1), keepdim=True).clamp(min=0)               # (B,1,*1)
        if not bool(common.any()):
            return None
        # Where there is no evidence in common there may be pixels without any: no value, and none is asked for.
        return PixelEvidence(torch.where(common > 0, total.shift / total.precision, 0.0), common)

    @cached_property
    def rest(self) -> GaussianFactor | None:
        """The factors of all parts that need no posterior, without ``uniform``."""
        plain, uniform = self._parts[0], self.uniform
        return plain if plain is None or uniform is None else plain - uniform.factor()

    @cached_property
    def known(self) -> Tensor | None:
        """(B,1,*S): which pixels ``rest`` speaks of; None: all of them, by a small picture."""
        rest, blocks = self.rest, self._parts[1]
        return None if blocks or rest is None else (rest.precision > 0).any(1, keepdim=True)

    # ---- for a batch -----------------------------------------------------------------------------

    def check(self, x: Tensor) -> None:
        """ValueError for evidence of another batch, other channels or another size than x (B,C,*S)."""
        for part in self.evidence.parts:
            b, *shape = part.shape
            if shape != [*x.shape[1:]]:
                raise ValueError(f"evidence: it is about images of shape {tuple(shape)} (channels, height, width), "
                                 f"and {tuple(x.shape[1:])} are sampled")
            if b not in (1, len(x)):
                raise ValueError(f"evidence: it is about {b} images, and {len(x)} are sampled; "
                                 "give one for all, or one for each")

    def factor(self, posterior: Mixture) -> GaussianFactor:
        """What is left after absorption, for every pixel of a posterior."""
        like = posterior.mean()
        rest = None if self.rest is None else _like(self.rest, like)
        return with_blocks(rest, self._parts[1], posterior)


def condition(denoiser: Callable[[Tensor, Any], Guided], evidence: Evidence | Conditioned) -> Callable[
    [Tensor, float], Guided,
]:
    """A denoiser that answers for p(x_0 | x_t, evidence): every solver, order and callback takes it as any other.

    It asks ``denoiser`` once a step, with an echo twice, and conditions its posterior whatever guidance made it;
    evidence before guidance is stronger (``GMDenoiser(..., evidence=...)``). Where images of a batch have different
    evidence, sigma is a (B,) tensor.
    """
    given = Conditioned.of(evidence)

    def conditioned(x: Tensor, sigma: float) -> Guided:
        if given.says_nothing:
            return denoiser(x, sigma)
        posterior, = posteriors_given(given, lambda xs, s: [denoiser(seen, s).posterior for seen in xs], x, sigma)
        return unguided(posterior)

    return conditioned


def posteriors_given(given: Conditioned, ask: Ask, x: Tensor, sigma: float) -> list[Mixture]:
    """q(x_0 | x_t, evidence) of every role that ``ask`` answers for, relative to (x, sigma) as any other posterior."""
    given.check(x)
    if given.says_nothing:
        return ask([x], sigma)
    seen, s = absorb(given.uniform, x, sigma)
    heard = _heard(given, x)                                                    # (B,1,*S) or (): residual evidence
    if not bool(heard.any()):
        return ask([seen], _sigma(s))
    if not (given.propagate and sigma > given.until):
        return [posterior.tilt(given.factor(posterior)) for posterior in ask([seen], _sigma(s))]
    images = heard.expand_as(x[:, :1]).flatten(1).any(1).tolist()
    s = [min(value, FIRST_SIGMA) if hears else value for value, hears in zip(s, images, strict=True)]
    level = per_sample(seen.new_tensor(s), seen)
    echoes = [Echo.of(posterior, given, heard, level) for posterior in ask([seen], _sigma(s))]
    heard_again = ask([seen + e.delta for e in echoes], _sigma(s))
    return [echo.answer(given, again) for echo, again in zip(echoes, heard_again, strict=True)]


def absorb(uniform: PixelEvidence | None, x: Tensor, sigma: float) -> tuple[Tensor, list[float]]:
    r"""(x', s') of every image with q(x_0 | x', s') = q(x_0 | x_t, evidence lambda_0, y that all its pixels have):

        a'^2/s'^2 = a^2/s^2 + lambda_0,   x' = (s'^2/a') (a x_t/s^2 + lambda_0 y)
    """
    if uniform is None:
        return x, [sigma] * len(x)
    a = 1 - sigma
    precisions = uniform.precision.flatten().expand(len(x)).tolist()
    lower = [1 / (1 + math.sqrt((a / sigma) ** 2 + p)) if p > 0 else sigma for p in precisions]
    factor, s = _like(uniform.factor(), x), per_sample(x.new_tensor(lower), x)
    moved = (s.square() / (1 - s)) * (x * (a / sigma**2) + factor.shift)
    return torch.where(factor.precision > 0, moved, x), lower


@dataclass(frozen=True, eq=False)
class Echo:
    """What the first call of a step leaves for the second."""

    mean: Tensor    # (B,C,*S) of the first posterior
    linear: Tensor  # (B,C,*S) kappa h: what goes in through the input
    delta: Tensor   # (B,C,*S) its shift of the input, kappa (s^2/a) h
    share: Tensor   # (B,1,*1) kappa in (0, 1]: how much of h the limit leaves
    heard: Tensor   # (B,1,*S): which pixels have evidence

    @classmethod
    def of(cls, posterior: Mixture, given: Conditioned, heard: Tensor, sigma: Tensor) -> Echo:
        r"""h = V^-1 (mean of the posterior tilted by the evidence - m), V the pixel's covariance; q(x_0 | x_t + delta)
        = q(x_0 | x_t) exp(h.x_0)/Z with delta = (s^2/a) h; kappa = min(1, limit s / max_pixels rms(delta))."""
        mean = posterior.mean()
        moved = posterior.tilted_mean(given.factor(posterior)) - mean
        h = solve(posterior.pixel_covariance(), moved) * heard
        delta = h * torch.where(sigma < 1, sigma.square() / (1 - sigma), 0)  # who hears none may be at pure noise
        farthest = delta.square().mean(1, keepdim=True).sqrt()
        farthest = farthest.amax(space_axes(farthest, 1), keepdim=True)                 # (B,1,*1)
        share = (given.limit * sigma / farthest).clamp(max=1)
        return cls(mean, share * h, share * delta, share, heard)

    def answer(self, given: Conditioned, again: Mixture) -> Mixture:
        """The second posterior, tilted by what of the evidence did not go in through the input."""
        rest = again.tilt(_linear(-self.linear))
        posterior = rest.tilt(given.factor(rest))
        if bool((self.share < 1).any()):
            posterior = posterior.tilt(_linear(self.extrapolation(again)))
        return posterior

    def extrapolation(self, again: Mixture) -> Tensor:
        r"""h_j = V'^-1 (1/kappa - 1)(m' - m) at the pixels without evidence: what the limit withheld, continued in a
        straight line; the change of the mean is limited to sqrt(V') over the image."""
        covariance = again.pixel_covariance()
        bias = (1 / self.share - 1) * (again.mean() - self.mean)
        var = covariance.diagonal(dim1=1, dim2=2).flatten(1).mean(1)                     # (B,)
        bias = bias * (mean_square(bias) / per_sample(var, bias)).clamp(min=1).rsqrt()
        return solve(covariance, bias) * ~self.heard


def _heard(given: Conditioned, x: Tensor) -> Tensor:
    known = given.known
    return torch.ones_like(x[:, :1], dtype=torch.bool) if known is None else known.to(x.device)


def _sigma(values: list[float]) -> Sigma:
    """One number where the images agree."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.float64)


def _linear(shift: Tensor) -> GaussianFactor:
    return GaussianFactor(torch.zeros_like(shift[:, :1]), shift)


def _like(factor: GaussianFactor, x: Tensor) -> GaussianFactor:
    """On x's device, in its dtype, for its batch."""
    place = lambda t: t.to(x).expand(len(x), *t.shape[1:])  # noqa: E731
    axes = None if factor.axes is None else place(factor.axes)
    return GaussianFactor(place(factor.precision), place(factor.shift), axes)
