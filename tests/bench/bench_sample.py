"""Time the whole command ``python -m gmflow_core sample``, and its parts: ``python tests/bench/bench_sample.py``.

Twenty digits from the bundled checkpoint, guided, 8 steps. Not a test: nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LABELS = "0-9,0-9"


def whole_command(solver: str, repeats: int) -> list[float]:
    """Seconds of the command as a fresh process, imports and all."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "gmflow_core", "sample", "models/gmdit_digits.safetensors", "--labels", LABELS,
                 "--solver", solver, "--out", out], cwd=ROOT, check=True, capture_output=True,
            )
            seconds.append(time.perf_counter() - start)
    return seconds


def parts(solver: str, repeats: int) -> dict[str, float]:
    """Median seconds of loading, of sampling, and of the network within it."""
    sys.path.insert(0, str(ROOT))
    from gmflow_core import load_checkpoint
    from gmflow_core.cli import sample_images
    from gmflow_core.sampler import SamplerOptions

    loads, samples, network = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        checkpoint = load_checkpoint(ROOT / "models" / "gmdit_digits.safetensors")
        loads.append(time.perf_counter() - start)
        inside, forward = 0.0, checkpoint.model.forward

        def timed(*args, forward=forward):
            nonlocal inside
            begin = time.perf_counter()
            result = forward(*args)
            inside += time.perf_counter() - begin
            return result

        checkpoint.model.forward = timed
        start = time.perf_counter()
        sample_images(checkpoint, [*range(10)] * 2, SamplerOptions(solver), guidance=0.3)
        samples.append(time.perf_counter() - start)
        network.append(inside)
    median = statistics.median
    return {"load": median(loads), "sample": median(samples), "of it network": median(network)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for solver in ("gm-ode", "gm-sde"):
        seconds = whole_command(solver, repeats)
        print(f"{solver}: whole command {statistics.median(seconds):.2f} s "
              f"(from {min(seconds):.2f} to {max(seconds):.2f})")
        print("   " + ", ".join(f"{name} {value:.3f} s" for name, value in parts(solver, repeats).items()))


if __name__ == "__main__":
    main()
