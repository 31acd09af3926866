"""The log of a run: ``log.jsonl``, a line of JSON for each report,
and the same for TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from gmflow_core.files import file_size, write_text

from .console import say

LOG = "log.jsonl"
BOARD = "tensorboard"


class RunLog:
    """Appends lines; a sparse copy of the smoothed loss (``history``) goes into the checkpoint."""

    def __init__(self, folder: Path, history_every: int, tensorboard: bool):
        self.path, self.every, self.history = folder / LOG, history_every, []
        self.wants_board, self.board = tensorboard, None

    def resume(self, step: int, history: list) -> None:
        """Go on after a step: what was written later is dropped."""
        self.history = history
        trim_log(self.path, step)

    def write(self, numbers: dict) -> None:
        append_line(self.path, json.dumps({k: short(v) for k, v in numbers.items()}))
        if numbers["step"] % self.every == 0 and "loss_smooth" in numbers:
            self.history.append([numbers["step"], short(numbers["loss_smooth"])])
        if board := self.open_board(numbers["step"]):
            for name, value in numbers.items():
                if name != "step":
                    board.add_scalar(name, value, numbers["step"])

    def picture(self, image, step: int) -> None:
        """A Pillow image, for TensorBoard alone."""
        import numpy as np

        if board := self.open_board(step):
            board.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def open_board(self, step: int):
        """TensorBoard's writer, opened at the first report of a process: what is there of later steps is hidden.
        None without it."""
        if self.wants_board and self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.wants_board = False
            else:
                self.board = SummaryWriter(str(self.path.parent / BOARD), purge_step=step)
        return self.board

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
            self.board = None


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all: after a failure (a full disk) the file is as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def read_lines(path: Path) -> list[dict]:
    """The lines of a log. One that was cut, or that two processes wrote at once, is left out and said."""
    file_size(path)  # a pipe would wait for ever
    lines, bad = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append(line) if isinstance(line["step"], int) else bad.append(number)
        except (ValueError, TypeError, KeyError):
            bad.append(number)
    if bad:
        say(f"{path}: {len(bad)} damaged lines are left out, the first is line {bad[0]}")
    return lines


def trim_log(path: Path, step: int) -> None:
    """Drop lines written after the state that a run resumes from, and damaged ones."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def short(value):
    """Six digits; null for what is not finite, which JSON cannot hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
