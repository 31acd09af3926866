"""What a checkpoint is, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from .checkpoint import CONFIGS, read_raw, some
from .files import shown


def identify(path, *, heads: int | None = None) -> dict:
    """What a checkpoint is, as a dict that JSON can hold; reads names and shapes, not the weights' values."""
    raw = read_raw(path, heads)
    return {
        "path": str(raw.path),
        "format": raw.format,
        "architecture": next(name for name, config in CONFIGS.items() if isinstance(raw.config, config)),
        "config": raw.config.to_dict(),
        "spectrum": raw.spectrum_config and raw.spectrum_config.to_dict(),
        "num_gaussians": raw.config.num_gaussians,
        "num_classes": raw.config.num_classes,
        "parameters": _count(raw.state),
        "spectrum_parameters": _count(raw.spectrum_state or {}),
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in raw.state.values()})),
        "latent_space": asdict(raw.latent_space),
        "class_names": raw.class_names and list(raw.class_names),
        "time_shift": raw.time_shift,
        "total_substeps": raw.total_substeps,
        "training": raw.training,
        "assumed": raw.assumed,
    }


def _count(state: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())


def described(info: dict) -> dict[str, str]:
    """The dict of :func:`identify` in words, by the thing that they tell of."""
    config, latent, names = info["config"], info["latent_space"], info["class_names"]
    lines = {"format": info["format"]}
    if info["architecture"] == "gmdit":
        heads = f"{config['num_heads']} heads x {config['head_dim']}"
        lines["network"] = f"GM-DiT, {config['num_layers']} layers, {heads}, patch {config['patch_size']}"
        lines["sample"] = f"{config['in_channels']} x {config['sample_size']} x {config['sample_size']}"
        lines["classes"] = str(info["num_classes"]) + (f": {some(names)}" if names else ", without names")
    else:
        lines["network"] = f"GMMLP for 2D data, {config['num_layers']} layers of {config['width']}"
    lines["mixture"] = f"K = {info['num_gaussians']}" + (
        "" if config["constant_logstd"] is None else f", constant log_std {config['constant_logstd']}"
    )
    lines["spectrum"] = "none" if info["spectrum"] is None else (
        " x ".join(map(str, info["spectrum"]["base_size"])) + f", {info['spectrum_parameters']:,} parameters"
    )
    lines["parameters"] = f"{info['parameters']:,}, stored as {info['dtype']}"
    lines["latents"] = latent["kind"] + (
        f", scale {latent['scale']:g}, shift {latent['shift']:g}" if latent["kind"] == "sd-vae" else ""
    )
    lines["sampling"] = f"time shift {info['time_shift']:g}, {info['total_substeps']} substeps over all steps"
    lines["training"] = ", ".join(
        f"{name} ({len(value)} values)" if isinstance(value, (list, dict)) else f"{name} {value}"
        for name, value in info["training"].items()
    ) or "nothing recorded"
    if info["assumed"]:
        lines["assumed"] = info["assumed"]
    return {name: shown(text, 400) for name, text in lines.items()}


def format_info(info: dict) -> str:
    """The dict of :func:`identify` as readable text, a line for each thing."""
    lines = (f"  {name + ':':<12}{words}" for name, words in described(info).items())
    return "\n".join([shown(info["path"], 400), *lines])
