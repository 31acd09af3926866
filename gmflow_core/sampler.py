"""One way to sample: a solver's settings as a value, and the one place that chooses between the solvers.

Shapes: B batch, C channels, ``*S`` space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .denoiser import Denoiser
from .schedule import TOTAL_SUBSTEPS, default_substeps, substeps_by_length
from .solver import Inpaint, NoiseSampler, SecondOrder, Spectrum, StepInfo, sample_gm_ode, sample_gm_sde

SOLVERS = {"gm-ode": "GM-ODE", "gm-sde": "GM-SDE"}  # name -> title
# What command line and nodes choose, by the measurements in docs/overshoot.md;
# the functions' own default is "published".
SECOND_ORDER_TILT = GUIDANCE_TILT = "limited"
RECIPES = ("gmflow", "piflow")                      # what a substeps or temperature of 0 stands for


@dataclass(frozen=True)
class SamplerOptions:
    """A solver and its settings; each solver reads what concerns it. ValueError for an unknown solver or recipe.

    ``recipe`` is the published way of sampling: "gmflow" takes ceil(total_substeps / steps) in every step and
    temperature 1; "piflow", of text-to-image adapters, takes substeps by the step's length, and no temperature in the
    step to 0.
    """

    solver: str = "gm-ode"                       # a key of SOLVERS
    order: int = 2
    substeps: int = 0                            # GM-ODE: in each step; 0 is the recipe's share of the total
    total_substeps: int = TOTAL_SUBSTEPS         # GM-ODE: of all steps together
    spectral: bool = True                        # GM-SDE: colour the noise, where there is a spectrum
    second_order: SecondOrder = SecondOrder()
    temperature: float = 1.0                     # 0 is the recipe's
    shift: float = 1.0                           # GM-ODE: the time shift in whose raw time substeps are uniform
    recipe: str = "gmflow"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")

    @property
    def title(self) -> str:
        """The solver and its order, as the paper writes them."""
        return f"{SOLVERS[self.solver]} {self.order}"


USUAL = SamplerOptions(second_order=SecondOrder(tilt=SECOND_ORDER_TILT))  # as nodes and command line sample


def temperatures(sigmas: Sequence[float], temperature: float = 0.0) -> list[float]:
    r"""pi-Flow's temperature of each of N steps: ``temperature``, or min(1, 0.1 (N - 1)) where that is 0;
    1 in the step to sigma 0.

    With one step alone it is 1.
    """
    steps = len(sigmas) - 1
    temperature = temperature or min(1.0, 0.1 * (steps - 1)) or 1.0
    return [temperature if sigma_next > 0 else 1.0 for sigma_next in sigmas[1:]]


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
    grid = [float(sigma) for sigma in sigmas]
    if options.recipe == "piflow":
        temperature = temperatures(grid, options.temperature)
        substeps = options.substeps or substeps_by_length(grid, options.shift, options.total_substeps)
    else:
        temperature = options.temperature or 1.0
        substeps = options.substeps or default_substeps(len(sigmas) - 1, options.total_substeps)
    common = {
        "order": options.order, "second_order": options.second_order, "temperature": temperature,
        "inpaint": inpaint, "callback": callback, "interrupt": interrupt,
    }
    if options.solver == "gm-ode":
        return sample_gm_ode(denoiser, x, sigmas, substeps=substeps, shift=options.shift, **common)
    spectrum = spectrum if options.spectral else None
    return sample_gm_sde(denoiser, x, sigmas, spectrum=spectrum, noise_sampler=noise_sampler, **common)
