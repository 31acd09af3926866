r"""Which file of a folder: diffusers' parts and variants, weights in several parts, runs, caches of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from .files import CheckpointError, State, read_json, read_safetensors, shown

WEIGHTS = "diffusion_pytorch_model.safetensors"
RUN_CHECKPOINT, RUN_STATE = "checkpoint.safetensors", "state.pt"
INDEX = ".safetensors.index.json"
_PART = r"(.+)-\d{5}-of-\d{5}\.safetensors"
_UNFINISHED = ("blobs/*.incomplete", ".cache/huggingface/download/**/*.incomplete")


def locate(path: Path) -> Path:
    """The checkpoint that a path means: of a run its own, of the hub's cache the snapshot, else the path itself."""
    if (path / "snapshots").is_dir():
        path = _snapshot(path)
    if (path / RUN_CHECKPOINT).is_file():
        return path / RUN_CHECKPOINT
    if (path / RUN_STATE).is_file() and not (path / "transformer").is_dir():
        raise CheckpointError(f"{path}: a training run without {RUN_CHECKPOINT}: not saved yet, or deleted")
    return path


def _snapshot(cache: Path) -> Path:
    """The snapshot in a folder of the hub's cache that its ``main`` names, or the only one."""
    found = sorted(folder for folder in (cache / "snapshots").iterdir() if folder.is_dir())
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    chosen = [folder for folder in found if folder.name == main] or found
    if len(chosen) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise CheckpointError(f"{cache}: a cache of the hub with the snapshots {shown(names)}: name one's folder")
    return chosen[0]


def weights_file(folder: Path, prefer: str = WEIGHTS, *, pickles: bool = False) -> Path:
    """The weights in a diffusers part: the preferred file, the full precision one, the index of one in several parts,
    any variant (``.bf16.``), those without moving average last; with ``pickles`` also PyTorch's ``.bin``."""
    named = [folder / prefer, folder / WEIGHTS, folder / WEIGHTS.replace(".safetensors", INDEX)]
    kinds = (".*.safetensors", *((".bin", ".*.bin") if pickles else ()))
    variants = [path for kind in kinds for path in sorted(folder.glob("diffusion_pytorch_model" + kind))]
    variants.sort(key=lambda path: (path.suffix == ".bin", "non_ema" in path.name))
    for candidate in (*named, *variants):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{folder}: no {WEIGHTS} (or .bf16. variant) in this folder{_unfinished(folder)}")


def _unfinished(folder: Path) -> str:
    """A hint, if what downloads leave while they run lies near a folder."""
    folder = folder.absolute()
    if any(True for near in (folder, *folder.parents[:3]) for pattern in _UNFINISHED for _ in near.glob(pattern)):
        return "; a download into it is not finished (there are .incomplete files): let it finish, or download again"
    return ""


def index_of(path: Path) -> Path | None:
    """The index of weights in several parts, if ``path`` is it or one of the parts; None for a whole file."""
    if path.name.endswith(INDEX):
        return path
    part = re.fullmatch(_PART, path.name)
    if part is None:
        return None
    index = path.with_name(part[1] + INDEX)
    if not index.is_file():
        raise CheckpointError(f"{path}: one of several parts, and there is no {shown(index.name)} beside it: "
                              "download the whole folder")
    return index


def read_weights(path: Path) -> State:
    """Tensors of a ``.safetensors``, all of them if it is the index or one part of weights in several."""
    index = index_of(path)
    if index is None:
        return read_safetensors(path)[0]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: its weight_map is no object of names and files")
    state: State = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{index}: the part {shown(file)} is no file beside it")
        state |= read_safetensors(index.parent / file)[0]
    absent = [name for name in places if name not in state]
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} of its tensors are in no part, the first is {shown(absent[0])}")
    return state
