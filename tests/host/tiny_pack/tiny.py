"""Inside ComfyUI: pi-Flow's tiny random bases as stock MODELs, and their stored conditionings. For tests only.

ComfyUI 0.3.64 knows FLUX.1 and Qwen-Image in their published sizes alone, and no version tells Qwen-Image's from a
file: there the model is built here, of ComfyUI's own classes. Else ComfyUI's loader gets the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import torch
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parents[2] / "data" / "piflow"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = not hasattr(comfy.supported_models, "Flux2")   # 0.3.64: fixed sizes, norms of query and key are called scale
NAMES = ["gmflux_tiny", "gmqwen_tiny", *([] if OLD else ["gmflux2_tiny"])]
FLUX2 = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    **{f"{name}.linear": f"{name}.lin"
       for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")},
}


def io(name: str) -> dict:
    return load_file(DATA / name / "io.safetensors")


def state_dict(name: str) -> dict:
    """The base's tensors in ComfyUI's layout, by ComfyUI's own table of names (FLUX.2's gaps filled in)."""
    theirs = load_file(DATA / name / "base" / WEIGHTS)
    if name == "gmqwen_tiny":
        return theirs
    table = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 2, "hidden_size": 128})
    ours: dict = {}
    for key, value in theirs.items():
        module, _, kind = key.rpartition(".")
        entry = table.get(key) or (f"{FLUX2[module]}.{kind}" if module in FLUX2 else None)
        target, part, turn = (entry, None, None) if isinstance(entry, str) else (*entry, None)[:3]
        if turn is not None:
            value = turn(value)
        if part is None:
            ours[target] = value
        else:
            axis, start, size = part
            ours.setdefault(target, {})[start] = value
    joined = {key: torch.cat([value[start] for start in sorted(value)]) if isinstance(value, dict) else value
              for key, value in ours.items()}
    return ({re.sub(r"(query|key)_norm\.weight", r"\1_norm.scale", key): value for key, value in joined.items()} if OLD
            else joined)


def base(name: str, dtype: torch.dtype = torch.float32):
    """The base as a MODEL."""
    weights = {key: value.clone() for key, value in state_dict(name).items()}
    if name != "gmqwen_tiny" and not OLD:
        return comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": dtype})
    if name == "gmqwen_tiny":
        config = comfy.supported_models.QwenImage({
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 1,
            "joint_attention_dim": 32,
        })
    else:
        config = comfy.supported_models.Flux({
            "image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 1, "mlp_ratio": 4.0, "theta": 10000,
            "out_channels": 16, "qkv_bias": True, "patch_size": 2, "in_channels": 16, "hidden_size": 128,
            "context_in_dim": 32, "vec_in_dim": 24, "depth": 1, "depth_single_blocks": 2, "guidance_embed": True,
        })
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    cpu = torch.device("cpu")
    model = config.get_model(weights, "", device=cpu)
    model.load_model_weights(weights, "")
    model.diffusion_model.to(dtype)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def encoder(layout: str):
    """A VAE whose latents are SD's, or those of a base: 16 channels, with a time axis, or 128 at half the size."""
    channels = {"SD": 4, "NaN": 4, "gmflux2_tiny": 32}.get(layout, 16)
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, value in comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict().items():
        if value.ndim:  # ComfyUI leaves weights as memory was
            fan = value.numel() / len(value)
            value = torch.randn(value.shape, generator=generator) / fan**0.5 if fan > 1 else torch.zeros_like(value)
        weights[key] = value

    class Encoder(comfy.sd.VAE):
        def encode(self, pixels):
            latents = super().encode(pixels)
            if layout == "gmflux2_tiny":
                return torch.nn.functional.pixel_unshuffle(latents, 2)
            return latents.unsqueeze(2) if layout == "gmqwen_tiny" else latents * float("nan" if layout == "NaN" else 1)

    return Encoder(sd=weights)


def conditioning(name: str, row: int = 0, guidance: float | None = None) -> list:
    """A stored text, one row of it."""
    stored = io(name)
    extras = {} if guidance is None else {"guidance": guidance}
    if "pooled" in stored:
        extras["pooled_output"] = stored["pooled"][row : row + 1]
    return [[stored["context"][row : row + 1], extras]]
