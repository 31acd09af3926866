"""The log of a run: ``log.jsonl``, a line of JSON for each report."""

from __future__ import annotations

import json
import math
from pathlib import Path

LOG = "log.jsonl"


class RunLog:
    """Appends lines; a sparse copy of the smoothed loss (``history``) goes into the checkpoint."""

    def __init__(self, folder: Path, history_every: int):
        self.path, self.every, self.history = folder / LOG, history_every, []

    def resume(self, step: int, history: list) -> None:
        """Go on after a step: what was written later is dropped."""
        self.history = history
        trim_log(self.path, step)

    def write(self, numbers: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: short(v) for k, v in numbers.items()}) + "\n")
        if numbers["step"] % self.every == 0 and "loss_smooth" in numbers:
            self.history.append([numbers["step"], short(numbers["loss_smooth"])])


def trim_log(path: Path, step: int) -> None:
    """Drop lines written after the state that a run resumes from, and a last line cut short."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def short(value):
    """Six digits; null for what is not finite, which JSON cannot hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
