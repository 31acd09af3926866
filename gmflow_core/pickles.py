r"""PyTorch files (``.pth``) from anywhere: bounds are checked in the file itself before ``torch.load`` builds anything.

No code is ever run, and no tensor is larger than what the file holds: a view that repeats its storage, a compressed
record or a ``bytearray(10**10)`` would let ten kilobytes ask for gigabytes.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .files import CheckpointError, mappable, one_line, read_head, shown

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
MAX_PICKLE = 16 << 20       # bytes of names and numbers; the largest published training file has half a megabyte
MAX_OPCODES = 4_000_000
LEGACY_PICKLES = 5          # before the storages of a file without zip: magic, protocol, system, content, keys

# Everything that torch.save writes for plain tensors and values, as "module name".
_PLAIN = (
    r"collections OrderedDict|_codecs encode|(?:__builtin__|builtins) (?:set|complex)|"
    r"torch (?:Size|device|bool|half|double|(?:u?int|b?float|complex)\d\w*)|torch(?:\.cuda)? [A-Z]\w*Storage|"
    r"torch\.storage (?:Untyped|Typed)Storage|torch\.nn\.parameter Parameter|"
    r"torch\._utils _rebuild_(?:tensor|tensor_v2|tensor_v3|parameter)"
)


def is_pickle(path: Path) -> bool:
    """True if both name and first bytes are those of a PyTorch file."""
    return path.suffix in SUFFIXES and read_head(path).startswith((b"PK\x03\x04", b"\x80"))


def read_pickle(path: Path) -> dict:
    """The dict in a PyTorch file of plain tensors and values.

    CheckpointError for code, objects, and tensors of more than the file holds.
    """
    zipped = read_head(path).startswith(b"PK")
    try:
        check_archive(path) if zipped else check_stream(path)
        mapped = zipped and mappable(path)
        with nullcontext(path) if mapped else open(path, "rb") as source:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # torch documents no list of what a damaged or hostile file raises
        raise CheckpointError(
            f"{path}: truncated or damaged PyTorch file ({torch_says(error)}); download or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a training file holds a dict")
    check_tensors(path, content)
    return content


def torch_says(error: Exception) -> str:
    """One line of what torch raised, without its advice to trust the file (``weights_only=False``)."""
    line = one_line(error)
    return type(error).__name__ if re.search("weights_only|WeightsUnpickler|safe_globals", line) else line


# ---- before it is loaded -----------------------------------------------------------------------

def check_archive(path: Path) -> None:
    """A zip file as torch.save writes it: records as they are, a short pickle of nothing but plain values."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("/constants.pkl") for record in records):
            raise _refused(path, "holds TorchScript, which is code")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: the record {shown(record.filename)} is compressed; torch.save does not")
            if record.filename.endswith(".pkl"):
                if record.file_size > MAX_PICKLE:
                    raise CheckpointError(f"{path}: its pickle has {record.file_size:,} bytes, "
                                          f"at most {MAX_PICKLE:,} are read")
                check_plain(path, io.BytesIO(archive.read(record)))


def check_stream(path: Path) -> None:
    """A file of torch.save before 2020: some pickles, then the storages."""
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE))
    try:
        for _ in range(LEGACY_PICKLES):
            check_plain(path, head)
    except CheckpointError:
        raise
    except Exception:  # pickletools documents none: ValueError, UnicodeDecodeError, ...
        raise _refused(path, "is not torch.save's") from None


def check_plain(path: Path, pickle: BinaryIO) -> None:
    """CheckpointError if a pickle names a class or function that plain tensors and values do not need. Runs nothing."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if opcode.name in ("GLOBAL", "INST") and not re.fullmatch(_PLAIN, argument := str(argument)):
            name = shown(argument.replace(" ", ".", 1))
            tensors = argument.startswith(("torch._utils ", "torch._tensor "))
            kind = "tensors that are not plain" if tensors else "Python code or objects"
            raise _refused(path, f"holds {kind} ({name})")
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "BYTEARRAY8"):
            raise _refused(path, "holds Python code or objects, in opcodes that torch.save does not use")
        if count > MAX_OPCODES:
            raise CheckpointError(f"{path}: its pickle has over {MAX_OPCODES:,} steps; a training file has thousands")


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the pickle {what}; refused, and nothing was run: loading such a file may do "
                           "anything. A training file holds tensors and plain values only")


# ---- after it is loaded ------------------------------------------------------------------------

def check_tensors(path: Path, content: dict) -> None:
    """CheckpointError if a tensor is larger than its storage, or the storages together are larger than the file."""
    storages, size = {}, path.stat().st_size
    for name, value in _tensors(content):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {shown(name)} is no plain tensor, but a {type(value).__name__}")
        storage = value.untyped_storage()
        if value.nbytes > storage.nbytes():
            raise CheckpointError(f"{path}: {shown(name)} claims {value.nbytes:,} bytes, {storage.nbytes():,} are "
                                  "stored; such a file is damaged or made to fill the memory")
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
    if sum(storages.values()) > size:
        raise CheckpointError(f"{path}: its tensors claim {sum(storages.values()):,} bytes, the file has {size:,}")


def _tensors(content: dict) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples; what is there several times is looked at once."""
    seen, waiting = set(), [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), item) for key, item in items]
