"""What a command tells its terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable


def say(text: str) -> None:
    """A line to stderr that leaves a progress bar whole."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def attempt(
    what: str, write: Callable[[], object], then: str = "; training goes on", errors: type[Exception] = OSError,
) -> None:
    """A full disk should not end a run: say so and go on. ``errors``: likewise others, of what it can do without."""
    try:
        write()
    except errors as error:
        say(f"{what} failed: {error}{then}")
