r"""Time a text-to-image adapter's share of a step at its real size: ``python tests/bench/bench_adapter.py``.

Random heads on a random hidden state of an image of 1024 x 1024 pixels (Qwen-Image's 1328 x 1328 with ``--family``),
without the network before them: what the adapter's two layers add to the base, what a capture costs, GM-ODE's first
step of four with its 37 substeps, and a recorded step. CPU time beside wall time, for machines are shared; memory is
the process's peak, stage by stage. Not a test: nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gmflow_core as gm  # noqa: E402
from gmflow_core.adapter import FAMILIES, PATCH, SHIFT, Linear, MixtureHeads, mean_tokens, pack_tokens  # noqa: E402
from gmflow_core.inspection.trace import Recorder, tensors_of  # noqa: E402
from gmflow_core.model import unpack_mixture  # noqa: E402
from gmflow_core.sampler import SamplerOptions, sample  # noqa: E402

COMPONENTS, DEVIATION = 8, 1024   # K, and the width between the two layers of the deviation


@dataclass(frozen=True)
class Size:
    """A family's hidden size, and its mixture's height and width."""

    hidden: int
    pixels: int


SIZES = {"FLUX.1": Size(3072, 128), "FLUX.2": Size(6144, 128), "Qwen-Image": Size(3072, 166)}


def random_linear(outputs: int, inputs: int) -> Linear:
    return Linear(torch.randn(outputs, inputs) * inputs**-0.5, 0.1 * torch.randn(outputs))


def random_heads(channels: int, hidden: int) -> MixtureHeads:
    stds = (random_linear(DEVIATION, hidden), random_linear(1, DEVIATION))
    return MixtureHeads(random_linear(COMPONENTS * channels * PATCH**2, hidden),
                        random_linear(COMPONENTS * PATCH**2, hidden), stds)


def peak() -> float:
    """MB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, work: Callable, repeats: int):
    """Print the least of the times, of CPU and of the wall, and the peak so far; the last result."""
    taken = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = (min(values) for values in zip(*taken, strict=True))
    print(f"{name:44} {cpu:7.2f} s CPU {wall:7.2f} s wall {peak():7.0f} MB peak", flush=True)
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SIZES, default="FLUX.1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="PyTorch's (default: its own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size = SIZES[arguments.family]
    channels = next(family.channels for family in FAMILIES if family.name == arguments.family)
    rows = size.pixels // PATCH
    heads, hidden = random_heads(channels, size.hidden), torch.randn(1, rows**2, size.hidden)
    vector, base = torch.randn(1, size.hidden), random_linear(channels * PATCH**2, size.hidden)
    x, repeats = torch.randn(1, channels, size.pixels, size.pixels), arguments.repeats
    print(f"{arguments.family}: B 1, K {COMPONENTS}, C {channels}, {size.pixels} x {size.pixels}; "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; {peak():.0f} MB before")

    measure("the base's own last layer", lambda: base(hidden), repeats)
    measure("mixture heads, their mean", lambda: mean_tokens(*heads.tokens(hidden)), repeats)
    packed = measure("... and the mixture packed for a capture",
                     lambda: pack_tokens(*heads.tokens(hidden), heads.log_std(vector), rows, rows), repeats)
    print(f"{'':44} {packed.nbytes / 1e6:7.1f} MB packed")

    sigmas, kept = gm.flow_sigmas(4, SHIFT, final_step=0.5)[:2], []

    def denoiser(x, sigma):
        return gm.unguided(gm.velocity_to_posterior(unpack_mixture(packed, COMPONENTS), x, sigma))

    for substeps in (1, 37):
        options = SamplerOptions(order=1, substeps=substeps, shift=SHIFT, recipe="piflow")
        measure(f"GM-ODE, a step of {substeps} substep{'s' * (substeps > 1)}",
                lambda options=options: sample(denoiser, x, sigmas, options), repeats)
    sde = SamplerOptions("gm-sde", 1, recipe="piflow")
    measure("GM-SDE, a step", lambda: sample(denoiser, x, sigmas, sde), repeats)

    def recorded():
        recorder = Recorder()
        sample(denoiser, x, sigmas, SamplerOptions(order=1, substeps=1, shift=SHIFT, recipe="piflow"),
               callback=recorder)
        kept[:] = tensors_of(recorder.trace())

    measure("a step of 1 substep, recorded", recorded, repeats)
    print(f"{'':44} {sum(tensor.nbytes for tensor in kept) / 1e6:7.1f} MB a step of the trace")


if __name__ == "__main__":
    main()
