r"""Classifier guidance of mixtures: probabilistic (the method's own) and vanilla CFG (the ablation).

Both take the conditional and the unconditional x_0 posterior and return a :class:`Guided` value:
the guided posterior together with what a second-order solver needs to correct it.
Shapes: B batch, K components, C channels, ``*S`` space, ``*1`` ones in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import Gaussian, GaussianFactor
from .mixture import Mixture, space_axes

PUBLISHED_SCALE = 0.45  # of probabilistic guidance, in the published examples
TILTS = ("published", "limited")


@dataclass(frozen=True, eq=False)
class Blend:
    """What stands between a solver and its network for one step: the network saw another x,
    and x_0 <- weight x_0 + offset.

    A noise mask m, as hosts treat it: ``seen`` is m x + (1 - m) x_known, the weight m and the offset (1 - m) x_0 known.
    """

    weight: Tensor | float  # broadcasts to x; 0 where x_0 is known
    offset: Tensor          # (B,C,*S)
    seen: Tensor            # (B,C,*S): the posterior is one of q(x_0 | seen)

    def __call__(self, x_0: Tensor) -> Tensor:
        return self.weight * x_0 + self.offset


@dataclass(frozen=True, eq=False)
class Guided:
    """A guided x_0 posterior, and what it was made from.

    ``base`` tilted by ``target`` / ``anchor`` gives ``posterior``: anchor = N(m_c, v_c) with one variance
    per sample, target = N(m_c + bias, v_c (1 - scale^2)). Without guidance ``base`` is ``posterior``,
    ``target`` is ``anchor`` and ``bias`` is None.
    """

    posterior: Mixture
    base: Mixture
    anchor: Gaussian              # mean (B,C,*S), var (B,1,*1)
    target: Gaussian              # likewise
    bias: Tensor | None = None    # (B,C,*S)
    scale: float = 0.0            # w
    blend: Blend | None = None    # what the step makes of x_0, once in all


def moment_anchor(posterior: Mixture) -> Gaussian:
    """The moment-matched Gaussian of a posterior with its variance averaged over space: var (B,1,*1)."""
    gaussian = posterior.moments()
    axes = space_axes(gaussian.var, 2)
    return Gaussian(gaussian.mean, gaussian.var.mean(axes, keepdim=True) if axes else gaussian.var)


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over channels and space, per sample: (B,1,*1)."""
    return x.square().mean(space_axes(x, 1), keepdim=True)


def unguided(posterior: Mixture) -> Guided:
    """No guidance: the posterior as it is."""
    anchor = moment_anchor(posterior)
    return Guided(posterior, posterior, anchor, anchor)


def biased_target(anchor: Gaussian, bias: Tensor) -> Gaussian:
    r"""N(m', v') with m' = m_c + bias and v' = v_c (1 - mean(bias^2)/v_c).

    A bias stronger than v_c is rescaled to it: m' = m_c + bias sqrt(min(1, v_c/mean(bias^2))), and
    v' stays at least 1e-6 v_c (the authors' floor: a product of Gaussians needs v' > 0).
    """
    power = mean_square(bias) / anchor.var                                      # (B,1,*1)
    bias = bias * power.clamp(min=1).rsqrt()
    return Gaussian(anchor.mean + bias, anchor.var * (1 - power).clamp(min=1e-6))


def limited_target(base: Mixture, anchor: Gaussian, target: Gaussian) -> Gaussian:
    r"""The target with each pixel's bias b = m' - m_c divided by max(1, g), g = b^T Sigma b / (v_c |b|^2); v' stays.

    A tilt toward a target moves the mean of a pixel of covariance Sigma by Sigma b / v_c to first order: g is how much
    too far along b. Where the pixel is its anchor, Sigma = v_c I, g is one. Where b is zero, it stays zero.
    """
    bias = target.mean - anchor.mean
    gain = base.variance_along(bias) / (anchor.var * bias.square().sum(1, keepdim=True))     # (B,1,*S)
    return Gaussian(anchor.mean + bias / torch.nan_to_num(gain, nan=1.0).clamp(min=1), target.var)


