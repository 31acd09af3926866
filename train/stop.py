"""Ctrl-C, a closed terminal and a scheduler's signals as a wish to stop after the step that is running."""

from __future__ import annotations

import os
import signal
import sys

# SIGHUP: the terminal went. SIGUSR1: what schedulers send some time before they kill. Not every system has them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """``with StopRequest() as stop``: ``stop.signal`` is that of the first request, None before it.

    A second Ctrl-C interrupts at once, except in a team, where a launcher may pass on one Ctrl-C twice. A SIGHUP that
    the process was told to ignore (by nohup) stays ignored.
    """

    def __init__(self, patient: bool = False):
        self.signal: int | None = None
        self.patient = patient

    def __enter__(self) -> StopRequest:
        hangup = getattr(signal, "SIGHUP", None)
        wanted = [number for number in SIGNALS if number != hangup or signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.ask) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.signal is not None:
            if number == signal.SIGINT and not self.patient:
                raise KeyboardInterrupt
            return
        self.signal = number
        print("\nstopping after this step" + ("" if self.patient else "; Ctrl-C again stops at once, without saving"),
              file=sys.stderr)


def leave_terminal() -> None:
    """Send what is still to be said nowhere if it went to a terminal, which is gone: writing there would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
