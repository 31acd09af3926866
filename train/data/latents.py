"""Latents of images on disk: shards of ``.safetensors`` and an ``index.json``,
as ``python -m train.encode`` writes them.

A shard holds ``latents`` (n,C,H,W), ``labels`` (n,) and, where asked for, ``flipped``: the latents of the
mirrored images. Latents are stored as the model sees them: scale and shift are already applied.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from gmflow_core.files import CheckpointError, file_size
from gmflow_core.model import LatentSpace

from .dataset import Dataset

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Latents(Dataset):
    """Latents from memory-mapped shards: nothing but the rows of a batch is read, and all labels once."""

    folder: Path
    shape: tuple[int, int, int]
    latent_space: LatentSpace
    class_names: tuple[str, ...]
    ends: tuple[int, ...]       # number of samples up to and including each shard
    shards: tuple               # open files
    labels: Tensor              # (N,) int64
    flip: bool                  # choose between an image and its mirror image

    @classmethod
    def load(cls, folder: str | Path | None, flip: bool = True) -> Latents:
        """ValueError that names the file if something is missing, damaged or of another kind."""
        if folder is None:
            raise ValueError("no folder of latents was given: --data FOLDER, as python -m train.encode writes it")
        folder = Path(folder)
        index = read_index(folder)
        shape = tuple(index["shape"])
        shards = tuple(open_shard(folder / s["file"], s["count"], shape, index["flips"]) for s in index["shards"])
        return cls(
            folder, shape, LatentSpace("sd-vae", index["scale"], index["shift"]), tuple(index["classes"]),
            tuple(accumulate(s["count"] for s in index["shards"])), shards,
            torch.cat([shard.get_tensor("labels") for shard in shards]).long(), flip and index["flips"],
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def choose(self, size: int, generator: Generator) -> Tensor:
        """[index, mirrored] of each sample: (B,2)."""
        index = torch.randint(len(self), (size,), generator=generator)
        return torch.stack([index, torch.randint(2, (size,), generator=generator) * self.flip], dim=1)

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.row(index, "flipped" if mirrored else "latents") for index, mirrored in choice.tolist()]
        return torch.cat(rows).float(), self.labels[choice[:, 0]]

    def row(self, index: int, name: str) -> Tensor:
        """One row of a tensor of the set, (1, ...), as stored."""
        shard = bisect_right(self.ends, index)
        first = self.ends[shard - 1] if shard else 0
        return self.shards[shard].get_slice(name)[index - first : index - first + 1]


def read_index(folder: Path) -> dict:
    """The index of a folder of latents; ValueError if it has none, or one that this program does not read."""
    path = folder / INDEX
    if not path.is_file():
        if any(folder.glob("shard-*.safetensors")):
            raise ValueError(f"{folder}: no {INDEX} in it; its encoding is not finished: run train.encode again")
        raise ValueError(f"{folder}: no {INDEX} in it; expected a folder that python -m train.encode wrote")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error}); run train.encode again") from None
    wanted = {"format": int, "shape": list, "scale": float, "shift": float, "vae": str, "classes": list, "flips": bool,
              "shards": list}
    bad = [name for name, kind in wanted.items()
           if not isinstance(index, dict) or not isinstance(index.get(name), kind)]
    if bad or index["format"] != FORMAT or not index["shards"]:
        raise ValueError(f"{path}: {', '.join(bad) or 'format or shards'} missing or of another kind; "
                         f"expected format {FORMAT} of train.encode")
    return index


def open_shard(path: Path, count: int, shape: tuple[int, ...], flips: bool):
    """A shard, mapped and checked; ValueError if it is absent, damaged or not what the index says."""
    try:
        file_size(path)
        shard = safe_open(path, "pt")
        shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}
    except (SafetensorError, OSError, CheckpointError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); delete it and run train.encode again") from None
    wanted = {"latents": (count, *shape), "labels": (count,)} | ({"flipped": (count, *shape)} if flips else {})
    if shapes != wanted:
        raise ValueError(f"{path}: holds {shapes}, the index says {wanted}; delete it and run train.encode again")
    return shard
