"""A folder of images, one subfolder a class, as training data. Pillow decodes."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from gmflow_core.model import LatentSpace

from ..console import say
from .dataset import Dataset
from .decode import MODES, decode, is_image, suffixes, to_unit

PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}  # of a data set
CACHE_BYTES = 2_000_000_000
SOURCES = "sources.json"  # beside the class folders: where the images come from, for the checkpoint


@dataclass(frozen=True)
class ImageList:
    """The images of a folder: paths, the class of each, and the names of the classes, sorted."""

    folder: Path
    paths: list[Path]
    labels: Tensor            # (N,) int64
    classes: tuple[str, ...]


def find_images(folder: str | Path | None) -> ImageList:
    """Images in the subfolders of a folder, at any depth; images beside no subfolder are one class of the folder's
    name.

    ValueError if there is no folder, or no image in it.
    """
    if folder is None:
        raise ValueError("no folder of images was given: --data FOLDER, with a subfolder for each class")
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder}: {what}; the data must be a folder with a subfolder of images for each class")
    loose = sorted(p for p in folder.iterdir() if is_image(p))
    classes = {p.name: images_below(p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    check_parts(folder, {name: found for name, found in classes.items() if found})
    empty = [name for name, found in classes.items() if not found]
    classes = {name: found for name, found in classes.items() if found}
    if classes and loose:
        say(f"{folder}: {len(loose)} images that lie beside the class folders are not used")
    if classes and empty:
        say(f"{folder}: folders without images are no classes: "
            f"{', '.join(empty[:8])}{' ...' if len(empty) > 8 else ''}")
    if not classes and loose:
        classes = {folder.resolve().name: loose}
    if not classes:
        raise ValueError(f"{folder}: no images in it; expected {folder / 'CLASS' / 'NAME.png'}, "
                         f"or {', '.join(sorted(suffixes()))}")
    counts = torch.tensor([len(found) for found in classes.values()])
    return ImageList(
        folder, [path for found in classes.values() for path in found],
        torch.arange(len(counts)).repeat_interleave(counts), tuple(classes),
    )


def read_sources(folder: Path) -> dict | None:
    """What ``sources.json`` says of a folder's images; None without one. ValueError if it is not a JSON object."""
    if not (path := folder / SOURCES).is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); mend it or take it away") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(found).__name__}; mend it or take it away")
    return found


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, linked ones too, sorted; names that begin with a dot are left out."""
    found, seen = [], {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [name for name in folders if Path(root, name).is_symlink()]:
            place = Path(root, name).resolve()
            if place in seen or any(place == Path(parent).resolve() for parent in (folder, *Path(root).parents)):
                say(f"{Path(root, name)}: a link to a folder that is read already, left out")
                folders.remove(name)
            seen.add(place)
        found += [path for path in (Path(root, name) for name in names) if is_image(path)]
    return sorted(found)


def check_parts(folder: Path, classes: dict[str, list[Path]]) -> None:
    """ValueError if the class folders are the parts of a data set, each with the classes inside."""
    inside = [any(path.parent != folder / name for path in found) for name, found in classes.items()]
    if classes and all(name.lower() in PARTS for name in classes) and all(inside):
        names = " and ".join(classes)
        raise ValueError(f"{folder}: {names} are parts of a data set and no classes: name one, "
                         f"{folder / next(iter(classes))}")


def fingerprint(images: ImageList) -> str:
    """Of names, classes and contents of all images in their order: sizes, and the first and last 4 kB of each file.

    A picture that was replaced by another one of its name has another fingerprint; a copy of the folder has the same.
    """
    total = hashlib.sha256()
    for path in images.paths:
        total.update(os.fsencode(path.relative_to(images.folder).as_posix()) + b"\0")
        try:
            size = path.stat().st_size if path.is_file() else -1
            with open(path if path.is_file() else os.devnull, "rb") as file:
                total.update(f"{size} ".encode() + file.read(4096))
                file.seek(max(0, size - 4096))
                total.update(file.read(4096))
        except OSError as error:
            total.update(str(error.errno).encode())
    return total.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset):
    """The images of a folder, RGB (or grey) in [-1, 1], mirrored at random.

    A set smaller than ``CACHE_BYTES`` is kept in memory once decoded. An image that cannot be read is
    reported once; the next readable one takes its place, so that batches stay the same from run to run.
    """

    images: ImageList
    shape: tuple[int, int, int]                    # (C,S,S)
    flip: bool = True
    workers: int = 2
    broken: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)    # of the notes on decoded images
    cache: dict[int, Tensor] | None = None         # decoded images by index, where they all fit
    sources: dict | None = None

    latent_space = LatentSpace("rgb")

    @classmethod
    def load(cls, folder: str | Path | None, channels: int, size: int, flip: bool = True,
             workers: int = 2) -> ImageFolder:
        if channels not in MODES:
            raise ValueError(f"images have 1 or 3 channels, the model has in_channels={channels}; "
                             "for latents set data=latents")
        images = find_images(folder)
        small = len(images.paths) * channels * size * size < CACHE_BYTES
        sources = read_sources(images.folder)
        return cls(images, (channels, size, size), flip, workers, cache={} if small else None, sources=sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.classes

    def __len__(self) -> int:
        return len(self.images.paths)

    def choose(self, size: int, generator: Generator) -> Tensor:
        """[index, mirrored] of each sample: (B,2)."""
        index = torch.randint(len(self), (size,), generator=generator)
        mirrored = torch.randint(2, (size,), generator=generator) * self.flip
        return torch.stack([index, mirrored], dim=1)

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        index, mirrored = choice.unbind(1)
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(self.read, index.tolist()))
        pixels = torch.stack([pixels for pixels, _ in found])
        pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(-1), pixels)
        return to_unit(pixels), self.images.labels[torch.tensor([used for _, used in found])]

    def read(self, index: int) -> tuple[Tensor, int]:
        """The first readable image from an index on, and its index."""
        for i in range(index, index + len(self)):
            i %= len(self)
            if i in self.broken:
                continue
            try:
                return self.pixels(i), i
            except Exception as error:  # a damaged file may raise anything: Pillow lists nothing
                if i not in self.broken:
                    self.broken.add(i)
                    say(f"{self.images.paths[i]}: cannot be read, left out ({type(error).__name__}: {error})")
                    self._mourn(self.images.labels[i])
        raise ValueError(f"{self.images.folder}: none of its {len(self)} images can be read")

    def _mourn(self, label: Tensor) -> None:
        """Say so if no image of a class is left."""
        of_class = (self.images.labels == label).nonzero()[:, 0].tolist()
        if self.broken.issuperset(of_class):
            say(f"{self.images.folder}: none of the {len(of_class)} images of the class {self.images.classes[label]} "
                "can be read: it is not trained")

    def pixels(self, index: int) -> Tensor:
        """One image (C,S,S) uint8, from memory if it is there."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        def note(words: str) -> None:
            if words not in self.said:
                self.said.add(words)
                say(f"{self.images.paths[index]}: {words}, here and in all that follow")

        pixels = decode(self.images.paths[index], self.shape[1], self.shape[0], note)
        if self.cache is not None:
            self.cache[index] = pixels
        return pixels
