r"""What GM-ODE and GM-SDE are compared with on 2D data: solvers of the mean velocity, and an ablation.

Euler is this package's own GM-ODE 1 with one substep (DDIM on this path). The others are diffusers' schedulers, taken as
they are: their grid is uniform from 0.999 (UniPC: 1 - 1e-6) instead of 1. diffusers' DEIS is not among them: with flow
sigmas its grid ends at its last sigma above 0, so that noise stays in the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from gmflow_core import Guided, flow_sigmas, sample_gm_ode
from gmflow_core.denoiser import Denoiser
from gmflow_core.mixture import GaussianFactor, GaussianMixture

EULER = "Euler (DDIM)"
SCHEDULERS = {  # name -> class in diffusers and its settings
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "SDE-DPM++ 1 (DDPM)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "SDE-DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
}
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


def scheduler(name: str):
    """A diffusers scheduler on this path: x_t = (1 - sigma) x_0 + sigma e, the network predicts the velocity, no shift."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **settings)


def mean_velocity(model: nn.Module, x: Tensor, sigma: float) -> Tensor:
    """The mean of the predicted velocity mixture, (B,2): what a vanilla solver reads of a network."""
    return model.mixture(model(x, torch.full((x.shape[0],), sigma, device=x.device))).mean()


def sample_scheduler(model: nn.Module, x: Tensor, steps: int, name: str, generator: Generator | None = None) -> Tensor:
    """Points (B,2) from noise x (B,2) in ``steps`` network calls of a scheduler of ``SCHEDULERS``."""
    solver = scheduler(name)
    solver.set_timesteps(steps)
    options = {"generator": generator} if name.startswith("SDE") else {}
    for sigma, t in zip(solver.sigmas.tolist(), solver.timesteps):
        x = solver.step(mean_velocity(model, x, sigma), t, x, **options).prev_sample
    return x


def sample_euler(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
    """x <- x + u (s_next - s) with the mean velocity u: GM-ODE 1 with one substep."""
    return sample_gm_ode(denoiser, x, flow_sigmas(steps), order=1, substeps=1)


# ---- the ablation ------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Unmoved(GaussianMixture):
    """A posterior whose mean does not move when it is re-anchored as the previous step's."""

    def tilted_mean(self, factor: GaussianFactor) -> Tensor:
        return self.mean()


def without_reanchoring(denoiser: Denoiser) -> Denoiser:
    """The ablation of the second order: m_prev is the previous posterior's mean as it was, instead of its mean
    re-anchored to the current (x, sigma). Nothing else changes: substeps re-anchor as before."""

    def ablated(x: Tensor, sigma: float) -> Guided:
        guided = denoiser(x, sigma)
        p = guided.posterior
        return replace(guided, posterior=Unmoved(p.means, p.log_weights, p.log_std))

    return ablated
