"""The folder of a run: who works in it, what an earlier run left, numbered snapshots."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gmflow_core.files import write_atomically

from .console import say

LOCK = ".lock"
_OURS = re.compile(
    r"state\.pt|checkpoint(-.*)?\.safetensors|log\.jsonl|report\.html|samples-\d+\.png|nan_step_.*\.pt|tensorboard"
)
_SNAPSHOT = re.compile(r"checkpoint-\d{7,}\.safetensors")


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """No other process may work in a folder meanwhile; ValueError if one does. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(100).strip()
            raise ValueError(f"{folder}: another process {doing} in this folder{f' ({owner})' if owner else ''}; "
                             "wait for it, or choose another --out") from None
        except OSError as error:  # a file system without locks
            say(f"{folder}: cannot be locked ({error.strerror}): see to it that only one process works in it")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()  # nothing came of it


def run_files(folder: Path) -> list[Path]:
    """What a run has written into its folder."""
    return sorted(path for path in folder.glob("*") if _OURS.fullmatch(path.name))


def begin_again(folder: Path, keep: bool) -> None:
    """Make way for a new run: move an earlier one's files to ``FOLDER/earlier-N`` if asked to ``keep``, else delete."""
    found = run_files(folder)
    if not found:
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"earlier-{n}").exists())
    place = folder / f"earlier-{number}"
    if keep:
        place.mkdir()
    for path in found:
        if keep:
            path.rename(place / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    say(f"{folder}: the earlier run is " + (f"in {place.name}" if keep else "deleted"))


def check_export(path: Path) -> None:
    """ValueError if a checkpoint could not be written to a path: better before a training than after it."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"--export {path}: must be a file that ends in .safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--export {path}: cannot be written ({error.strerror})") from None


def keep_snapshot(checkpoint: Path, step: int, count: int) -> None:
    """A numbered copy of a checkpoint beside it; of the earlier ones the last ``count`` stay."""
    def copy(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(checkpoint, temporary)  # a save replaces the checkpoint, it never writes into it
        except OSError:
            shutil.copyfile(checkpoint, temporary)

    write_atomically(checkpoint.with_name(f"checkpoint-{step:07d}.safetensors"), copy)
    found = sorted(path for path in checkpoint.parent.iterdir() if _SNAPSHOT.fullmatch(path.name))
    for path in found[:-count]:
        path.unlink()
