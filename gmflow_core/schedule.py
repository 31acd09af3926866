r"""The clock: sigma in [0, 1], its time shift, sampling grids and the training-time distribution.

``sigma`` is the share of noise in x_t = (1 - sigma) x_0 + sigma e and the only clock of this
package. "Raw" time t in [0, 1] is the clock before the shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", Tensor, float)

TOTAL_SUBSTEPS = 128            # of GM-ODE, of all steps together, as published
MOST_SUBSTEPS = 1024            # that a checkpoint may ask for
SHIFTS = 1e-3, 1e3              # the least and the largest time shift that one may ask for


def shift_time(t: Time, shift: float) -> Time:
    r"""sigma = m t / (1 + (m - 1) t): raw time to sigma under time shift m > 0 (Esser et al. 2024)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(sigma: Time, shift: float) -> Time:
    r"""t = sigma / (m - (m - 1) sigma): the inverse of :func:`shift_time`."""
    return sigma / (shift - (shift - 1) * sigma)


def check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a finite number > 0 (1 leaves time as it is), got {shift}")


def flow_sigmas(steps: int, shift: float = 1.0, denoise: float = 1.0, final_step: float = 1.0) -> Tensor:
    r"""The default grid, s_i = shift(1 - i/(N - 1 + f)), i < N, and s_N = 0: sigmas (steps + 1,) float32, falling to 0.

    ``final_step`` f is the raw length of the last step over that of the others: 1 for GMFlow's uniform grid, 0.5
    for text-to-image adapters (pi-Flow). ``denoise`` < 1 keeps the last ``steps`` intervals of a grid of
    ``steps / denoise``, as ComfyUI's schedulers do: sampling then starts from a partly noised image.
    """
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be in (0, 1], got {denoise}")
    if not 0 < final_step < math.inf:
        raise ValueError(f"final_step must be > 0 (1 is a last step as long as the others), got {final_step}")
    check_shift(shift)
    total = max(int(steps), int(steps / denoise))
    even = torch.linspace(1, 0, total + 1, dtype=torch.float64)                     # 1 - i/N
    raw = even - (1 - even) * ((1 - final_step) / (total - 1 + final_step))         # 1 - i/(N - 1 + f)
    raw[-1] = 0
    return shift_time(raw[-(int(steps) + 1) :], shift).float()


def default_substeps(steps: int, total: int = TOTAL_SUBSTEPS) -> int:
    """ceil(total / N): 4 at 32 steps and 16 at 8, as published."""
    return -(-total // steps)


def substeps_by_length(sigmas: Sequence[float], shift: float = 1.0, total: int = TOTAL_SUBSTEPS) -> list[int]:
    r"""max(1, ceil(total d)) for each step of raw length d: substeps of one length over the whole path (pi-Flow).

    Sigmas in single precision leave d uncertain by about 1e-7, and no such error may add a substep.
    """
    raw = [unshift_time(float(sigma), shift) for sigma in sigmas]
    return [max(1, math.ceil(total * (t - t_next) - 1e-3)) for t, t_next in pairwise(raw)]


def substep_sigmas(sigma: float, sigma_next: float, substeps: int, shift: float = 1.0) -> list[float]:
    """``substeps`` + 1 sigmas from ``sigma`` to ``sigma_next``, uniform in raw time, ends exact."""
    t, t_next = unshift_time(sigma, shift), unshift_time(sigma_next, shift)
    inner = [shift_time(t + (t_next - t) * i / substeps, shift) for i in range(1, substeps)]
    return [sigma, *inner, sigma_next]


def training_sigmas(draws: Tensor, distribution: str, shift: float = 1.0, mean: float = 0.0,
                    std: float = 1.0) -> Tensor:
    r"""Map injected draws (B,) to training sigmas (B,) in [1e-7, 1].

    ``logit-normal``: sigma = shift(sigmoid(mean + std z)), z ~ N(0, 1) (images);
    ``uniform``: sigma = shift(1 - u), u ~ U[0, 1) (2D data). The floor is 1e-4 of a timestep of 1000.
    """
    if distribution == "logit-normal":
        raw = torch.sigmoid(mean + std * draws)
    elif distribution == "uniform":
        raw = 1 - draws
    else:
        raise ValueError(f"time distribution must be 'logit-normal' or 'uniform', got {distribution!r}")
    check_shift(shift)
    return shift_time(raw, shift).clamp(min=1e-7, max=1.0)
