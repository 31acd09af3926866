"""One way to sample: a solver's settings as a value, and the one place that chooses between the solvers.

Shapes: B batch, C channels, ``*S`` space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .denoiser import Denoiser
from .schedule import default_substeps
from .solver import Inpaint, NoiseSampler, SecondOrder, Spectrum, StepInfo, sample_gm_ode, sample_gm_sde

SOLVERS = {"gm-ode": "GM-ODE", "gm-sde": "GM-SDE"}  # name -> title


@dataclass(frozen=True)
class SamplerOptions:
    """A solver and its settings; each solver reads what concerns it. ValueError for an unknown solver."""

    solver: str = "gm-ode"                       # a key of SOLVERS
    order: int = 2
    substeps: int = 0                            # GM-ODE: in each step; 0 is ceil(128 / steps), as published
    spectral: bool = True                        # GM-SDE: colour the noise, where there is a spectrum
    second_order: SecondOrder = SecondOrder()
    temperature: float = 1.0
    shift: float = 1.0                           # GM-ODE: the time shift in whose raw time substeps are uniform

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")

    @property
    def title(self) -> str:
        """The solver and its order, as the paper writes them."""
        return f"{SOLVERS[self.solver]} {self.order}"


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    options: SamplerOptions = SamplerOptions(),
    *,
    spectrum: Spectrum | None = None,
    noise_sampler: NoiseSampler | None = None,
    inpaint: Inpaint | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> Tensor:
    """Run the solver of ``options`` from x (B,C,*S) at sigmas[0]; returns x at sigmas[-1].

    ``spectrum`` and ``noise_sampler`` are GM-SDE's, see :func:`sample_gm_sde`; ``interrupt`` is called before every
    substep or draw and may raise.
    """
    common = {
        "order": options.order, "second_order": options.second_order, "temperature": options.temperature,
        "inpaint": inpaint, "callback": callback, "interrupt": interrupt,
    }
    if options.solver == "gm-ode":
        substeps = options.substeps or default_substeps(len(sigmas) - 1)
        return sample_gm_ode(denoiser, x, sigmas, substeps=substeps, shift=options.shift, **common)
    spectrum = spectrum if options.spectral else None
    return sample_gm_sde(denoiser, x, sigmas, spectrum=spectrum, noise_sampler=noise_sampler, **common)
