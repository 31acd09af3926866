r"""Checkpoints of others: the formats of GMFlow's authors, names in their wrappers, and what is not ours.

Every format is read into a :class:`RawCheckpoint`: tensors as stored and a config, but no network.
Nothing here imports what a file names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .configs import (
    dit_config_from_shapes,
    make_config,
    mlp_config_from_shapes,
    sample_size_from,
    spectrum_config_from_shapes,
)
from .files import CheckpointError, State, one_line, read_json, shown
from .folders import WEIGHTS, read_weights, weights_file
from .model import SD_VAE_SCALE, GMDiTConfig, GMMLPConfig, LatentSpace, SpectrumConfig
from .pickles import read_pickle
from .schedule import TOTAL_SUBSTEPS

ASSUMED_SIZE = 32  # of latents, where nothing tells: what the published model was trained on


@dataclass(frozen=True, eq=False)
class RawCheckpoint:
    """The parts of a checkpoint before any network is built."""

    path: Path
    format: str                             # "gmflow", "diffusers folder", "diffusers file", "training .pth"
    state: State                            # the model's parameter names -> tensors, in the file's dtype
    config: GMDiTConfig | GMMLPConfig
    spectrum_state: State | None = None
    spectrum_config: SpectrumConfig | None = None
    latent_space: LatentSpace = LatentSpace("rgb")
    class_names: tuple[str, ...] | None = None
    training: dict = field(default_factory=dict)
    time_shift: float = 1.0                 # of the grid that it is best sampled on
    total_substeps: int = TOTAL_SUBSTEPS    # of all steps together, that GM-ODE best takes
    assumed: str | None = None              # in words, what nothing told and was taken to be as usual


# ---- recognition -------------------------------------------------------------------------------

_FOREIGN = (
    (("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant"),
     "weights in fp8 with scales of their own, which are not supported: take the file in bf16, fp16 or plain fp8"),
    (("lora_up", "lora_down", "lora_A", "lora_B"), "a LoRA, a patch for a model: load a GMFlow model, then it"),
    (("conditioner.", "model.diffusion_model."), "a whole Stable Diffusion (SD 1/2, SDXL, ...) checkpoint"),
    (("double_blocks.",), "a Flux model"),
    (("joint_blocks.",), "a Stable Diffusion 3 model"),
    (("adaln_single.",), "a PixArt model"),
    (("down_blocks.0.attentions", "input_blocks."), "a Stable Diffusion UNet"),
    (("decoder.conv_in", "first_stage_model"), "a VAE"),
    (("text_model.",), "a CLIP text encoder"),
    (("encoder.block.0.",), "a T5 text encoder"),
    (("final_layer.adaLN_modulation",), "a plain DiT, which predicts a mean and no mixture"),
)


def recognise(state: dict) -> str:
    """In words, what a file with these keys is, if it is no GM-DiT."""
    for fragments, description in _FOREIGN:
        if any(fragment in key for key in state for fragment in fragments):
            return f"this is {description}, not a GMFlow file"
    first = ", ".join(shown(key, 60) for key in list(state)[:5]) or "there are none"
    return f"not a GMFlow file: first keys are {first}"


def is_dit(state: dict) -> bool:
    return "pos_embed.proj.weight" in state and "proj_out_2.weight" in state


# What others put around parameter names: in front (ComfyUI's savers, DDP, pipelines) or anywhere (torch.compile, FSDP).
_OUTER = r"(?:(?:model\.)?diffusion_model\.|module\.|transformer\.)+"
_INNER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def unwrapped_name(name: str) -> str:
    """A parameter's own name, without what wrappers have put around it."""
    name = re.sub(_INNER, "", name)
    outer = re.match(_OUTER, name)
    return name[outer.end() :] if outer else name


def without_wrapper_prefixes(state: dict, source) -> dict:
    """``state`` under the networks' own names (:func:`unwrapped_name`); CheckpointError if two entries get one name."""
    names: dict[str, str] = {}
    for name in state:
        first = names.setdefault(unwrapped_name(name), name)
        if first != name:
            raise CheckpointError(f"{source}: {shown(first)} and {shown(name)} are one parameter, once wrapped: "
                                  "keep one of them")
    return {own: state[name] for own, name in names.items()}


# ---- diffusers layout --------------------------------------------------------------------------

