r"""Checkpoints of others: the formats of GMFlow's authors, and the names of what is not ours.

Every format is read into a :class:`RawCheckpoint`: tensors as stored and a config, but no network.
Nothing here imports what a file names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from .files import CheckpointError, State, one_line, read_json, read_pickle, read_safetensors
from .labels import shorten
from .model import SD_VAE_SCALE, GMDiTConfig, GMMLPConfig, LatentSpace, SpectrumConfig
from .model.layers import sincos_positions

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_WIDTH = GMDiTConfig().width


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


def make_config(config_class, values, source):
    """``config_class(**values)``; CheckpointError if a value is unknown, absent (unless null is its default) or bad."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: the {config_class.__name__} must be a JSON object, got {values!r}")
    known = {f.name: f.default for f in fields(config_class)}
    unknown = [name for name in values if name not in known]
    absent = [name for name, default in known.items() if name not in values and default is not None]
    if unknown or absent:
        raise CheckpointError(
            f"{source}: the {config_class.__name__} has unknown values {unknown} and lacks {absent}; "
            f"it should have {', '.join(known)}"
        )
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: bad {config_class.__name__}: {one_line(error)}") from error


# ---- recognition -------------------------------------------------------------------------------

_FOREIGN = (
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
    first = ", ".join(key if len(key) <= 120 and key.isprintable() else shorten(key) for key in list(state)[:5]) or "there are none"
    return f"not a GMFlow file: first keys are {first}"


# What trainers and ComfyUI's save nodes put around a network's names: at the front, or anywhere.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "transformer.")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap(state: dict) -> dict:
    """A network's own names: without what a wrapper put before and between them, and without what lies beside it."""
    for wrapper in _WRAPPERS:
        state = {key.replace(wrapper, ""): value for key, value in state.items()}
    while not is_dit(state):
        prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = strip_prefix(state, prefix)
    return state


def is_dit(state: dict) -> bool:
    return "pos_embed.proj.weight" in state and "proj_out_2.weight" in state


# ---- configs from shapes -----------------------------------------------------------------------

def shape_of(state: State, key: str, ndim: int, source) -> tuple[int, ...]:
    """The shape of ``state[key]``; CheckpointError if it is missing or has another number of axes."""
    if key not in state or state[key].ndim != ndim:
        got = f"has shape {tuple(state[key].shape)}, not {ndim} axes" if key in state else "is missing"
        raise CheckpointError(f"{source}: {key} {got}; a GMFlow model has it")
    return tuple(state[key].shape)


def split_heads(width: int, heads: int | None, source) -> tuple[int, int]:
    """(heads, head_dim) of a width, which shapes do not tell: as asked, or by DiT's habit 72 (XL) or 64."""
    if heads is not None:
        if heads < 1 or width % heads:
            raise CheckpointError(f"{source}: {heads} heads do not divide the width {width}")
        return heads, width // heads
    for head_dim in (72, 64):
        if width % head_dim == 0:
            return width // head_dim, head_dim
    raise CheckpointError(
        f"{source}: the number of attention heads cannot be told from a width of {width}; "
        "put the model's config.json beside the file or give heads="
    )


def dit_config_from_shapes(state: State, source, heads: int | None, sample_size: int) -> GMDiTConfig:
    """The config that a GM-DiT's shapes and names tell; heads by :func:`split_heads`."""
    width, channels, patch, _ = shape_of(state, "pos_embed.proj.weight", 4, source)
    rows, _ = shape_of(state, "proj_out_2.weight", 2, source)
    per_component = patch * patch * (channels + 1)
    if rows % per_component or not any(key.startswith("gm_out.") for key in state):
        raise CheckpointError(
            f"{source}: a DiT, but not a GMFlow one: a mixture head has K*({channels}+1)*{patch}*{patch} rows in "
            f"proj_out_2 (here {rows}) and gm_out.logstd_layers for its standard deviation (a model of constant "
            "deviation needs its config.json beside it)"
        )
    num_heads, head_dim = split_heads(width, heads, source)
    return make_config(GMDiTConfig, dict(
        num_classes=shape_of(state, "emb.class_embedder.embedding_table.weight", 2, source)[0] - 1,
        num_gaussians=rows // per_component, in_channels=channels, sample_size=sample_size, patch_size=patch,
        num_layers=len({key.split(".")[1] for key in state if key.startswith("transformer_blocks.")}),
        num_heads=num_heads, head_dim=head_dim,
        logstd_width=shape_of(state, "gm_out.logstd_layers.1.weight", 2, source)[0],
    ), source)


def mlp_config_from_shapes(state: State, source) -> GMMLPConfig:
    return make_config(GMMLPConfig, dict(
        num_gaussians=shape_of(state, "out_logweights.weight", 2, source)[0],
        width=shape_of(state, "net.0.weight", 2, source)[0],
        num_layers=len({key.split(".")[1] for key in state if key.startswith("net.")}),
    ), source)


def spectrum_config_from_shapes(state: State, channels: int, source) -> SpectrumConfig:
    """The spectrum's size is taken to be square."""
    names = sorted((key for key in state if key.endswith(".weight")), key=lambda key: (len(key), key))
    *layers, outputs = [shape_of(state, name, 2, source)[0] for name in names] or [0]
    side = math.isqrt(outputs // channels)
    if not side or side * side * channels != outputs:
        raise CheckpointError(f"{source}: the spectrum network's {outputs} outputs are not {channels} square channels")
    return make_config(SpectrumConfig, dict(base_size=(channels, side, side), layers=tuple(layers)), source)


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
        kind = values.get("_class_name", "unknown class")
        raise CheckpointError(f"{path}: not the config of a GM-DiT ({kind}): it lacks {', '.join(absent)}")
    fixed = _DIFFUSERS_FIXED | {"out_channels": values["in_channels"]}
    for name, want in fixed.items():
        if values.get(name) is not None and values[name] != want:
            raise CheckpointError(f"{path}: {name} {values[name]!r} is not supported, only {want!r}")
    config = {ours: values[theirs] for ours, theirs in _DIFFUSERS_NAMES.items()}
    return make_config(GMDiTConfig, config | {"constant_logstd": values.get("constant_logstd")}, path)


def weights_file(folder: Path, prefer: str = WEIGHTS) -> Path:
    """The weights in a diffusers part: the preferred file, the full precision one, else any variant (``.bf16.``)."""
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors"))
    for candidate in (folder / prefer, folder / WEIGHTS, *variants):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{folder}: no {WEIGHTS} (or .bf16. variant) in this folder")


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
    return with_siblings(path, "diffusers folder", weights, read_safetensors(weights)[0], config, heads)


def read_diffusers_file(path: Path, state: State, heads: int | None = None) -> RawCheckpoint:
    """A bare ``diffusion_pytorch_model*.safetensors`` (``state`` is its content), helped by a config.json beside it.

    Its keys may be wrapped, see :func:`unwrap`; then only the published width tells the rest.
    """
    found, state = state, unwrap(state)
    if not is_dit(state):
        raise CheckpointError(f"{path}: {recognise(found)}")
    config = config_beside(path)
    if config is None and heads is None and state.keys() != found.keys() and state["pos_embed.proj.weight"].shape[0] != PUBLISHED_WIDTH:
        raise CheckpointError(
            f"{path}: a GMFlow network saved by another program, without its number of attention heads and its size; put the "
            "model's config.json beside it, or save it again from a model that GMFlow Loader loaded"
        )
    config = config or dit_config_from_shapes(state, path, heads, sample_size=32)
    return with_siblings(path, "diffusers file", path, state, config, heads)


def config_beside(path: Path) -> GMDiTConfig | None:
    """The config.json in the folder of a file, if there is one that speaks of mixtures: any model may have left it."""
    beside = path.parent / "config.json"
    return dit_config_from_json(beside) if beside.is_file() and "num_gaussians" in read_json(beside) else None


def with_siblings(path, kind, weights: Path, state: State, config: GMDiTConfig, heads: int | None) -> RawCheckpoint:
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
            spectrum_state = read_safetensors(weights_file(spectrum, weights.name))[0]
        if vae.is_file():
            latent_space = vae_latent(vae)
    return RawCheckpoint(path, kind, state, config, spectrum_state, spectrum_config, latent_space)


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
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: its state_dict is no dict of names")
    for prefix, weights in (("diffusion_ema.", "moving average"), ("diffusion.", "last")):
        model = strip_prefix(state, prefix + "denoising.")
        if model:
            break
    else:
        raise CheckpointError(f"{path}: no keys diffusion_ema.denoising.* or diffusion.denoising.*; {recognise(state)}")
    spectrum = strip_prefix(state, prefix + "spectrum_net.") or None
    for name, value in (model | (spectrum or {})).items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {prefix}*.{name} is no plain tensor")
    positions = model.pop("pos_embed.pos_embed", None)  # computed, never loaded: but it tells the size
    if "out_logweights.weight" in model:
        config = mlp_config_from_shapes(model, path)
    else:
        if not is_dit(model):
            raise CheckpointError(f"{path}: {recognise(model)}")
        beside = config_beside(path) if heads is None else None
        heads = beside.num_heads if beside else heads
        config = dit_config_from_shapes(model, path, heads, sample_size_from(positions, model, path))
    spectrum_config = None
    if spectrum is not None:
        spectrum_config = spectrum_config_from_shapes(spectrum, config.in_channels, path)
    return RawCheckpoint(
        path, "training .pth", model, config, spectrum, spectrum_config, guess_latent(config),
        training=training_summary(content.get("meta"), weights),
    )


def strip_prefix(state: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def training_summary(meta, weights: str) -> dict:
    """What a training file's ``meta`` says that is worth keeping."""
    meta = meta if isinstance(meta, dict) else {}
    numbers = {name: meta[name] for name in ("iter", "epoch") if isinstance(meta.get(name), int)}
    return numbers | {"weights": weights}


def sample_size_from(positions: Tensor | None, state: State, path: Path) -> int:
    """The size of the training latents, from the stored position table (1,N,D): 32 where there is none.

    CheckpointError if the table is not the one this project computes: the weights would mean something else.
    """
    if positions is None:
        return 32
    width, _, patch, _ = shape_of(state, "pos_embed.proj.weight", 4, path)
    side = math.isqrt(positions.numel() // width)
    square = tuple(positions.shape) == (1, side * side, width) and side > 0 and width % 4 == 0
    if not square or not positions.is_floating_point():
        raise CheckpointError(
            f"{path}: pos_embed.pos_embed is {positions.dtype} {tuple(positions.shape)}, "
            f"expected (1, side * side, {width})"
        )
    ours = sincos_positions(width, side, side, side)
    error = (positions.float() - ours).abs().max().item()
    if not error <= 1e-2:  # room for a table rounded to bf16; other positions differ by 1. "not <=" catches NaN
        raise CheckpointError(f"{path}: pos_embed.pos_embed differs from DiT's sin-cos positions by {error:.3g}; "
                              "a model with other positions is not supported")
    return side * patch
