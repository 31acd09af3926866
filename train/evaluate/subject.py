"""A checkpoint under evaluation: loaded, with its VAE, and how likely it finds real images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core import Checkpoint, GMDenoiser, GMDiTConfig, load_checkpoint
from gmflow_core.path import add_noise

from ..data.images import to_unit
from ..vae import Decoder, load_vae
from .reference import Images

NLL_SAMPLES, NLL_SIGMAS = 512, 16


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
        return (x.float() if self.decode is None else self.decode(x)).cpu()


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
    """Of a checkpoint's files: tells whether it is the one that was evaluated."""
    total = hashlib.sha256()
    for part in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            content = hashlib.sha256()
            while chunk := file.read(2**20):
                content.update(chunk)
            total.update(content.digest())
    return total.hexdigest()[:12]


@torch.no_grad()
def likelihood(subject: Subject, images: Images, batch: int) -> dict | None:
    r"""NLL -log q(u | x_t) of the true velocity under the predicted mixture, in nats a pixel, summed over channels.

    Its mean over 16 noise levels evenly between 0 and 1 and up to 512 real images, and by quarter of sigma. None for
    a vanilla model, whose variance is not learned, and without class labels that are the model's.
    """
    names = subject.checkpoint.class_names
    if subject.vanilla or images.labels is None or names is None or images.class_names != tuple(names):
        return None
    denoiser = GMDenoiser(subject.checkpoint.model)
    device = next(subject.checkpoint.model.parameters()).device
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:NLL_SAMPLES]
    sums = torch.zeros(NLL_SIGMAS, dtype=torch.float64)
    for i, index in enumerate(chosen.split(batch)):
        x_0 = to_unit(images.pixels(index))
        x_0 = x_0.to(device) if subject.decode is None else subject.decode.encode(x_0)
        labels, generator = images.labels[index].to(device), torch.Generator().manual_seed(i)
        for j in range(NLL_SIGMAS):
            sigma = (j + 0.5) / NLL_SIGMAS
            noise = torch.randn(x_0.shape, generator=generator).to(device)
            velocity = denoiser.velocity(add_noise(x_0, noise, sigma), sigma, labels)
            sums[j] -= velocity.log_prob(noise - x_0).double().mean((1, 2)).sum().item()
    means = sums / len(chosen)
    return {"mean": means.mean().item(), "quarters": means.view(4, -1).mean(1).tolist()}
