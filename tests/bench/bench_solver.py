r"""Time one solver step without its network: ``python tests/bench/bench_solver.py [--compile]``.

The network is replaced by stored velocity mixtures; everything else of a second-order guided step
runs: velocity -> posterior, probabilistic guidance, the correction from the previous step, the
substeps or the draws. Wall times drift with the machine's load, so each time is divided by that of a
calibration load (100 times ``(x * x).exp().sum()``, x as large as the means) run just before and
just after; only these ratios compare between runs. Not a test: nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gmflow_core as gm  # noqa: E402
from gmflow_core import path  # noqa: E402

SHAPE = (4, 8, 4, 32, 32)  # B, K, C, H, W
GUIDANCE, SHIFT = 0.45, 3.2

# name, the largest ratio that we accept, the authors' ratio on such a machine
CASES = (
    ("GM-ODE 2, 16 substeps", 0.37, 0.75),
    ("GM-ODE 2, 4 substeps", None, 0.32),
    ("GM-ODE 2, 1 substep", None, 0.22),
    ("GM-SDE 2, spectrum", 0.77, 2.3),
    ("GM-SDE 2, no spectrum", None, 0.39),
)


def make_inputs(seed: int = 0) -> dict[str, Tensor]:
    """Network outputs for [cond; uncond]: components scattered about a centre per pixel, std about exp(-0.7)."""
    b, k, c, h, w = SHAPE
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    inputs = {
        "means": normal(2 * b, 1, c, h, w) + 0.6 * normal(2 * b, k, c, h, w),
        "logweights": normal(2 * b, k, 1, h, w).log_softmax(1),
        "logstds": -0.7 + 0.12 * normal(2 * b, 1, 1, 1, 1),
        "noise": normal(b, c, h, w),
    }
    widths = (2, 64, 8, c * h * w)
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        inputs[f"spectrum.mlp.{2 * i}.weight"] = normal(n_out, n_in) * (2 / (n_in + n_out)) ** 0.5
        inputs[f"spectrum.mlp.{2 * i}.bias"] = 0.1 * normal(n_out)
    return inputs


class StoredDenoiser:
    """A guided denoiser whose network always answers with the same mixtures. Notes when it was asked."""

    def __init__(self, inputs: dict[str, Tensor]):
        stored = [inputs[name].chunk(2) for name in ("means", "logweights", "logstds")]
        self.cond, self.uncond = (gm.GaussianMixture(*tensors) for tensors in zip(*stored, strict=True))
        self.asked: list[float] = []

    def __call__(self, x: Tensor, sigma: float) -> gm.Guided:
        self.asked.append(time.perf_counter())
        # New ones: they keep their moments.
        answers = (velocity.map(lambda t: t) for velocity in (self.cond, self.uncond))
        cond, uncond = (gm.velocity_to_posterior(velocity, x, sigma) for velocity in answers)
        return gm.guide_probabilistic(cond, uncond, GUIDANCE)


def calibrate() -> float:
    """ms of the calibration load."""
    x = torch.linspace(-1, 1, torch.Size(SHAPE).numel()).reshape(SHAPE)
    start = time.perf_counter()
    for _ in range(100):
        (x * x).exp().sum()
    return (time.perf_counter() - start) * 1e3


def make_case(name: str, denoiser: StoredDenoiser, inputs: dict[str, Tensor], steps: int):
    """The named case as a function that samples once."""
    noise, sigmas = inputs["noise"], gm.flow_sigmas(steps, SHIFT)
    if name.startswith("GM-ODE"):
        substeps = int(name.split()[2])
        return lambda: gm.sample_gm_ode(denoiser, noise, sigmas, substeps=substeps, shift=SHIFT)
    spectrum = None
    if name == "GM-SDE 2, spectrum":
        spectrum = gm.SpectrumMLP(gm.SpectrumConfig(SHAPE[2:], (64, 8)))
        prefix = "spectrum."
        spectrum.load_state_dict({k[len(prefix) :]: v for k, v in inputs.items() if k.startswith(prefix)})
    return lambda: gm.sample_gm_sde(denoiser, noise, sigmas, spectrum=spectrum)


def time_step(sample, denoiser: StoredDenoiser) -> float:
    """Median ms from one network call to the next, over the steps of a run that have a history."""
    denoiser.asked.clear()
    sample()
    times = [*denoiser.asked[1:], time.perf_counter()]
    return statistics.median((b - a) * 1e3 for a, b in pairwise(times))


def measure(sample, denoiser: StoredDenoiser, repeats: int) -> tuple[float, list[float], float]:
    """Median ms per step, the calibrations around the runs, the median ratio of the two."""
    for _ in range(3):
        sample()
    times, ratios = [], []
    calibrations = [calibrate()]
    for _ in range(repeats):
        times.append(time_step(sample, denoiser))
        calibrations.append(calibrate())
        ratios.append(2 * times[-1] / (calibrations[-2] + calibrations[-1]))
    return statistics.median(times), calibrations, statistics.median(ratios)


def compile_substeps() -> None:
    """Replace a substep's mean by the same formula, fused by torch.compile into few passes over the means."""

    @torch.compile(dynamic=False)
    def tilted_mean(means, log_weights, half_norms, var, precision, shrink, shift):
        logits = log_weights.squeeze(2) + precision * half_norms + (means * shift.unsqueeze(1)).sum(2)
        return (logits.softmax(1).unsqueeze(2) * means).sum(1) * shrink + var * shift

    def mean(self, i: int, x: Tensor) -> Tensor:
        base, shift = self._base, torch.add(self._shift, x, alpha=self._weights[i]).mul_(self._shrinks[i])
        mixture = base.means, base.log_weights, base._half_norms, base.var
        return tilted_mean(*mixture, self._precisions[i], self._shrinks[i], shift)

    path.Reanchoring.mean = mean


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path,
                        help="safetensors file with the inputs (default: made with a fixed seed)")
    parser.add_argument("--compile", action="store_true",
                        help="time again with the substeps compiled (needs a C++ compiler)")
    parser.add_argument("--repeats", type=int, default=25, help="runs per case")
    parser.add_argument("--steps", type=int, default=8, help="steps per run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.inputs:
        from safetensors.torch import load_file

        inputs = load_file(args.inputs)
    else:
        inputs = make_inputs()
    denoiser = StoredDenoiser(inputs)

    def table(title: str) -> None:
        print(f"\n{title}\n{'case':<24}{'ms/step':>9}{'calibration ms (quartiles)':>28}"
              f"{'ratio':>8}{'target':>8}{'authors':>9}")
        for name, target, authors in CASES:
            if args.case not in name:
                continue
            ms, cal, ratio = measure(make_case(name, denoiser, inputs, args.steps), denoiser, args.repeats)
            low, middle, high = statistics.quantiles(cal, n=4)
            spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"{name:<24}{ms:>9.2f}{spread:>28}{ratio:>8.3f}{target or '':>8}{authors:>9.2f}", flush=True)

    print(f"torch {torch.__version__}, {args.threads} threads, batch x K x C x H x W = {SHAPE}, "
          f"{args.steps} steps a run")
    table("eager")
    if args.compile:
        compile_substeps()
        table("compiled substeps")


if __name__ == "__main__":
    main()
