"""A measured child process: what it prints, and the most memory that it had."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# ru_maxrss would begin with what the parent has; VmHWM begins at zero with the new program.
PRELUDE = """
import sys
def peak() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
"""


def output_of(code: str, *arguments, timeout: float = 300) -> str:
    """What Python code prints in a new process. ``sys.argv[1:]`` are the arguments,
    ``peak()`` is its peak RSS in bytes so far."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
