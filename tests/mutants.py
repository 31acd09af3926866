"""Mistakes that a test must notice: each is made in a copy of the project, and the tests named beside it must fail.

    python tests/mutants.py            all of them
    python tests/mutants.py ema svg    those whose name holds a word

Not part of the suite: it runs some tests twice. A mutant is (name, file, what stands there, the mistake, tests).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = (
    ("solvers swapped", "gmflow_core/sampler.py",
     'if options.solver == "gm-ode":', 'if options.solver == "gm-sde":',
     "tests/test_cli.py::test_the_solver_that_is_asked_for_paints"),
    ("svg axis upside down", "train/svg.py",
     "bottom - (value - low) / (high - low) * (bottom - TOP))", "TOP + (value - low) / (high - low) * (bottom - TOP))",
     "tests/test_train_report.py::test_points_lie_where_their_values_are"),
    ("chart's y axis flipped", "gmflow_core/inspection/charts.py",
     "y1 - v * (y1 - y0)", "y0 + v * (y1 - y0)",
     "tests/test_views.py::test_more_is_further_up"),
    ("difference by guidance doubled", "gmflow_core/inspection/views.py",
     "gain = 1 / max(", "gain = 2 / max(",
     "tests/test_views.py::test_the_difference_by_guidance_fills_its_scale_and_no_more"),
    ("demo's sweep ignores guidance", "gmflow_core/demo.py",
     "seed, guidance=w)", "seed)",
     "tests/test_cli.py::test_the_demo_s_rows_are_guided_as_their_titles_say"),
    ("ema without a warm-up", "train/step.py",
     "    decay = min(decay, (1 + step) / (10 + step))\n", "",
     "tests/test_train.py::test_the_average_forgets_the_start"),
)


def copied(folder: Path) -> None:
    """Git's files as they are now, in a folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def passes(folder: Path, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests} could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant[0] for word in words)]
    alive = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(folder)
        for name, file, old, new, tests in chosen:
            text = (folder / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise SystemExit(f"{name}: {file} holds {old!r} {text.count(old)} times, not once")
            if not passes(folder, tests):
                raise SystemExit(f"{name}: {tests} fails without the mistake")
            (folder / file).write_text(text.replace(old, new), encoding="utf-8")
            survived = passes(folder, tests)
            (folder / file).write_text(text, encoding="utf-8")
            print(f"{'SURVIVES' if survived else 'dies':<10}{name} ({file}), by {tests}", flush=True)
            alive += [name] if survived else []
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants die")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
