r"""GM-ODE and GM-SDE: few-step solvers that read a whole mixture from each network call (GMFlow).

A solver is a plain function of a denoiser, a noisy x and sigmas s_0 > ... > s_N >= 0. Randomness is
injected, history is a value. Shapes: B batch, C channels, ``*S`` space, ``*1`` ones in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Denoiser
from .guidance import Blend, Guided, biased_target, check_tilt, choose_target, mean_square, tilt_toward
from .mixture import Gaussian, Mixture
from .path import Reanchoring, add_noise, reanchor_factor, reverse_step
from .schedule import check_shift, substep_sigmas
from .spectral import color_noise, gaussian_to_mixture

SMALLEST = 1e-12  # of a sigma: float32 still holds 1 / sigma^2

NoiseSampler = Callable[[float, float], Tensor]  # (sigma, sigma_next) -> standard normal like x
Spectrum = Callable[[Gaussian], Tensor]          # Gaussian that the posterior was tilted toward -> log power (B,C,*S)


@dataclass(frozen=True, eq=False)
class SolverHistory:
    """What the second order keeps of a step: the posterior after guidance, before correction."""

    posterior: Mixture
    x: Tensor
    sigma: float
    h: float  # sigma - sigma_next

    @property
    def step(self) -> float:
        """``h`` by its older name."""
        return self.h


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What a callback sees of a network step, before x moves on."""

    index: int
    steps: int
    sigma: float
    sigma_next: float
    x: Tensor                    # (B,C,*S) the step's x_t
    guided: Guided               # before the second-order correction
    posterior: Mixture           # after it: what the step uses

    @property
    def denoised(self) -> Tensor:
        """The mean of the posterior in use, blended as the step will be: the current best guess of x_0."""
        mean, blend = self.posterior.mean(), self.guided.blend
        return mean if blend is None else blend(mean)


@dataclass(frozen=True, eq=False)
class Inpaint:
    """Known pixels, put back after every network step: (1 - s) x_0 + s noise where ``mask`` is 0.

    ``mask`` broadcasts to x: 1 where the solver paints, 0 where ``x_0`` is known, between is a blend. Not after
    every substep, for the blend would harden: pixels meet only in the network.
    """

    mask: Tensor
    x_0: Tensor
    noise: Tensor

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        known = add_noise(self.x_0, self.noise, sigma) if sigma > 0 else self.x_0
        return known + self.mask * (x - known)


