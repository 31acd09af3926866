"""A checkpoint under evaluation: loaded, with its VAE, and how likely it finds real images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core import Checkpoint, GMDenoiser, GMDiTConfig, load_checkpoint
from gmflow_core.checkpoint import read_state
from gmflow_core.files import shown
from gmflow_core.path import add_noise

from ..console import say
from ..data.decode import to_unit
from ..vae import Decoder, load_vae
from .reference import Images, file_digest

NLL_SAMPLES, NLL_SIGMAS = 512, 16
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow makes grey pictures for training


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint under evaluation."""

    name: str
    digest: str
    checkpoint: Checkpoint
    decode: Decoder | None       # None where samples are images already

    @property
    def vanilla(self) -> bool:
        return self.checkpoint.config.num_gaussians == 1 and self.checkpoint.config.constant_logstd is not None

    @property
    def image_size(self) -> int:
        size = self.checkpoint.config.sample_size
        return size if self.decode is None else self.decode.size(size)

    def images(self, x: Tensor) -> Tensor:
        """Samples (B,C,H,W) as images (B,3,S,S) on the CPU."""
        return (x.float().expand(-1, 3, -1, -1) if self.decode is None else self.decode(x)).cpu()


def open_subject(path: Path, vae: str | None, device: torch.device, precision: str) -> Subject:
    """ValueError if it is no checkpoint of images, or wants a VAE and there is none."""
    checkpoint = load_checkpoint(path)
    config, space = checkpoint.config, checkpoint.latent_space
    if not isinstance(config, GMDiTConfig):
        raise ValueError(f"{path}: a model of 2D points; for those see python -m train.reproduce checkerboard")
    decode = None
    if space.kind != "rgb":
        if vae is None:
            raise ValueError(f"{path}: a model of latents ({space.kind}); name their VAE with --vae")
        decode = Decoder(load_vae(vae, device), vae, space, config.in_channels)
    checkpoint.model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if checkpoint.spectrum is not None:
        checkpoint.spectrum.to(device)
    name = path.parent.name if path.stem == "checkpoint" and path.parent.name else path.stem
    return Subject(name, digest(path), checkpoint, decode)


def digest(path: Path) -> str:
    """Of what a checkpoint says and holds, whatever the order of its metadata: equal content has an equal digest."""
    raw = read_state(path)
    said = {
        "config": raw.config.to_dict(), "spectrum": raw.spectrum_config and raw.spectrum_config.to_dict(),
        "latent_space": asdict(raw.latent_space), "class_names": raw.class_names, "training": raw.training,
    }
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for part in (raw.state, raw.spectrum_state or {}):
        for name, value in sorted(part.items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:12]


def old_digest(path: Path | None) -> str:
    """What earlier versions took for a checkpoint's digest: that of its files' bytes."""
    if path is None:
        return ""
    total = hashlib.sha256()
    for part in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        total.update(bytes.fromhex(file_digest(part)))
    return total.hexdigest()[:12]


def classes_in_data(subject: Subject, images: Images) -> Tensor | None:
    """The data's index of every class of the model, by name: (num_classes,) int64. None if they cannot be compared.

    A model that names none is taken to have the data's, in their order, if it has as many; that is said.
    """
    names, count, there = subject.checkpoint.class_names, subject.checkpoint.config.num_classes, images.class_names
    if images.labels is None or there is None:
        return None
    if names is None and count == len(there):
        say(f"{subject.name} names no classes: they are taken to be the data's, in that order")
        return torch.arange(count)
    if names is None or sorted(names) != sorted(there) or len(set(names)) < len(names):
        say(f"{subject.name} has not the data's classes ({shown(names and ', '.join(names))}; in the data "
            f"{shown(', '.join(there))}): no accuracy, no likelihood")
        return None
    return torch.tensor([there.index(name) for name in names])


@torch.no_grad()
def likelihood(subject: Subject, images: Images, batch: int) -> dict | None:
    r"""NLL -log q(u | x_t) of the true velocity under the predicted mixture, in nats a pixel, summed over channels.

    Its mean over 16 noise levels evenly between 0 and 1 and up to 512 real images, and by quarter of sigma. None for
    a vanilla model, whose variance is not learned, and without class labels that are the model's.
    """
    classes = None if subject.vanilla else classes_in_data(subject, images)
    if classes is None:
        return None
    of_model = classes.argsort()  # the model's index of every class of the data
    denoiser = GMDenoiser(subject.checkpoint.model)
    device = next(subject.checkpoint.model.parameters()).device
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:NLL_SAMPLES]
    sums = torch.zeros(NLL_SIGMAS, dtype=torch.float64)
    for i, index in enumerate(chosen.split(batch)):
        x_0 = to_unit(images.pixels(index))
        if subject.checkpoint.config.in_channels == 1:
            x_0 = (x_0 * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        x_0 = x_0.to(device) if subject.decode is None else subject.decode.encode(x_0)
        labels, generator = of_model[images.labels[index]].to(device), torch.Generator().manual_seed(i)
        for j in range(NLL_SIGMAS):
            sigma = (j + 0.5) / NLL_SIGMAS
            noise = torch.randn(x_0.shape, generator=generator).to(device)
            velocity = denoiser.velocity(add_noise(x_0, noise, sigma), sigma, labels)
            sums[j] -= velocity.log_prob(noise - x_0).double().mean((1, 2)).sum().item()
    means = sums / len(chosen)
    return {"mean": means.mean().item(), "quarters": means.view(4, -1).mean(1).tolist()}
