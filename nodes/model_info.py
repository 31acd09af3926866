"""What a GMFlow model is and takes: its own description, latents and labels, without a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gmflow_core import GMDiTConfig, SpectrumMLP
from ..gmflow_core.model import LatentSpace
from ..gmflow_core.schedule import TOTAL_SUBSTEPS

LABELS = "gmflow_labels"     # in a conditioning's dict: int64 (N,)
CLASSES = "gmflow_classes"   # beside it: how many classes the model has that they are made for
MOST_TIMES = 8               # a latent's longer side over the trained size


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """What a GMFlow checkpoint says of itself."""

    config: GMDiTConfig
    class_names: tuple[str, ...] | None
    latent_space: LatentSpace
    spectrum: SpectrumMLP | None  # on the CPU in float32; no part of the module tree, it is tiny
    steps: int = 8                # as recommended
    final_step: float = 1.0       # the last step's raw length over that of the others
    shift: float = 1.0            # of time, on the grid that it is best sampled on
    total_substeps: int = TOTAL_SUBSTEPS  # of all steps together
    recipe: str = "gmflow"        # of substeps and temperature

    @property
    def components(self) -> int:
        return self.config.num_gaussians

    def enter(self, x: Tensor) -> Tensor:
        """A latent of the host in the space of the mixture: itself."""
        return x

    leave = enter

    def time_shift(self, network) -> float:
        """The time shift of the host's network: its own, or that of a ModelSampling patch."""
        return network.time_shift()


def check_latent(info: ModelInfo, noise, latent) -> None:
    """ValueError for a latent that this model cannot paint on."""
    config = info.config
    size, patch = tuple(noise.shape[2:]), config.patch_size
    if noise.ndim != 4 or noise.shape[1] != config.in_channels or any(n % patch for n in size):
        kind = "RGB pixels" if info.latent_space.kind == "rgb" else "latents of Stable Diffusion's VAE"
        raise ValueError(
            f"latent: got {noise.shape[1]} channels of size {' x '.join(map(str, size))}; this model paints "
            f"{config.in_channels} channels ({kind}), height and width multiples of {patch}, trained at "
            f"{config.sample_size} x {config.sample_size}; GMFlow Empty Latent makes one"
        )
    check_size(info, size)
    if latent is not None and not torch.isfinite(latent).all():
        raise ValueError("latent: it holds NaN or infinite values; "
                         "the node that made it failed (a VAE in half precision?)")


def check_size(info: ModelInfo, size: Sequence[int]) -> None:
    """ValueError for a latent much larger than the model was trained on. Nothing is computed: it may be huge."""
    trained = info.config.sample_size
    if max(size) > MOST_TIMES * trained:
        raise ValueError(
            f"latent: {' x '.join(map(str, size))} is {max(size) / trained:.3g} times the {trained} x {trained} "
            f"that this model was trained at, and more than {MOST_TIMES} times is no picture and takes forever; "
            "GMFlow Empty Latent makes one"
        )


def check_vae(info: ModelInfo, vae) -> None:
    """ValueError for a VAE that cannot decode what this model paints."""
    channels, rgb = info.config.in_channels, info.latent_space.kind == "rgb"
    right = "leave vae open, or connect pixel_space of Load VAE" if rgb else "connect a Stable Diffusion 1 VAE"
    kind = "RGB pixels" if rgb else f"{channels}-channel latents of Stable Diffusion's VAE"
    if getattr(vae, "latent_dim", 2) != 2 or getattr(vae, "output_channels", 3) != 3:
        raise ValueError(f"vae: this one is for video or sound, and this model paints {kind}; {right}")
    got, scale = getattr(vae, "latent_channels", channels), getattr(vae, "upscale_ratio", 1 if rgb else 8)
    if got != channels:
        raise ValueError(f"vae: this one decodes {got} channels, and this model paints {kind}; {right}")
    if rgb and scale != 1:
        raise ValueError(f"vae: this one enlarges latents {scale} times, and this model paints {kind}; {right}")


def make_conditioning(labels: list[int], num_classes: int) -> list:
    """CONDITIONING of class indices. Its tensor (N,1,1) holds label + 1, so that what other nodes do to it is seen."""
    values = torch.tensor(labels, dtype=torch.int64)
    return [[(values + 1).float().reshape(-1, 1, 1), {LABELS: values, CLASSES: num_classes}]]


def null_conditioning(config: GMDiTConfig) -> list:
    """CONDITIONING of no class: what classifier guidance moves away from."""
    return make_conditioning([config.null_label], config.num_classes)


def read_labels(tensor, labels, num_classes, config: GMDiTConfig, role: str) -> Tensor:
    """int64 (N,) of a conditioning: its tensor, and what lies in its dict under LABELS and CLASSES.

    The null label for a zeroed or empty one; ValueError for one that holds text, a blend or another model's classes.
    """
    if tensor is None or not tensor.any():
        return torch.tensor([config.null_label])
    if labels is None:
        raise ValueError(f"{role}: this conditioning holds text or something else, not classes; "
                         "use GMFlow Class Conditioning")
    if num_classes != config.num_classes:
        raise ValueError(f"{role}: its labels are made for a model of {num_classes} classes; "
                         f"this one has {config.num_classes}")
    if tensor.numel() != len(labels) or not torch.equal(tensor.flatten().cpu(), (labels + 1).float()):
        raise ValueError(f"{role}: classes can not be averaged or concatenated; to blend some, use ConditioningCombine")
    return labels