_DIFFUSERS_NAMES = {
    "num_classes": "num_embeds_ada_norm", "num_gaussians": "num_gaussians", "in_channels": "in_channels",
    "sample_size": "sample_size", "patch_size": "patch_size", "num_layers": "num_layers",
    "num_heads": "num_attention_heads", "head_dim": "attention_head_dim", "logstd_width": "logstd_inner_dim",
}
# Variants that no published model uses and whose weights have the same shapes: better refused than computed wrongly.
_DIFFUSERS_FIXED = {
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_eps": 1e-5,
    "norm_elementwise_affine": False, "attention_bias": True, "gm_num_logstd_layers": 2,
}


def dit_config_from_json(path: Path) -> GMDiTConfig:
    """The config in a diffusers ``config.json``; CheckpointError if it is no GM-DiT's or one we cannot compute."""
    values = read_json(path)
    absent = [name for name in _DIFFUSERS_NAMES.values() if name not in values]
    if absent:
        kind = shown(values.get("_class_name", "unknown class"))
        raise CheckpointError(f"{path}: not the config of a GM-DiT ({kind}): it lacks {', '.join(absent)}")
    fixed = _DIFFUSERS_FIXED | {"out_channels": values["in_channels"]}
    for name, want in fixed.items():
        if values.get(name) is not None and values[name] != want:
            raise CheckpointError(f"{path}: {name} {shown(repr(values[name]))} is not supported, only {want!r}")
    config = {ours: values[theirs] for ours, theirs in _DIFFUSERS_NAMES.items()}
    return make_config(GMDiTConfig, config | {"constant_logstd": values.get("constant_logstd")}, path)


def read_folder(path: Path, heads: int | None = None) -> RawCheckpoint:
    """A folder with ``transformer/`` (and ``spectrum_net/``, ``vae/config.json``), or the transformer folder itself."""
    transformer = path / "transformer" if (path / "transformer").is_dir() else path
    if not (transformer / "config.json").is_file():
        raise CheckpointError(
            f"{path}: a folder without transformer/config.json; a GMFlow folder has transformer/config.json and "
            f"transformer/{WEIGHTS}. For a single file, give the file"
        )
    config = dit_config_from_json(transformer / "config.json")
    weights = weights_file(transformer)
    state = without_wrapper_prefixes(read_weights(weights), weights)
    return with_siblings(path, "diffusers folder", weights, state, config, heads)


def read_diffusers_file(path: Path, state: State, heads: int | None = None) -> RawCheckpoint:
    """A bare ``diffusion_pytorch_model*.safetensors`` (``state`` is its content), helped by a config.json beside it."""
    bare = without_wrapper_prefixes(state, path)
    if not is_dit(bare):
        raise CheckpointError(f"{path}: {recognise(state)}")
    config, assumed = config_beside(path), None
    if config is None:
        config = dit_config_from_shapes(bare, path, heads, ASSUMED_SIZE)
        assumed = what_is_assumed(config, size=True, heads=heads is None)
    return with_siblings(path, "diffusers file", path, bare, config, heads, assumed)


def what_is_assumed(config: GMDiTConfig, size: bool, heads: bool) -> str | None:
    """In words, what weights without a config cannot tell; None if that is nothing."""
    parts = [f"an image size of {config.sample_size}"] * size + [f"{config.num_heads} attention heads"] * heads
    return f"{' and '.join(parts)} assumed: a config.json beside the file would tell" if parts else None


def config_beside(path: Path) -> GMDiTConfig | None:
    """The config.json in the folder of a file, if there is one that speaks of mixtures: any model may have left it."""
    beside = path.parent / "config.json"
    return dit_config_from_json(beside) if beside.is_file() and "num_gaussians" in read_json(beside) else None


def with_siblings(
    path: Path, kind: str, weights: Path, state: State, config: GMDiTConfig, heads: int | None,
    assumed: str | None = None,
) -> RawCheckpoint:
    """The checkpoint with what lies beside its ``transformer/`` folder: spectrum network and VAE config."""
    if heads not in (None, config.num_heads):
        raise CheckpointError(f"{path}: config.json says {config.num_heads} heads, not {heads}")
    spectrum_state, spectrum_config, latent_space = None, None, guess_latent(config)
    folder = weights.absolute().parent  # absolute: "." has siblings too
    if folder.name == "transformer":
        spectrum, vae = folder.parent / "spectrum_net", folder.parent / "vae" / "config.json"
        if spectrum.is_dir():
            values = read_json(spectrum / "config.json")
            values = {name: value for name, value in values.items() if not name.startswith("_")}
            spectrum_config = make_config(SpectrumConfig, values, spectrum / "config.json")
            spectrum_state = read_weights(weights_file(spectrum, weights.name))
        if vae.is_file():
            latent_space = vae_latent(vae)
    return RawCheckpoint(path, kind, state, config, spectrum_state, spectrum_config, latent_space, assumed=assumed)