def choose_target(base: Mixture, anchor: Gaussian, target: Gaussian, tilt: str) -> Gaussian:
    """What a tilt of this name goes toward: the target itself ("published") or :func:`limited_target` ("limited")."""
    return target if tilt == "published" else limited_target(base, anchor, target)


def check_tilt(tilt: str) -> None:
    """ValueError for a name that is none of TILTS."""
    if tilt not in TILTS:
        raise ValueError(f"tilt must be one of {', '.join(TILTS)}, got {tilt!r}")


def tilt_toward(base: Mixture, anchor: Gaussian, target: Gaussian) -> Mixture:
    """Tilt ``base`` by target / anchor: were base its anchor, it would become the target."""
    precision, undo = target.var.reciprocal(), anchor.var.reciprocal()
    shift = torch.addcmul(target.mean * precision, anchor.mean, undo, value=-1)
    return base.tilt(GaussianFactor(precision - undo, shift))


def guidance_bias(cond: Gaussian, uncond_mean: Tensor, scale: float, orthogonal: float = 1.0) -> Tensor:
    r"""bias = w sqrt(v_c / mean(d^2)) d, with d = m_c - m_u - o (<d, m_c>/<m_c, m_c>) m_c (GMFlow, probabilistic
    guidance; projection as in APG).

    Where the two means agree exactly there is no direction to go and the bias is zero. (B,C,*S)
    """
    axes = space_axes(cond.mean, 1)
    d = cond.mean - uncond_mean
    if orthogonal:
        along = (d * cond.mean).sum(axes, keepdim=True) / cond.mean.square().sum(axes, keepdim=True)
        d = torch.addcmul(d, torch.nan_to_num(along, posinf=0, neginf=0), cond.mean, value=-orthogonal)
    strength = (cond.var / mean_square(d)).sqrt()
    return d * torch.nan_to_num(scale * strength, posinf=0)


def guide_probabilistic(
    cond: Mixture, uncond: Mixture, scale: float, orthogonal: float = 1.0, tilt: str = "published"
) -> Guided:
    """Probabilistic guidance with scale w in [0, 1) (not a CFG scale), a projection strength from 0 to 1
    and a tilt of TILTS."""
    check_guidance(scale, orthogonal)
    check_tilt(tilt)
    if scale == 0:
        return unguided(cond)
    anchor = moment_anchor(cond)
    bias = guidance_bias(anchor, uncond.mean(), scale, orthogonal)
    # Not biased_target: v' is v_c (1 - w^2) even where the bias vanishes because the two means agree.
    target = choose_target(cond, anchor, Gaussian(anchor.mean + bias, anchor.var * (1 - scale**2)), tilt)
    return Guided(tilt_toward(cond, anchor, target), cond, anchor, target, bias, scale)


def guide_cfg(cond: Mixture, uncond: Mixture, scale: float) -> Guided:
    r"""Vanilla classifier-free guidance: mean_k <- mean_k + (scale - 1)(m_c - m_u);
    scale >= 1, 1 is none (Ho & Salimans)."""
    shift = (scale - 1) * (cond.mean() - uncond.mean())
    return unguided(cond.shifted(shift))


def probabilistic_guidance(
    cond: Mixture, uncond: Mixture, scale: float, orthogonal: float = 1.0
) -> Mixture:
    """The guided x_0 posterior of :func:`guide_probabilistic` alone: mixture, mixture -> mixture."""
    return guide_probabilistic(cond, uncond, scale, orthogonal).posterior


def check_guidance(scale: float, orthogonal: float = 1.0) -> None:
    """Raise ValueError for a probabilistic scale outside [0, 1) or a projection outside [0, 1]."""
    if not 0 <= scale < 1:
        raise ValueError(
            f"guidance must be in [0, 1), got {scale}: probabilistic guidance is not a CFG scale; "
            f"{PUBLISHED_SCALE} is the published default, 0.02 to 0.75 are good"
        )
    if not 0 <= orthogonal <= 1:
        raise ValueError(f"orthogonal must be in [0, 1], got {orthogonal}")
