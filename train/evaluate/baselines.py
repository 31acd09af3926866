r"""What GM-ODE and GM-SDE are compared with: solvers of the mean velocity, and an ablation.

Euler is this package's own GM-ODE 1 with one substep (DDIM on this path). The others are diffusers' schedulers, taken
as they are: before a time shift their grid is uniform from 0.999 (UniPC: 1 - 1e-6) instead of 1. With flow sigmas the
grids of DEIS and SA-Solver end at their last sigma above 0, so that noise stays in the samples; here it ends at 0.001,
a sigma they can work with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Generator, Tensor

from gmflow_core import flow_sigmas, sample_gm_ode
from gmflow_core.denoiser import Denoiser
from gmflow_core.mixture import GaussianFactor, GaussianMixture
from gmflow_core.solver import SecondOrder, SolverHistory, correct

EULER = "Euler (DDIM)"
SCHEDULERS = {  # name -> class in diffusers and its settings
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "DEIS 2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "SDE-DPM++ 1 (DDPM)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "SDE-DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "SA-Solver": ("SASolverScheduler", {"predictor_order": 2, "corrector_order": 2}),
}
LAST_SIGMA = {"DEIS 2": 1e-3, "SA-Solver": 1e-3}  # where a scheduler has none of its own
STOCHASTIC = ("SDE-DPM++ 1 (DDPM)", "SDE-DPM++ 2M", "SA-Solver")
MISSING = (
    "diffusers is not installed, so these baselines are left out: " + ", ".join(SCHEDULERS)
    + '. For them: python -m pip install "diffusers>=0.35"'
)


def has_diffusers() -> bool:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def scheduler(name: str, shift: float = 1.0):
    """A diffusers scheduler on this path: x_t = (1 - sigma) x_0 + sigma e, the network predicts the velocity;
    on a grid of this time shift."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **settings
    )


def mean_velocity(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """u = (x - E[x_0]) / s, with the mean of the (guided) posterior: what a vanilla solver reads of a mixture.
    Like x."""
    return (x - denoiser(x, sigma).posterior.mean()) / sigma


def sample_scheduler(denoiser: Denoiser, x: Tensor, steps: int, name: str,
                     generator: Generator | list[Generator] | None = None, shift: float = 1.0) -> Tensor:
    """Samples from noise x (B,C,*S) in ``steps`` steps of a scheduler of ``SCHEDULERS``; ``generator``: one, or one an
    image."""
    solver = scheduler(name, shift)
    solver.set_timesteps(steps)
    if name in LAST_SIGMA:
        solver.sigmas[-1] = LAST_SIGMA[name]
    options = {"generator": generator} if name in STOCHASTIC else {}
    for sigma, t in zip(solver.sigmas.tolist(), solver.timesteps, strict=False):  # most have a last sigma of 0 as well
        x = solver.step(mean_velocity(denoiser, x, sigma), t, x, **options).prev_sample
    return x


def sample_euler(denoiser: Denoiser, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """x <- x + u (s_next - s) with the mean velocity u: GM-ODE 1 with one substep."""
    return sample_gm_ode(denoiser, x, flow_sigmas(steps, shift), order=1, substeps=1)


# ---- the ablation ------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Still:
    """A previous posterior whose mean stays what it was when it is re-anchored to the current (x, sigma)."""

    posterior: GaussianMixture

    def tilted_mean(self, factor: GaussianFactor) -> Tensor:
        return self.posterior.mean()


def sample_without_reanchoring(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, substeps: int, second_order: SecondOrder = SecondOrder(),
    shift: float = 1.0,
) -> Tensor:
    """GM-ODE 2 with the previous posterior's mean as it was for m_prev. Nothing else changes:
    substeps re-anchor as ever."""
    history = None
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        guided, step = denoiser(x, sigma), sigma - sigma_next
        posterior, _ = correct(guided, x, sigma, step, history, second_order)
        history = SolverHistory(Still(guided.posterior), x, sigma, step)
        corrected = replace(guided, posterior=posterior)
        grid = torch.tensor([sigma, sigma_next])
        x = sample_gm_ode(lambda x, sigma, known=corrected: known, x, grid, order=1, substeps=substeps, shift=shift)
    return x
