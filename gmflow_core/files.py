r"""Reading files that may be anything: safetensors, JSON, and PyTorch files with ``weights_only=True``; writing them whole.

No code from a file is ever run. Reading maps files into memory; a tensor is read from disk when used.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used: one line that names the file, what is wrong and what would be right."""


def one_line(error: Exception) -> str:
    """An exception's text without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]


_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer (the real file was not downloaded: run git lfs pull)"),
    (b"PK\x03\x04", "a zip archive, as PyTorch writes .pth and .ckpt files"),
    (b"\x80", "a Python pickle"),
    (b"<", "an HTML or XML page (the download got a web page, perhaps a login)"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
    (b"GGUF", "a GGUF file"),
    (b"\0\0\0\0\0\0\0\0", "zeros (an unfinished download)"),
)


def is_safetensors(path: Path) -> bool:
    """True if the file begins as a safetensors file does: a header length below 100 MB, then JSON.

    CheckpointError if there is no file, it cannot be opened or it is too short to tell.
    """
    head = read_head(path)
    if len(head) < 9:
        raise CheckpointError(f"{path}: the file is {'empty' if not head else f'truncated ({len(head)} bytes)'}; "
                              "download or copy it again")
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def is_pickle(path: Path) -> bool:
    """True if both name and first bytes are those of a PyTorch file."""
    return path.suffix in PICKLE_SUFFIXES and read_head(path).startswith((b"PK\x03\x04", b"\x80"))


def read_head(path: Path) -> bytes:
    """The first 64 bytes of a file; CheckpointError if there is none or it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file or folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {one_line(error)}") from error


def looks_like(head: bytes) -> str:
    """In words, what a file with these first bytes seems to be."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, description in _MAGIC:
        if head.startswith(magic) or text.startswith(magic):
            return description
    return f"something unknown (it begins with {head[:8].hex(' ')})"


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors (mapped, not yet read) and metadata; CheckpointError for anything but a whole safetensors file."""
    if not is_safetensors(path):
        raise CheckpointError(f"{path}: not a checkpoint: it looks like {looks_like(read_head(path))}; "
                              "GMFlow models are .safetensors files, diffusers folders or training files in .pth")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged safetensors file ({one_line(error)}); download or copy it again"
        ) from error


def read_pickle(path: Path) -> dict:
    """The dict in a PyTorch file, read with ``weights_only=True``: a file that holds code is refused, not run."""
    zipped = read_head(path).startswith(b"PK")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch documents no list of what a damaged or hostile file raises
        found = re.search(r"GLOBAL (\S+)|TorchScript", str(error))
        if found or isinstance(error, UnpicklingError):
            # Torch's own text advises to load it with weights_only=False: never pass that on.
            what = f"holds Python code or objects ({found[1] or found[0]})" if found else "is not torch.save's"
            raise CheckpointError(
                f"{path}: the pickle {what}; refused, and nothing was run: loading such a file may do anything. "
                "A GMFlow training file holds tensors and plain values only"
            ) from None
        raise CheckpointError(
            f"{path}: truncated or damaged PyTorch file ({one_line(error)}); download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; GMFlow's training files hold a dict")
    return content


def read_json(path: Path) -> dict:
    """The JSON object in a file; CheckpointError if it is absent or something else."""
    read_head(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


# ---- writing -----------------------------------------------------------------------------------

def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` a new file beside ``path`` and rename it: readers see the old file or the whole new one, a crash leaves the old.

    OSError that names the file if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
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


def remove_remains(path: Path) -> None:
    """Delete what killed writers of ``path`` left beside it; only where nobody else may be writing it now."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> OSError:
    """The OSError behind what torch and safetensors make of a full disk, with the file's name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return OSError(f"{path} could not be written ({cause or error}); the previous file, if there was one, is kept")


def write_safetensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Tensors and metadata as ``.safetensors``, by :func:`write_atomically`; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
