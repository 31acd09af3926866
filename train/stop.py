"""Ctrl-C and SIGTERM as a wish to stop after the step that is running."""

from __future__ import annotations

import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """``with StopRequest() as stop``: ``stop.signal`` is that of the first request, None before it.

    A second Ctrl-C interrupts at once, except in a team, where a launcher may pass on one Ctrl-C twice.
    """

    def __init__(self, patient: bool = False):
        self.signal: int | None = None
        self.patient = patient

    def __enter__(self) -> StopRequest:
        self.previous = {number: signal.signal(number, self.ask) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        if self.signal is not None:
            if number == signal.SIGINT and not self.patient:
                raise KeyboardInterrupt
            return
        self.signal = number
        print("\nstopping after this step" + ("" if self.patient else "; Ctrl-C again stops at once, without saving"),
              file=sys.stderr)
