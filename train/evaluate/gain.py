r"""``python -m train.evaluate.gain CHECKPOINT``: how far a second-order correction moves the mean,
over how far it was asked to.

At every step of a run of GM-ODE 2 the tilt is made twice from the same state, published and limited
(docs/overshoot.md). The gain is sum <moved, b> / sum |b|^2 over channels and pixels of all images, with b the bias
asked for; 1 is right.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core import Checkpoint, GMDenoiser, SecondOrder, SolverHistory, StepInfo, flow_sigmas, load_checkpoint
from gmflow_core.guidance import TILTS
from gmflow_core.noise import ImageNoise
from gmflow_core.sampler import SamplerOptions, sample
from gmflow_core.solver import correct


def gain_of(moved: Tensor, bias: Tensor) -> float:
    """sum <moved, b> / sum |b|^2 of two tensors (B,C,*S)."""
    return ((moved * bias).sum() / bias.square().sum()).item()


@dataclass
class GainRecorder:
    """A sampler's callback: (sigma, first-order gain, real gain of each tilt) of every step that has a step before
    it."""

    rows: list[tuple[float, float, dict[str, float]]] = field(default_factory=list)
    history: SolverHistory | None = None

    def __call__(self, info: StepInfo) -> None:
        step, guided = info.sigma - info.sigma_next, info.guided
        if self.history is not None:
            published = correct(guided, info.x, info.sigma, step, self.history, SecondOrder())
            bias = published[1].mean - guided.anchor.mean                        # (B,C,*S)
            gains = {}
            for tilt in TILTS:
                posterior, _ = correct(guided, info.x, info.sigma, step, self.history, SecondOrder(tilt=tilt))
                gains[tilt] = gain_of(posterior.mean() - guided.anchor.mean, bias)
            first_order = (guided.base.variance_along(bias) / guided.anchor.var).sum() / bias.square().sum()
            self.rows.append((info.sigma, first_order.item(), gains))
        self.history = SolverHistory(guided.posterior, info.x, info.sigma, step)


@torch.no_grad()
def measure_gains(checkpoint: Checkpoint, steps: int, count: int, guidance: float, seed: int,
                  tilt: str) -> GainRecorder:
    """The gains along a run of ``count`` images, their classes in turn, with this tilt of the second order."""
    config, recorder = checkpoint.config, GainRecorder()
    noise = ImageNoise(seed, range(count), (config.in_channels, config.sample_size, config.sample_size), "cpu")
    denoiser = GMDenoiser(checkpoint.model, torch.arange(count) % config.num_classes, guidance)
    options = SamplerOptions("gm-ode", second_order=SecondOrder(tilt=tilt))
    sample(denoiser, noise(), flow_sigmas(steps), options, callback=recorder)
    return recorder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate.gain",
                                     description=__doc__.split("\n")[0].split(": ")[1])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--guidance", type=float, default=0.0, help="probabilistic scale (default 0)")
    parser.add_argument("--tilt", choices=TILTS, default="published", help="of the run along which it is measured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    found = measure_gains(load_checkpoint(args.checkpoint), args.steps, args.images, args.guidance,
                          args.seed, args.tilt)
    print("| sigma | first order | published | limited |\n|---|---|---|---|")
    for sigma, first_order, gains in found.rows:
        print(f"| {sigma:.3f} | {first_order:.2f} | {gains['published']:.2f} | {gains['limited']:.2f} |")


if __name__ == "__main__":
    main()
