"""The data that a configuration names."""

from __future__ import annotations

from dataclasses import replace

from gmflow_core import GMDiTConfig

from ..config import TrainConfig
from .checkerboard import Checkerboard
from .dataset import Dataset
from .digits import Digits
from .images import ImageFolder
from .latents import Latents


def open_data(config: TrainConfig) -> tuple[Dataset, TrainConfig]:
    """The data, and the configuration with the number of classes that the data has where it is left open.

    ValueError if the data does not suit the model.
    """
    data = _open(config)
    model = config.model
    if not isinstance(model, GMDiTConfig):
        if data.shape != (2,):
            raise ValueError(f"data {config.data} has samples of shape {data.shape}, the model is one for 2D points")
        return data, config
    wanted = (model.in_channels, model.sample_size, model.sample_size)
    if tuple(data.shape) != wanted:
        raise ValueError(f"data {config.data} has samples of shape {tuple(data.shape)}, the model takes {wanted}: "
                         "--set model.in_channels and model.sample_size (and spectrum.base_size) to the data's")
    classes = len(data.class_names)
    if config.classes == "data":
        return data, replace(config, model=replace(model, num_classes=classes))
    if model.num_classes != classes:
        raise ValueError(f"the data has {classes} classes, the model {model.num_classes}: --set classes=data")
    return data, config


def _open(config: TrainConfig) -> Dataset:
    model = config.model
    if config.data == "digits":
        return Digits.load()
    if config.data == "checkerboard":
        return Checkerboard.load()
    if not isinstance(model, GMDiTConfig):
        raise ValueError(f"data {config.data} needs a GM-DiT, this preset's model is one for 2D points")
    if config.data == "latents":
        return Latents.load(config.data_path, config.flip)
    return ImageFolder.load(config.data_path, model.in_channels, model.sample_size, config.flip, config.workers)
