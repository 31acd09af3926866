"""Real images that samples are compared with: the digits, a folder of classes, or a file of ADM's evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files import file_size, write_safetensors

from ..data.digits import INKS, Digits
from ..data.images import ImageFolder, find_images, fingerprint
from ..team import Team
from .features import Features, load_kept
from .image_metrics import moments, quantise, saturation
from .neighbours import CPU, neighbour_radius

NEIGHBOURS = 10_000  # so many images at most are what precision, recall and accuracy look at
ALONE = Team(CPU)


class DigitImages:
    """Every digit in every ink."""

    name, class_names, known = "digits", Digits.class_names, None
    content = "digits"  # what results and remembered statistics are of: the data, whatever it is called

    def __init__(self):
        self.data = Digits.load()
        self.labels = self.data.labels.repeat(len(INKS))

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Tensor) -> Tensor:
        """Images (n,3,16,16) uint8."""
        digits = len(self.data)
        return quantise(self.data.ink(self.data.grey[index % digits], index // digits))


class FolderImages:
    """A folder with a subfolder for each class, cut to a size as for training."""

    known = None

    def __init__(self, folder: str, size: int):
        images = find_images(folder)
        self.name, self.class_names, self.labels = Path(folder).resolve().name, images.classes, images.labels
        self.images = ImageFolder(images, (3, size, size), flip=False)
        self.content = fingerprint(images)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Tensor) -> Tensor:
        return torch.stack([self.images.read(i)[0] for i in index.tolist()])


class ArrayImages:
    """A file in the layout of ADM's evaluation: images ``arr_0`` (N,H,W,3) uint8,
    maybe with ``mu`` and ``sigma`` of FID."""

    class_names, labels = None, None

    def __init__(self, path: str):
        import numpy as np

        self.name, self.content = Path(path).name, file_digest(Path(path))
        try:
            file_size(Path(path))
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("arr_0", "mu", "sigma") if key in file}
        except (OSError, ValueError) as error:
            raise ValueError(f"--data {path}: cannot be read as .npz ({error})") from None
        images = arrays.get("arr_0")
        if images is None or images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"--data {path}: expected images arr_0 (N,H,W,3) uint8, as ADM's evaluation files have "
                             f"them, got {'none' if images is None else f'{images.shape} {images.dtype}'}")
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        given = "mu" in arrays and "sigma" in arrays
        self.known = (torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])) if given else None

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor) -> Tensor:
        return self.images[index]


def file_digest(path: Path) -> str:
    """Of a file's bytes; of nothing where there is no such file, which who reads it will say."""
    total = hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                total.update(part)
    return total.hexdigest()


Images = DigitImages | FolderImages | ArrayImages


def real_images(data: str, size: int) -> Images:
    """What ``--data`` names. ValueError if it is nothing of that kind."""
    if data == "digits":
        if size != Digits.shape[1]:
            raise ValueError(f"--data digits are 16x16 pictures, the model makes {size}x{size}")
        return DigitImages()
    if Path(data).suffix == ".npz":
        return ArrayImages(data)
    return FolderImages(data, size)


@dataclass(frozen=True, eq=False)
class Reference:
    """What is kept of real images."""

    name: str
    count: int             # how many were measured
    mean: Tensor           # (D,) of the features of all of them
    cov: Tensor            # (D,D)
    features: Tensor       # (M,D) of at most NEIGHBOURS of them
    radius: Tensor         # (M,) the distance of each to its third neighbour, for precision
    labels: Tensor         # (M,) their classes; -1 where there are none
    saturation: float

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.cov


def measure_reference(images: Images, features: Features, limit: int, batch: int = 256,
                      team: Team = ALONE) -> Reference | None:
    """The features of all images, or of ``limit`` of them drawn at random. Members of a team take batches in turn,
    the first has the result, others None."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
    batches = order.split(batch)

    def measure(i: int) -> tuple[Tensor, Tensor]:
        pixels = images.pixels(batches[i])
        return features(pixels), saturation(pixels)

    found = list(team.in_turn(batches, measure, desc="real images", unit="batch"))
    return team.at_first(lambda: reference_of(images, order, *map(torch.cat, zip(*found, strict=True)), team.device))


def reference_of(images: Images, order: Tensor, features: Tensor, shades: Tensor, device: torch.device) -> Reference:
    """Of features (N,D) and saturations (N,) of the images of an order (N,)."""
    mean, cov = images.known or moments(features)
    if mean.shape != features.shape[1:]:
        raise ValueError(f"{images.name}: its mu has {len(mean)} features, the feature network {features.shape[1]}")
    labels = torch.full((len(order),), -1) if images.labels is None else images.labels[order]
    some = features[:NEIGHBOURS].clone()
    return Reference(
        images.name, len(order), mean.double(), cov.double(), some,
        neighbour_radius(some, device=device, what="radii of real images"), labels[:NEIGHBOURS].clone(),
        shades.mean().item(),
    )


# ---- files -------------------------------------------------------------------------------------

TENSORS = ("mean", "cov", "features", "radius", "labels")


def save_reference(path: Path, reference: Reference, kind: str) -> None:
    """``kind`` says what the features are of."""
    tensors = {name: getattr(reference, name).contiguous() for name in TENSORS}
    facts = {"kind": kind, "name": reference.name, "count": str(reference.count),
             "saturation": repr(reference.saturation)}
    write_safetensors(path, tensors, facts)


def load_reference(path: Path, kind: str) -> Reference | None:
    """A saved reference; None if it is not there, damaged, or of other features."""
    return load_kept(path, kind, lambda facts, tensors: Reference(
        facts["name"], int(facts["count"]), saturation=float(facts["saturation"]), **tensors))
