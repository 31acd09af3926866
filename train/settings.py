"""Settings as people give them: a file (JSON or YAML), and a line of help for every one of them."""

from __future__ import annotations

import inspect
import io
import json
import textwrap
import tokenize
from dataclasses import fields
from pathlib import Path

from gmflow_core import GMDiTConfig, GMMLPConfig, SpectrumConfig
from gmflow_core.files import MAX_JSON, file_size

from .config import PRESETS, TrainConfig


def read_settings(path: Path) -> list[str]:
    """The ``key=value`` settings in a JSON or YAML file; ``model: {num_layers: 4}`` is ``model.num_layers=4``.

    ValueError that names the file if it holds something else, or is YAML and PyYAML is not installed.
    """
    if file_size(path) > MAX_JSON:
        raise ValueError(f"--settings {path}: has {file_size(path):,} bytes, at most {MAX_JSON:,} are read")
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else _yaml(path, text)
    except ValueError as error:
        raise ValueError(f"--settings {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--settings {path}: must hold names and values, holds a {type(values).__name__}")
    return _flat(values)


def _yaml(path: Path, text: str) -> object:
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path.name} needs PyYAML: python -m pip install pyyaml; or write it as .json") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _flat(values: dict, prefix: str = "") -> list[str]:
    settings = []
    for name, value in values.items():
        if isinstance(value, dict):
            settings += _flat(value, f"{prefix}{name}.")
        else:
            settings.append(f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}")
    return settings


# ---- help --------------------------------------------------------------------------------------

def settings_help() -> str:
    """Every setting with its default and what the source says of it."""
    parts = [("", TrainConfig), ("model.", GMDiTConfig), ("model.", GMMLPConfig), ("spectrum.", SpectrumConfig)]
    lines = []
    for prefix, config in parts:
        notes = comments(config)
        lines.append(f"{config.__name__}" + (f" ({prefix}NAME=VALUE)" if prefix else " (NAME=VALUE)"))
        for field in fields(config):
            default = "" if not isinstance(field.default, (int, float, str, tuple, type(None))) else field.default
            head = f"  {prefix}{field.name}" + ("" if default == "" else f" = {json.dumps(default)}")
            lines += textwrap.wrap(f"{head:<38} {notes.get(field.name, '')}", 110, subsequent_indent=" " * 39)
    return "\n".join(lines)


def comments(config: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, in its source."""
    found, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(config)).readline):
        if token.type == tokenize.NAME and token.start[1] == 4 and token.line.lstrip().startswith(f"{token.string}:"):
            name = token.string
        elif token.type == tokenize.COMMENT and name is not None and token.line.lstrip().startswith(f"{name}:"):
            found[name] = token.string.lstrip("# ")
    return found


def presets_help() -> str:
    """Every preset with what it trains."""
    lines = []
    for name, config in PRESETS.items():
        kind = "GM-DiT" if isinstance(config.model, GMDiTConfig) else "2D MLP"
        size = f", {config.model.sample_size} x {config.model.sample_size}" if config.model.sample_size else ""
        lines.append(f"{name:<26} {config.data}: {kind} of K = {config.model.num_gaussians}{size}, "
                     f"{config.steps:,} steps of {config.batch_size}")
    return "\n".join(lines)
