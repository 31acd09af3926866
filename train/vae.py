"""diffusers' AutoencoderKL, for encoding pictures and decoding samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmflow_core.model import LatentSpace


def load_vae(source: str, device: torch.device):
    """An AutoencoderKL from a folder or from the Hugging Face hub;
    ValueError without diffusers or without one there."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"a VAE needs the package diffusers ({reason}): "
                         "python -m pip install diffusers accelerate") from None
    try:
        vae = AutoencoderKL.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no AutoencoderKL could be loaded from it ({error}); expected a diffusers folder "
                         "with config.json, or a name on the hub such as stabilityai/sd-vae-ft-ema") from None
    return vae.eval().requires_grad_(False).to(device)


class Decoder:
    """Samples of a latent space (B,C,H,W) to images (B,3,S,S) in [-1,1]; ``size``(latent size) is S."""

    def __init__(self, vae, source: str, space: LatentSpace, channels: int):
        wanted = vae.config.latent_channels
        if wanted != channels:
            raise ValueError(f"--vae {source} decodes {wanted} channels, the model makes {channels}: "
                             "name the VAE it was trained with")
        scale = vae.config.get("scaling_factor")
        if scale is not None and not math.isclose(scale, space.scale, rel_tol=1e-3):
            raise ValueError(f"--vae {source} has the scale {scale:g}, the model's latents {space.scale:g}: "
                             "name the VAE it was trained with")
        self.vae, self.space, self.factor = vae, space, 2 ** (len(vae.config.block_out_channels) - 1)

    def size(self, latent: int) -> int:
        return latent * self.factor

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.space.scale + self.space.shift).sample.float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mean latent of each image, scaled and shifted."""
        mean = self.vae.encode(images.to(self.vae.device)).latent_dist.mean
        return (mean - self.space.shift) * self.space.scale
