"""Every pixel's components in one small file, for a page that shows them under the pointer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from ..files import write_safetensors
from ..pictures import to_uint8
from .beliefs import weight_entropy
from .charts import component_colours
from .scene import Decode, Scene

MOST_BYTES = 4 * 2**20
PARTS = {
    "aligned": "hypotheses, in which a pixel's components are merged, numbered as in the picture",
    "ranked": "components by their rank at this pixel", "raw": "components as the network numbers them",
}


def save_pixels(scene: Scene, path: Path, colours: Decode) -> bool:
    """Write the components of a scene's every pixel as ``.safetensors``; False if that would be over MOST_BYTES.

    N components in the scene's order: ``weights`` (H,W,N), ``means`` (H,W,N,C) and ``entropy`` (H,W) in bits,
    half precision; ``rgb`` (H,W,1+N,3), uint8: what the mean and each component look like, by ``colours``
    (x_0 (N,C,H,W) to RGB of the same size). The metadata's ``gmflow_pixels`` is JSON: title, what the N are, number of
    all components, standard deviation, largest entropy, and the components' colours.
    """
    whole, shown = scene.step.corrected, scene.mixture
    (height, width), count = scene.latent, shown.components
    if height * width * (2 * count * (1 + whole.channels) + 2 + 3 * (1 + count)) > MOST_BYTES:
        return False
    rgb = to_uint8(colours(torch.cat([whole.mean(), shown.means[0]])))                      # (1+N,H,W,3)
    tensors = {
        "weights": shown.weights[0, :, 0].permute(1, 2, 0).half(), "means": shown.means[0].permute(2, 3, 0, 1).half(),
        "entropy": weight_entropy(whole)[0].half(), "rgb": rgb.permute(1, 2, 0, 3),
    }
    about = {
        "title": scene.title, "parts": PARTS[scene.arrangement], "components": whole.components,
        "std": round(float(whole.log_std.mean().exp()), 6),
        "bits": math.log2(whole.components), "colours": component_colours(count),
    }
    write_safetensors(path, {name: t.contiguous() for name, t in tensors.items()}, {"gmflow_pixels": json.dumps(about)})
    return True
