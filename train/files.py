"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .images import say


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and rename; what fails or is killed leaves the previous file. OSError that names the file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def attempt(what: str, write: Callable[[], object], then: str = "; training goes on") -> None:
    """A full disk should not end a run: say so and go on."""
    try:
        write()
    except OSError as error:
        say(f"{what} failed: {error}{then}")


def not_written(path: Path, error: Exception) -> OSError:
    """The OSError behind what torch and safetensors make of a full disk, with the file's name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return OSError(f"{path} could not be written ({cause or error}); the previous file, if there was one, is kept")
