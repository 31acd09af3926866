"""Sample pictures of a run in progress."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow_core import GMDenoiser, flow_sigmas
from gmflow_core.files import write_picture
from gmflow_core.pictures import image_grid, scatter
from gmflow_core.sampler import USUAL, SamplerOptions, sample

STEPS = 8
CLASSES = 10  # at most so many rows


@torch.no_grad()
def save_samples(nets: nn.ModuleDict, data, path: Path, per_class: int = 8, device: torch.device | None = None,
                 options: SamplerOptions = USUAL):
    """Samples of 8 steps from fixed noise: a grid of images, one row a class, or a scatter of 2D points.

    ``options`` say how, by default as nodes and command line sample (GM-ODE 2); their time shift is the grid's too.
    Of many classes ten are shown; of latents the first three channels.
    The networks sample on ``device`` and go back to their own. Returns the picture, a Pillow image.
    """
    model, generator = nets["model"], torch.Generator().manual_seed(0)
    home = next(model.parameters()).device
    device = device or home
    flat = len(data.shape) == 1
    labels = None if flat else shown_classes(model.config.num_classes).repeat_interleave(per_class).to(device)
    count = 4096 if flat else len(labels)
    x = torch.randn((count, *data.shape), generator=generator).to(device)
    denoiser = GMDenoiser(model.to(device), labels)
    x = sample(denoiser, x, flow_sigmas(STEPS, options.shift), options).cpu()
    model.to(home)
    picture = scatter(x, 4.5) if flat else image_grid(x, per_class, scale=math.ceil(32 / x.shape[-1]))
    write_picture(path, picture)
    return picture


def shown_classes(count: int) -> Tensor:
    """All classes, or ten of them evenly spaced."""
    return torch.linspace(0, count - 1, min(count, CLASSES)).round().long()
