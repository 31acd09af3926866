"""Inside ComfyUI: pi-Flow's tiny random bases as stock MODELs, and their stored conditionings. For tests only.

ComfyUI's loader gets the tensors. 0.3.64 knows FLUX.1 in its published size alone, and no version tells Qwen-Image's
sizes from a file: there the detection's answer is corrected.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[2] / "data" / "piflow"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = not hasattr(comfy.supported_models, "Flux2")   # 0.3.64: fixed sizes, norms of query and key are called scale
NAMES = ["gmflux_tiny", "gmqwen_tiny", *([] if OLD else ["gmflux2_tiny"])]
SIZES = {
    "gmflux_tiny": {"axes_dim": [16, 56, 56], "num_heads": 1, "hidden_size": 128, "context_in_dim": 32,
                    "vec_in_dim": 24},
    "gmqwen_tiny": {"num_attention_heads": 1, "joint_attention_dim": 32},
}
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


@contextmanager
def own_sizes(name: str):
    """ComfyUI's detection takes these sizes where it knows the published ones alone."""
    sizes = SIZES.get(name if OLD or name == "gmqwen_tiny" else None)
    detect = comfy.model_detection.detect_unet_config

    def detected(*args, **kwargs):
        return (detect(*args, **kwargs) or {}) | (sizes or {})

    comfy.model_detection.detect_unet_config = detected
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect


def base(name: str, dtype: torch.dtype = torch.float32):
    """The base as a MODEL, by ComfyUI's loader."""
    weights = {key: value.clone() for key, value in state_dict(name).items()}
    with own_sizes(name):
        return comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": dtype})


# ---- VAEs ---------------------------------------------------------------------------------------

CH = 32   # of the KL decoders, whose blocks of 32 groups take no less; 128 as published


def small(config: dict) -> dict:
    return config | {"ch": CH}


@contextmanager
def small_vaes():
    """ComfyUI's loader builds VAEs of a few channels. Two that it imports by name, one that it finds in its module."""
    wan = comfy.ldm.wan.vae
    kl, engine, video = comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine, wan.WanVAE
    comfy.sd.AutoencoderKL = lambda ddconfig, embed_dim, **_: kl(ddconfig=small(ddconfig), embed_dim=embed_dim)
    comfy.sd.AutoencodingEngine = lambda **parts: engine(**{
        name: part | {"params": small(part["params"])} if "params" in part else part for name, part in parts.items()
    })
    wan.WanVAE = lambda **config: video(**config | {"dim": 8})
    try:
        yield
    finally:
        comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine, wan.WanVAE = kl, engine, video


def vae_state(name: str) -> dict:
    """Random tensors of the kind of VAE that this model has: FLUX.1's, Qwen-Image's (Wan's), FLUX.2's."""
    config = {"double_z": True, "z_channels": 32 if name == "gmflux2_tiny" else 16, "resolution": 256, "in_channels": 3,
              "out_ch": 3, "ch": CH, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
              "dropout": 0.0}
    if name == "gmqwen_tiny":
        colours = {} if OLD else {"image_channels": 3, "conv_out_channels": 3}
        shapes = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                          temperal_downsample=[False, True, True], dropout=0.0, **colours).state_dict()
    elif name == "gmflux2_tiny":
        shapes = comfy.ldm.models.autoencoder.AutoencoderKL(
            ddconfig=config | {"batch_norm_latent": True}, embed_dim=32).state_dict()
    else:
        shapes = {f"{part}.{key}": value for part, network in (("encoder", Encoder), ("decoder", Decoder))
                  for key, value in network(**config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, like in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        around = float(key.endswith(("gamma", "running_var")) or ("norm" in key and key.endswith("weight")))
        spread = like[0].numel() ** -0.5 if like.ndim > 1 and not around else 0.1
        found[key] = around + spread * torch.randn(like.shape, generator=generator)
    return found


def vae(name: str):
    """It as a VAE, by ComfyUI's loader."""
    with small_vaes():
        return comfy.sd.VAE(sd=vae_state(name))


# ---- files --------------------------------------------------------------------------------------

def write_files() -> None:
    """What ComfyUI's own loader nodes take as it is: the FLUX bases, and VAEs (KL's without an encoder)."""
    for name in () if OLD else NAMES:
        vae = {key: value for key, value in vae_state(name).items()
               if name == "gmqwen_tiny" or not key.startswith(("encoder", "quant_conv"))}
        base = {} if name == "gmqwen_tiny" else {"diffusion_models": state_dict(name)}
        for folder, state in (base | {"vae": vae}).items():
            path = Path(folder_paths.models_dir) / folder / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in state.items()}, path)


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
