r"""Configs of networks from what a file says: values of its JSON, else names and shapes of its tensors."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from .files import CheckpointError, State, one_line, shown
from .model import GMDiTConfig, GMMLPConfig, SpectrumConfig
from .model.layers import sincos_positions


def make_config(config_class, values, source):
    """``config_class(**values)``; CheckpointError if a value is unknown, absent (unless null is its default) or bad."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: the {config_class.__name__} must be a JSON object, got {shown(repr(values))}")
    known = {f.name: f.default for f in fields(config_class)}
    unknown = [name for name in values if name not in known]
    absent = [name for name, default in known.items() if name not in values and default is not None]
    if unknown or absent:
        raise CheckpointError(
            f"{source}: the {config_class.__name__} has unknown values {shown(unknown)} and lacks {absent}; "
            f"it should have {', '.join(known)}"
        )
    try:
        return config_class(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{source}: bad {config_class.__name__}: {one_line(error)}") from error


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
    return make_config(GMDiTConfig, {
        "num_classes": shape_of(state, "emb.class_embedder.embedding_table.weight", 2, source)[0] - 1,
        "num_gaussians": rows // per_component, "in_channels": channels, "sample_size": sample_size,
        "patch_size": patch,
        "num_layers": len({key.split(".")[1] for key in state if key.startswith("transformer_blocks.")}),
        "num_heads": num_heads, "head_dim": head_dim,
        "logstd_width": shape_of(state, "gm_out.logstd_layers.1.weight", 2, source)[0],
    }, source)


def mlp_config_from_shapes(state: State, source) -> GMMLPConfig:
    return make_config(GMMLPConfig, {
        "num_gaussians": shape_of(state, "out_logweights.weight", 2, source)[0],
        "width": shape_of(state, "net.0.weight", 2, source)[0],
        "num_layers": len({key.split(".")[1] for key in state if key.startswith("net.")}),
    }, source)


def spectrum_config_from_shapes(state: State, channels: int, source) -> SpectrumConfig:
    """The spectrum's size is taken to be square."""
    names = sorted((key for key in state if key.endswith(".weight")), key=lambda key: (len(key), key))
    *layers, outputs = [shape_of(state, name, 2, source)[0] for name in names] or [0]
    side = math.isqrt(outputs // channels)
    if not side or side * side * channels != outputs:
        raise CheckpointError(f"{source}: the spectrum network's {outputs} outputs are not {channels} square channels")
    return make_config(SpectrumConfig, {"base_size": (channels, side, side), "layers": tuple(layers)}, source)


def sample_size_from(positions: Tensor, state: State, path: Path) -> int:
    """The size of the training latents, from the stored position table (1,N,D).

    CheckpointError if the table is not the one this project computes: the weights would mean something else.
    """
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