@dataclass(frozen=True)
class SecondOrder:
    r"""Coefficients of the second-order correction, and its optional fixed-point steps.

    The difference of means is trusted by sqrt(max(0, 1 - v_c ((w c_b)^2 + c_a) / h_prev^2)).
    """

    c_a: float = 0.005
    c_b: float = 1.0
    correction_steps: int = 0
    tilt: str = "published"  # or "limited": no pixel's mean moves further than asked, see guidance.limited_target

    def __post_init__(self) -> None:
        check_tilt(self.tilt)
        for name in ("c_a", "c_b"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def correct(
    guided: Guided, x: Tensor, sigma: float, step: float, history: SolverHistory | None, options: SecondOrder
) -> tuple[Mixture, Gaussian]:
    r"""The posterior corrected to second order (GMFlow, second-order solvers), and the N(m', v') it was tilted toward:

        bias = k (m - m_prev) sqrt(max(0, 1 - v_c ((w c_b)^2 + c_a)/h_prev^2)) + guidance bias, k = h/(2 h_prev),

    where m is the guided mean and m_prev the mean of the previous posterior re-anchored to (x, sigma).
    One tilt of the conditional mixture carries guidance and correction together.
    """
    if history is None:
        return guided.posterior, guided.target
    mean = guided.posterior.mean()
    mean_prev = history.posterior.tilted_mean(reanchor_factor(history.x, history.sigma, x, sigma))
    doubt = guided.anchor.var * (((guided.scale * options.c_b) ** 2 + options.c_a) / history.h**2)
    difference = (mean - mean_prev) * ((1 - doubt).clamp(min=0).sqrt() * (step / (2 * history.h)))
    bias = difference if guided.bias is None else difference + guided.bias
    target = choose_target(guided.base, guided.anchor, biased_target(guided.anchor, bias), options.tilt)
    posterior = tilt_toward(guided.base, guided.anchor, target)
    if options.correction_steps:
        wanted = difference + mean - guided.anchor.mean
        bias = bias if options.tilt == "published" else target.mean - guided.anchor.mean
        posterior = match_mean(guided, posterior, bias, wanted, options.correction_steps)
    return posterior, target


def match_mean(guided: Guided, posterior: Mixture, bias: Tensor, wanted: Tensor, steps: int) -> Mixture:
    """Repeat the tilt with an adjusted bias until the posterior's mean differs by ``wanted`` from the anchor's.

    Each round moves the bias by the error left, damped per pixel by |bias| / |shift got| where that is below one.
    """
    bias = clip_bias(bias, guided.anchor)
    for _ in range(steps):
        got = posterior.mean() - guided.anchor.mean
        ratio = bias.norm(dim=1, keepdim=True) / got.norm(dim=1, keepdim=True)
        bias = bias - (got - wanted) * torch.nan_to_num(ratio, nan=1.0).clamp(max=1)
        posterior = tilt_toward(guided.base, guided.anchor, biased_target(guided.anchor, bias))
        bias = clip_bias(bias, guided.anchor)
    return posterior


def clip_bias(bias: Tensor, anchor: Gaussian) -> Tensor:
    r"""bias sqrt(min(1, v_c / mean(bias^2))): no stronger than the anchor's own std."""
    return bias * (mean_square(bias) / anchor.var).clamp(min=1).rsqrt()


def seen(x: Tensor, blend: Blend | None) -> Tensor:
    """Where a step's posterior belongs: at the solver's x, or at what the network saw instead."""
    return x if blend is None else blend.seen


def blended_step(x: Tensor, seen_next: Tensor, sigma: float, sigma_next: float, blend: Blend) -> Tensor:
    r"""One Euler step from x to the blended x_0, with x_0 what leads from ``seen`` to ``seen_next`` in one such step:

        x_next = r x + w (seen_next - r seen) + (1 - r) offset,  r = s_next / s.
    """
    ratio = sigma_next / sigma
    return ratio * x + blend.weight * (seen_next - ratio * blend.seen) + (1 - ratio) * blend.offset


def sample_gm_ode(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    substeps: int | Sequence[int] = 1,
    shift: float = 1.0,
    second_order: SecondOrder = SecondOrder(),
    temperature: float | Sequence[float] = 1.0,
    inpaint: Inpaint | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> Tensor:
    r"""Solve the probability-flow ODE from x (B,C,*S) at sigmas[0]; returns x at sigmas[-1].

    Between network calls the posterior is re-anchored analytically at each of ``substeps``, uniform
    in the raw time of ``shift``: x <- x + (x - x0_hat)/s (s_next - s) (GMFlow, GM-ODE). ``substeps`` and
    ``temperature`` (see :meth:`GaussianMixture.temperature`) are one number, or one for each network step.
    ``interrupt`` is called before every substep and may raise.
    """

    def advance(start: Tensor, blend: Blend | None, posterior: Mixture, target: Gaussian, step: int, sigma: float,
                sigma_next: float) -> Tensor:
        grid, x = substep_sigmas(sigma, sigma_next, int(counts[step]), shift), seen(start, blend)
        later = Reanchoring(posterior, x, sigma, grid[1:-1]) if len(grid) > 2 else None
        for i, (s, s_next) in enumerate(pairwise(grid)):
            if interrupt is not None:
                interrupt()
            x_0 = later.mean(i - 1, x) if i and later else posterior.mean()
            x = torch.lerp(x_0, x, s_next / s)  # = x + (x - x_0)/s (s_next - s)
        return x if blend is None else blended_step(start, x, sigma, sigma_next, blend)

    counts = per_step("substeps", substeps, len(sigmas) - 1)
    for count in counts:
        if int(count) != count or count < 1:
            raise ValueError(f"substeps must be a whole number >= 1, got {count}")
    check_shift(shift)
    return _solve(denoiser, x, sigmas, order, second_order, temperature, inpaint, callback, advance)


def sample_gm_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    spectrum: Spectrum | None = None,
    noise_sampler: NoiseSampler | None = None,
    second_order: SecondOrder = SecondOrder(),
    temperature: float | Sequence[float] = 1.0,
    inpaint: Inpaint | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> Tensor:
    r"""Solve the reverse SDE from x (B,C,*S) at sigmas[0]; returns x at sigmas[-1].

    Each step draws x0_hat from the posterior and x_next from q(x_next | x, x0_hat) (GMFlow, GM-SDE).
    ``noise_sampler`` is called exactly twice a step, first for x0_hat, then for the transition; the
    default draws from torch's global generator. ``spectrum`` colours the first draw. ``temperature``: as in
    :func:`sample_gm_ode`. ``interrupt`` is called before every step's draws and may raise.
    """
    if noise_sampler is None:
        noise_sampler = lambda sigma, sigma_next: torch.randn_like(x)  # noqa: E731

    def advance(x: Tensor, blend: Blend | None, posterior: Mixture, target: Gaussian, step: int, sigma: float,
                sigma_next: float) -> Tensor:
        if interrupt is not None:
            interrupt()
        z = noise_sampler(sigma, sigma_next)
        if spectrum is not None:
            z = color_noise(z, spectrum(target))
        x_0 = gaussian_to_mixture(posterior, z)
        if blend is not None:
            x_0 = blend(x_0)
        return reverse_step(x, x_0, noise_sampler(sigma, sigma_next), sigma, sigma_next)

    return _solve(denoiser, x, sigmas, order, second_order, temperature, inpaint, callback, advance)


def _solve(denoiser, x, sigmas, order, second_order, temperature, inpaint, callback, advance) -> Tensor:
    """The loop that both solvers share: denoise, correct, report, advance."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    grid = check_sigmas(sigmas)
    temperatures = per_step("temperature", temperature, len(grid) - 1)
    x = x.float() if x.dtype.itemsize < 4 else x  # mixtures know no half precision
    history = None
    if inpaint is not None:
        x = inpaint(x, grid[0])
    for i, (sigma, sigma_next) in enumerate(pairwise(grid)):
        step = sigma - sigma_next
        guided = denoiser(x, sigma)
        at = seen(x, guided.blend)
        posterior, target = correct(guided, at, sigma, step, history, second_order)
        posterior = posterior.temperature(temperatures[i])
        if callback is not None:
            callback(StepInfo(i, len(grid) - 1, sigma, sigma_next, x, guided, posterior))
        history = SolverHistory(guided.posterior, at, sigma, step) if order == 2 else None
        x = advance(x, guided.blend, posterior, target, i, sigma, sigma_next)
        if inpaint is not None:
            x = inpaint(x, sigma_next)
    return x


def per_step(name: str, value: float | Sequence[float], steps: int) -> Sequence[float]:
    """One number a step of a number for all of them, or the sequence itself; ValueError if it has another length."""
    if not isinstance(value, Sequence):
        return [value] * steps
    if len(value) != steps:
        raise ValueError(f"{name} must be one number or one for each of the {steps} steps, got {len(value)}")
    return value


def check_sigmas(sigmas: Tensor) -> list[float]:
    """The sigmas as floats, or ValueError: at least two, falling strictly in [0, 1], 0 or no less than SMALLEST."""
    grid = [float(s) for s in sigmas]
    if len(grid) < 2:
        raise ValueError(f"sigmas must hold at least two values (one step), got {grid}")
    if not all(a > b for a, b in pairwise(grid)) or grid[0] > 1 or grid[-1] < 0:
        raise ValueError(f"sigmas must fall strictly within [0, 1], got {grid}")
    if any(0 < sigma < SMALLEST for sigma in grid):
        raise ValueError(f"sigmas must be 0 or at least {SMALLEST:g}, got {min(s for s in grid if s > 0):g}")
    return grid
