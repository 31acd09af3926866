"""Settings of a sampler as values, and samples drawn with one: what the evaluations compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gmflow_core import Checkpoint, GMDenoiser, SecondOrder, flow_sigmas
from gmflow_core.denoiser import Denoiser
from gmflow_core.noise import ImageNoise
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT, SOLVERS as SAMPLERS, SamplerOptions, sample
from gmflow_core.schedule import default_substeps
from gmflow_core.solver import NoiseSampler

from .baselines import EULER, SCHEDULERS, sample_euler, sample_scheduler, sample_without_reanchoring

GM_SOLVERS = {f"{solver}{order}": SamplerOptions(solver, order) for solver in SAMPLERS for order in (1, 2)}
BASELINES = {
    "euler": EULER, "ddpm": "SDE-DPM++ 1 (DDPM)", "dpm++2m": "DPM++ 2M", "sde-dpm++2m": "SDE-DPM++ 2M",
    "deis": "DEIS 2", "unipc": "UniPC 2", "sa": "SA-Solver",
}
# The name on a command line -> the name in a table.
SOLVERS = {name: options.title for name, options in GM_SOLVERS.items()} | BASELINES
assert set(BASELINES.values()) == {EULER, *SCHEDULERS}


@dataclass(frozen=True)
class Setting:
    """How to sample. From ``method`` on: ablations. Each baseline reads the mean of the guided mixture alone."""

    solver: str                      # a key of SOLVERS
    steps: int                       # network steps; guidance asks twice at each
    guidance: float = 0.0            # probabilistic in [0, 1), or a CFG scale >= 1
    method: str = "probabilistic"    # or "cfg"
    corrections: int = 0             # correction steps of the second order
    substeps: int = 0                # of GM-ODE; 0 is the paper's ceil(128 / steps)
    spectral: bool = True            # GM-SDE colours its noise, if the checkpoint has a spectrum
    orthogonal: float = 1.0          # projection of probabilistic guidance
    reanchored: bool = True          # GM-ODE 2 re-anchors the previous posterior
    tilt: str = SECOND_ORDER_TILT    # of the second order
    guidance_tilt: str = GUIDANCE_TILT
    shift: float = 1.0               # time shift of the grid

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if not self.reanchored and (self.solver != "gm-ode2" or self.corrections):
            raise ValueError("only gm-ode2 without corrections can be run without re-anchoring")

    @property
    def guided(self) -> bool:
        return self.guidance > (1 if self.method == "cfg" else 0)

    @property
    def second_order(self) -> bool:
        return self.solver in ("gm-ode2", "gm-sde2")

    @property
    def title(self) -> str:
        """The solver and what is unusual about it."""
        counts = (self.corrections, "correction"), (self.substeps, "substep")
        notes = [f"{count} {noun}{'s' * (count > 1)}" for count, noun in counts if count]
        notes += ["white noise"] * (not self.spectral) + ["no re-anchoring"] * (not self.reanchored)
        notes += [f"{self.tilt} tilt"] * (self.second_order and self.tilt != SECOND_ORDER_TILT)
        notes += [f"{self.guidance_tilt} guidance"] * (self.guided and self.guidance_tilt != GUIDANCE_TILT)
        notes += [f"shift {self.shift:g}"] * (self.shift != 1)
        notes += ["no projection"] * (self.orthogonal == 0)
        notes += [f"projection {self.orthogonal:g}"] * (0 < self.orthogonal < 1)
        return ", ".join([SOLVERS[self.solver], *notes])

    @property
    def guidance_title(self) -> str:
        return "none" if not self.guided else f"{'CFG' if self.method == 'cfg' else 'probabilistic'} {self.guidance:g}"

    @classmethod
    def of_row(cls, row: dict) -> Setting:
        """The setting of a row of results; those of before there was a choice of tilt are of the published one."""
        older = {"tilt": "published", "guidance_tilt": "published"}
        return cls(**older | {name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def to_dict(self) -> dict:
        return asdict(self)

    def wanted(self) -> dict:
        """What a row of these samples has to say: nothing of a tilt where nothing is tilted."""
        done = {"tilt": self.second_order, "guidance_tilt": self.guided}
        return {name: value for name, value in asdict(self).items() if done.get(name, True)}


def solve(setting: Setting, denoiser: Denoiser, x: Tensor, spectrum=None,
          generator: torch.Generator | list[torch.Generator] | None = None,
          noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Samples from noise x (B,C,*S). Stochastic baselines draw from ``generator``, on the CPU, or from one for each
    image; GM-SDE from ``noise_sampler``, else from the generator."""
    solver, steps = setting.solver, setting.steps
    if solver == "euler":
        return sample_euler(denoiser, x, steps, setting.shift)
    if solver in BASELINES:
        return sample_scheduler(denoiser, x, steps, BASELINES[solver], generator, setting.shift)
    sigmas = flow_sigmas(steps, setting.shift)
    second_order = SecondOrder(correction_steps=setting.corrections, tilt=setting.tilt)
    if not setting.reanchored:
        substeps = setting.substeps or default_substeps(steps)
        return sample_without_reanchoring(denoiser, x, sigmas, substeps, second_order, setting.shift)
    options = replace(
        GM_SOLVERS[solver], substeps=setting.substeps, spectral=setting.spectral,
        second_order=second_order, shift=setting.shift,
    )
    if noise_sampler is None:
        noise_sampler = lambda s, t: torch.randn(x.shape, generator=generator).to(x)  # noqa: E731
    return sample(denoiser, x, sigmas, options, spectrum=spectrum, noise_sampler=noise_sampler)


@torch.no_grad()
def sample_images(checkpoint: Checkpoint, setting: Setting, labels: Tensor, seed: int, first: int = 0) -> Tensor:
    """One sample (B,C,H,W) for each label (B,), on the model's device.

    The noise of image number ``first`` + b depends on that number and the seed alone: any batches give the same images,
    and every setting starts from the same noise.
    """
    model, config = checkpoint.model, checkpoint.config
    device = next(model.parameters()).device
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = ImageNoise(seed, range(first, first + len(labels)), shape, device)
    denoiser = GMDenoiser(
        model, labels.to(device), setting.guidance, setting.orthogonal, method=setting.method,
        tilt=setting.guidance_tilt
    )
    return solve(setting, denoiser, noise(), checkpoint.spectrum, noise.streams, noise)
