r"""Reading files that may be anything: safetensors and JSON (PyTorch's own: :mod:`.pickles`); writing them whole.

Reading maps files into memory; a tensor is read from disk when used. Only regular files are opened.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

MAX_HEADER = 32 << 20  # bytes of names in a safetensors file; a model of 10,000 tensors has one
MAX_JSON = 8 << 20     # bytes of a config

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used: one printable line that names the file, what is wrong and what would be right."""

    def __init__(self, message: str):
        super().__init__(shown(message, 2000))


def shown(text, limit: int = 120) -> str:
    """Text from a file or a name, fit for a message: at most ``limit`` characters, those that do not print escaped."""
    text = str(text)
    cut = text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's text without line breaks, shortened; its type where it has none."""
    return shown(" ".join(str(error)[: 2 * limit].split()), limit) or type(error).__name__


@contextmanager
def reading(path) -> Iterator[None]:
    """Whatever reading a file raises is one CheckpointError with its name."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({what})") from error


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


def file_size(path: Path) -> int:
    """Bytes of a regular file. CheckpointError for none, a folder, or a FIFO or device, which must not be opened."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file or folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {one_line(error)}") from error
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a device or pipe"
        raise CheckpointError(f"{path}: is {kind}, a file is needed")
    return facts.st_size


def read_head(path: Path) -> bytes:
    """The first 64 bytes of a file; CheckpointError if there is none or it cannot be opened."""
    file_size(path)
    try:
        with open(path, "rb") as file:
            return file.read(64)
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
    header = int.from_bytes(read_head(path)[:8], "little")
    if header > MAX_HEADER:
        raise CheckpointError(f"{path}: its header has {header:,} bytes, at most {MAX_HEADER:,} are read")
    try:
        if not mappable(path):
            content = path.read_bytes()
            return load(content), json.loads(content[8 : 8 + header]).get("__metadata__", {})
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged safetensors file ({one_line(error)}{_missing_part(path, header)}); "
            "download or copy it again"
        ) from error


def mappable(path: Path) -> bool:
    """False for a path that is no UTF-8: then neither safetensors nor torch map the file, and it has to be read."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _missing_part(path: Path, header: int) -> str:
    """Of a file that its download left half: how much of it is there, by its own header."""
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(8 + header)[8:])
        whole = 8 + header + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        size = file_size(path)
        return f"; {size:,} of {whole:,} bytes are there, half a download?" if whole > size else ""
    except Exception:  # a damaged header may hold anything: then there is nothing to say
        return ""


def read_json(path: Path) -> dict:
    """The JSON object in a file of at most 8 MB, a byte-order mark allowed; CheckpointError for anything else."""
    if file_size(path) > MAX_JSON:
        raise CheckpointError(f"{path}: has {file_size(path):,} bytes, at most {MAX_JSON:,} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


# ---- writing -----------------------------------------------------------------------------------

def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` a new file beside ``path`` and rename it: readers see the old file or the whole new one.

    A crash leaves the old one, and at worst a folder that :func:`remove_remains` knows: in a folder, because
    safetensors makes a temporary file of its own. OSError that names the file if it cannot be written.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary = folder / "part"
    try:
        folder.mkdir()
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
        shutil.rmtree(folder, ignore_errors=True)


_REMAINS = ".*." + "[0-9a-f]" * 8 + ".tmp"  # of write_atomically


def remove_remains(path: Path) -> None:
    """Delete what killed writers of a file, or of any file in a folder, left; only where nobody may be writing now."""
    remains = path.glob(_REMAINS) if path.is_dir() else path.parent.glob(f".{glob.escape(path.name)}{_REMAINS[2:]}")
    for folder in remains:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        else:  # of version 0.1.0
            folder.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> OSError:
    """The OSError behind what torch and safetensors make of a full disk, with the file's name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return OSError(f"{path} could not be written ({cause or error}); the previous file, if there was one, is kept")


def write_safetensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Tensors and metadata as ``.safetensors``, by :func:`write_atomically`; missing folders are made.

    Equal content is equal bytes: the metadata is in the order of its names.
    """
    def write(temporary: Path) -> None:
        save_file(state, temporary, metadata)
        _sort_metadata(temporary)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, which safetensors keeps in a table without one. As long as before: only names move."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def write_text(path: Path, text: str) -> None:
    """A text file, by :func:`write_atomically`, in UTF-8; what that cannot hold (names of odd folders) is escaped."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}


def write_picture(path: Path, image, **options) -> None:
    """A Pillow image in the format of the name's ending, by :func:`write_atomically`."""
    write_atomically(path, lambda temporary: image.save(temporary, PICTURES[path.suffix.lower()], **options))
