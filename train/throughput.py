"""How fast a run is: images a second, and on CUDA the share of the GPU's peak and the memory."""

from __future__ import annotations

import re

import torch

from gmflow_core import GMDiTConfig, GMMLPConfig
from gmflow_core.model.gmmlp import FEATURES

# Dense bf16 tensor-core peaks in TFLOP/s from the makers' data sheets; the first whole name that fits counts.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "A100": 312,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "A6000": 155, "A40": 150, "A10G": 70, "A10": 125,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}


def forward_flops(config: GMDiTConfig | GMMLPConfig) -> int:
    """Of one sample: two for each multiplication in a matrix product, nothing else."""
    k, c = config.num_gaussians, config.in_channels
    if isinstance(config, GMMLPConfig):
        inner = (config.num_layers - 1) * config.width**2
        head = config.width * (k * (c + 1) + (config.constant_logstd is None))
        return 2 * (2 * FEATURES * config.width + inner + head)
    d, p, w = config.width, config.patch_size**2, config.logstd_width
    n = (config.sample_size // config.patch_size) ** 2
    block = 12 * n * d * d + 2 * n * n * d + 6 * d * d  # projections and MLP, attention, modulation
    ends = n * p * c * d + n * d * p * k * (c + 1) + 2 * d * d + 256 * d + d * d
    deviation = d * w + w if config.constant_logstd is None else 0
    return 2 * (config.num_layers * block + ends + deviation)


def peak_flops(name: str) -> float | None:
    """Of a GPU, by its name; None if it is unknown."""
    return next((1e12 * peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


class Speed:
    """Figures since the last report."""

    def __init__(self, config, team, step: int, seconds: float):
        self.config, self.team, self.step, self.seconds = config, team, step, seconds

    def report(self, step: int, seconds: float) -> dict[str, float]:
        """``images_per_second`` of the team; on CUDA ``mfu`` (of the known bf16 peaks) and ``memory_gb``,
        this process's peak."""
        steps, elapsed = step - self.step, seconds - self.seconds
        self.step, self.seconds = step, seconds
        if elapsed <= 0:
            return {}
        rate = steps * self.config.batch_size / elapsed
        figures = {"images_per_second": rate}
        if self.team.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated(self.team.device) / 1e9
            peak = peak_flops(torch.cuda.get_device_name(self.team.device))
            if peak and self.config.precision == "bf16":
                figures["mfu"] = 3 * forward_flops(self.config.model) * rate / (peak * self.team.size)
        return figures
