"""The networks and what their channels are."""

from .gmdit import GMDiT, GMDiTConfig, pack_mixture, unpack_mixture
from .gmmlp import GMMLP, GMMLPConfig
from .latent import SD_VAE_SCALE, LatentSpace
from .spectrum import SpectrumConfig, SpectrumMLP

__all__ = [
    "SD_VAE_SCALE", "GMDiT", "GMDiTConfig", "GMMLP", "GMMLPConfig", "LatentSpace", "SpectrumConfig", "SpectrumMLP",
    "pack_mixture", "unpack_mixture",
]
