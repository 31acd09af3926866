"""The recorded numbers in tests/data (see its README.md), and how to compare with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gmflow_core import GaussianMixture, GMDiT, GMDiTConfig, SpectrumConfig, SpectrumMLP

DATA = Path(__file__).parent / "data"
LABELS = torch.tensor([3, 7])  # of all recorded trajectories


@cache
def load(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def mixture(tensors: dict[str, Tensor], prefix: str) -> GaussianMixture:
    return GaussianMixture(*(tensors[prefix + n] for n in ("means", "logweights", "logstds")))


def worst(actual: Tensor, expected: Tensor) -> float:
    """max |difference| relative to max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    error = worst(actual, expected)
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"


def assert_same_mixture(actual: GaussianMixture, expected: GaussianMixture, relative: float = 1e-5) -> None:
    for name in ("means", "log_weights", "log_std"):
        assert_close(getattr(actual, name), getattr(expected, name), relative)


def _config(part: str) -> dict:
    return json.loads((DATA / "ckpt_small" / part / "config.json").read_text())


def _weights(part: str) -> dict[str, Tensor]:
    return load_file(DATA / "ckpt_small" / part / "diffusion_pytorch_model.safetensors")


def small_config() -> GMDiTConfig:
    c = _config("transformer")
    return GMDiTConfig(
        num_classes=c["num_embeds_ada_norm"], num_gaussians=c["num_gaussians"], in_channels=c["in_channels"],
        sample_size=c["sample_size"], patch_size=c["patch_size"], num_layers=c["num_layers"],
        num_heads=c["num_attention_heads"], head_dim=c["attention_head_dim"], logstd_width=c["logstd_inner_dim"],
    )


def small_network(**kwargs) -> GMDiT:
    """The recorded random GM-DiT. Not through load_checkpoint: its tests are elsewhere."""
    network = GMDiT(small_config(), **kwargs)
    network.load_state_dict(_weights("transformer"))
    return network.requires_grad_(False)


def small_spectrum() -> SpectrumMLP:
    c = _config("spectrum_net")
    spectrum = SpectrumMLP(SpectrumConfig(c["base_size"], c["layers"]))
    spectrum.load_state_dict(_weights("spectrum_net"))
    return spectrum.requires_grad_(False)


def recorded_axes(eigenvectors: Tensor) -> Tensor:
    """Their eigenvectors (B,1,1,C,C), ascending, as our axes (B,C,C), descending. Signs matter."""
    return eigenvectors[:, 0, 0].flip(-1)
