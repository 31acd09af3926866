"""One row of an evaluation: samples of one setting, shared among the processes of a team, and all figures of them.

Shapes: N samples, D features, S pixels a side.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmflow_core.files import write_atomically, write_picture
from gmflow_core.pictures import image_grid

from ..team import Team
from .features import Features
from .image_metrics import frechet_distance, moments, overshoot, quantise, saturation
from .neighbours import neighbour_accuracy, precision_recall
from .reference import Reference
from .settings import Setting, sample_images
from .subject import Subject

SAMPLES = "samples"  # the folder of pictures and sample sets

Judge = Callable[[Tensor, Tensor], dict[str, float]]  # images (N,3,S,S) in [-1,1] and labels (N,) -> figures


@dataclass(frozen=True, eq=False)
class Samples:
    """What is kept of a row's samples, or of a batch of them."""

    features: Tensor            # (N,D)
    sums: dict[str, float]      # of saturation and overshoot
    images: Tensor              # (n,3,S,S) in [-1,1]: the first n, as many as are looked at
    pixels: np.ndarray | None   # (N,S,S,3) uint8, where a sample set was asked for
    seconds: float              # of sampling


def labels_of(subject: Subject, samples: int) -> Tensor:
    """The model's classes in turn. (N,) int64"""
    return torch.arange(samples) % subject.checkpoint.config.num_classes


def draw(team: Team, subject: Subject, setting: Setting, features: Features, keep: int, pixels: bool,
         args: Namespace) -> Samples | None:
    """Samples of a setting; members of the team take batches in turn, the first gets all, others None.

    ``keep``: how many images; ``pixels``: all of them, quantised.
    """
    labels, array, parts = labels_of(subject, args.samples), None, []
    starts = range(0, args.samples, args.batch)

    def batch(i: int) -> Samples:
        start, first = time.perf_counter(), starts[i]
        part = labels[first : first + args.batch]
        x = subject.images(sample_images(subject.checkpoint, setting, part, args.seed, first))
        seconds = time.perf_counter() - start
        if not x.isfinite().all():
            raise ValueError(f"{subject.name}, {setting.title}, {setting.steps} steps: samples are not finite")
        shades = quantise(x)
        return Samples(
            features(shades), {"saturation": saturation(shades).sum().item(), "overshoot": overshoot(x).sum().item()},
            x[: max(keep - first, 0)].clone(), shades.permute(0, 2, 3, 1).numpy() if pixels else None, seconds,
        )

    for i, part in enumerate(team.in_turn(starts, batch, desc=f"{setting.title}, {setting.steps} steps", unit="batch")):
        if part.pixels is not None:
            if array is None:
                array = np.empty((args.samples, *part.pixels.shape[1:]), np.uint8)
            array[starts[i] : starts[i] + len(part.pixels)] = part.pixels
        parts.append(Samples(part.features, part.sums, part.images, None, part.seconds))
    if not team.first:
        return None
    sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    rounds = [max(part.seconds for part in parts[i : i + team.size]) for i in range(0, len(parts), team.size)]
    found = torch.cat([part.features for part in parts])
    return Samples(found, sums, torch.cat([part.images for part in parts]), array, sum(rounds))


def figures(subject: Subject, setting: Setting, samples: Samples, reference: Reference, judge: Judge | None,
            classes: Tensor | None, device: torch.device) -> dict:
    """All figures of a row. ``classes``: the data's index of every class of the model."""
    count = len(samples.features)
    labels = labels_of(subject, count)
    precision, recall = precision_recall(reference.features, reference.radius, samples.features, device=device)
    row = {
        "checkpoint": subject.name, "digest": subject.digest, "components": subject.checkpoint.config.num_gaussians,
        **setting.to_dict(), "fid": frechet_distance(reference.moments, moments(samples.features)),
        "precision": precision, "recall": recall, **{name: value / count for name, value in samples.sums.items()},
    }
    if judge is not None and classes is not None:
        row |= judge(samples.images, classes[labels])
    elif classes is not None:
        row["accuracy"] = neighbour_accuracy(reference.features, reference.labels, samples.features, classes[labels],
                                             device=device)
    return row | {"seconds": samples.seconds, "images_per_second": count / samples.seconds}


# ---- files -------------------------------------------------------------------------------------

def file_name(subject: Subject, setting: Setting) -> str:
    """Of a row's picture and sample set, in OUT, without an ending."""
    words = [subject.name, setting.title, f"{setting.steps} steps", setting.guidance_title]
    return f"{SAMPLES}/" + "".join(c if c.isalnum() or c in "-.+" else "_" for c in " ".join(words))


def save_picture(path: Path, images: Tensor) -> None:
    """A row's first images (n,3,S,S), side by side."""
    path.parent.mkdir(exist_ok=True)
    columns = min(-(-len(images) // 2), 16)
    write_picture(path, image_grid(images, columns, scale=max(1, 48 // images.shape[-1])))


def save_set(path: Path, pixels: np.ndarray, labels: Tensor | None) -> None:
    """A sample set in the layout of ADM's evaluation: ``arr_0`` pixels (N,S,S,3) uint8, ``arr_1`` labels (N,) int64,
    where there are classes."""
    arrays = [pixels] + ([] if labels is None else [labels.numpy()])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # numpy would add an ending to a name
            np.savez(file, *arrays)

    path.parent.mkdir(exist_ok=True)
    write_atomically(path, write)
