"""Gaussian Mixture Flow Matching: the mathematics, the networks and the solvers (arXiv 2504.05304)."""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .denoiser import GMDenoiser
from .echo import Conditioned, condition
from .evidence import BlockEvidence, DirectionEvidence, PixelEvidence
from .guidance import Guided, guide_cfg, guide_probabilistic, probabilistic_guidance, unguided
from .mixture import Gaussian, GaussianFactor, GaussianMixture, Mixture
from .model import GMMLP, GMDiT, GMDiTConfig, GMMLPConfig, SpectrumConfig, SpectrumMLP
from .objective import mean_loss, mixture_nll, spectral_loss, transition_loss
from .path import add_noise, reanchor, reverse_transition, velocity_to_posterior
from .schedule import flow_sigmas
from .solver import Inpaint, SecondOrder, SolverHistory, StepInfo, sample_gm_ode, sample_gm_sde
from .spectral import gaussian_to_mixture, mixture_to_gaussian

__version__ = "0.2.0"

__all__ = [
    "BlockEvidence", "Checkpoint", "CheckpointError", "Conditioned", "DirectionEvidence", "GMDenoiser", "GMDiT",
    "GMDiTConfig", "GMMLP", "GMMLPConfig", "Gaussian", "GaussianFactor", "GaussianMixture", "Guided", "Inpaint",
    "Mixture", "PixelEvidence", "SecondOrder", "SolverHistory", "SpectrumConfig", "SpectrumMLP", "StepInfo",
    "add_noise", "condition", "flow_sigmas", "gaussian_to_mixture", "guide_cfg", "guide_probabilistic",
    "load_checkpoint", "mean_loss", "mixture_nll", "mixture_to_gaussian", "probabilistic_guidance", "reanchor",
    "reverse_transition", "sample_gm_ode", "sample_gm_sde", "save_checkpoint", "spectral_loss", "transition_loss",
    "unguided", "velocity_to_posterior",
]
