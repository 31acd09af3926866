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
        if self.signal is not None:
            if number == signal.SIGINT and not self.patient:
                raise KeyboardInterrupt
            return
        self.signal = number
        print("\nstopping after this step" + ("" if self.patient else "; Ctrl-C again stops at once, without saving"),
              file=sys.stderr)


class Forgiving:
    """A text stream whose reader, a terminal or the end of a pipe, may go away: then it says nothing more."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        """Nowhere takes the descriptor's place, so that what is still in the buffer is no error at the end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def forgive_streams() -> None:
    """A run goes on when nobody reads what it says."""
    sys.stdout, sys.stderr = (s if isinstance(s, Forgiving) else Forgiving(s) for s in (sys.stdout, sys.stderr))