def guess_latent(config: GMDiTConfig | GMMLPConfig) -> LatentSpace:
    """Where no file tells: points for the 2D network, pixels for 1 or 3 channels, else Stable Diffusion's VAE."""
    if isinstance(config, GMMLPConfig):
        return LatentSpace("2d")
    return LatentSpace("rgb") if config.in_channels in (1, 3) else LatentSpace("sd-vae", SD_VAE_SCALE)


def vae_latent(path: Path) -> LatentSpace:
    """The scale and shift in a VAE's ``config.json``; a null or absent one has its usual value."""
    values = read_json(path)
    scale, shift = values.get("scaling_factor"), values.get("shift_factor")
    try:
        return LatentSpace("sd-vae", SD_VAE_SCALE if scale is None else scale, 0.0 if shift is None else shift)
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error


# ---- training files ----------------------------------------------------------------------------

def read_training(path: Path, heads: int | None = None) -> RawCheckpoint:
    """A ``.pth`` of GMFlow's training code: the moving average (``diffusion_ema.``) if there, else ``diffusion.``."""
    content = read_pickle(path)
    if reason := recognise_training(content):
        raise CheckpointError(f"{path}: {reason}")
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: its state_dict is no dict of names")
    state = without_wrapper_prefixes(state, path)
    for prefix, weights in (("diffusion_ema.", "moving average"), ("diffusion.", "last")):  # noqa: B007
        model = strip_prefix(state, prefix + "denoising.")
        if model:
            break
    else:
        raise CheckpointError(f"{path}: no keys diffusion_ema.denoising.* or diffusion.denoising.*; {recognise(state)}")
    spectrum = strip_prefix(state, prefix + "spectrum_net.") or None
    check_plain_tensors(model | (spectrum or {}), path, prefix)
    positions, assumed = model.pop("pos_embed.pos_embed", None), None  # computed, never loaded: but it tells the size
    if "out_logweights.weight" in model:
        config = mlp_config_from_shapes(model, path)
    else:
        if not is_dit(model):
            raise CheckpointError(f"{path}: {recognise(model)}")
        beside = config_beside(path)
        known = None if positions is None else sample_size_from(positions, model, path)
        size = known or (beside.sample_size if beside else ASSUMED_SIZE)
        config = dit_config_from_shapes(model, path, heads or (beside and beside.num_heads), size)
        assumed = what_is_assumed(config, size=not (known or beside), heads=not (heads or beside))
    spectrum_config = None
    if spectrum is not None:
        spectrum_config = spectrum_config_from_shapes(spectrum, config.in_channels, path)
    return RawCheckpoint(
        path, "training .pth", model, config, spectrum, spectrum_config, guess_latent(config),
        training=training_summary(content.get("meta"), weights), assumed=assumed,
    )


def recognise_training(content: dict) -> str | None:
    """In words, what another program's training file is; None if it may be one of GMFlow's authors."""
    if {"config", "nets", "ema", "optimizer"} <= content.keys():
        return "the state from which a training run goes on; its model is checkpoint.safetensors beside it"
    if is_dit_training(content):
        return "a training file of DiT or SiT, which predict a mean and no mixture: start one with --init-from"
    return None


def is_dit_training(content: dict) -> bool:
    """True for what the training programs of DiT and SiT write: ``{"model": ..., "ema": ..., "opt": ...}``."""
    return all(isinstance(content.get(part), dict) for part in ("model", "ema"))


def check_plain_tensors(state: dict, path: Path, prefix: str) -> None:
    """CheckpointError unless all values are tensors that together are no larger than their file."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {prefix}*.{shown(name)} is no plain tensor")
    total, size = sum(value.nbytes for value in state.values()), path.stat().st_size
    if total > size:
        raise CheckpointError(f"{path}: its weights claim {total:,} bytes, the file has {size:,}")


def strip_prefix(state: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def training_summary(meta, weights: str) -> dict:
    """What a training file's ``meta`` says that is worth keeping."""
    meta = meta if isinstance(meta, dict) else {}
    numbers = {name: meta[name] for name in ("iter", "epoch") if isinstance(meta.get(name), int)}
    return numbers | {"weights": weights}
