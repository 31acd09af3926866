"""One dataclass says everything about a run; PRESETS are instances of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace

from gmflow_core import GMDiTConfig, GMMLPConfig, SpectrumConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Lengths are in optimizer steps; a step is ``batch_size`` images.

    The defaults of the objective and optimizer are the published image recipe.
    """

    data: str                                # a name in train.data.DATASETS
    model: GMDiTConfig | GMMLPConfig
    spectrum: SpectrumConfig | None = None   # trained beside the model when given
    # objective
    loss: str = "transition"                 # or "l2": vanilla flow matching, needs K = 1 and a constant log_std
    transition_ratio: float = 0.5
    transition_weight: float = 2.0
    spectral_weight: float = 1.0
    label_dropout: float = 0.1
    time_distribution: str = "logit-normal"  # or "uniform"
    time_mean: float = 0.0                   # of the logit-normal
    time_std: float = 1.0
    time_shift: float = 1.0
    # optimizer
    steps: int = 200_000
    batch_size: int = 4096
    lr: float = 2e-4
    lr_decay: str = "constant"               # or "cosine": to zero at the last step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05               # of matrices; never of biases
    warmup: int = 1000
    clip_norm: float = 10.0
    clip_from: int = 1000                    # the first steps have large, harmless gradients
    ema_decay: float = 0.9999
    precision: str = "bf16"                  # autocast of the network; or "float32". Mixtures are always float32
    seed: int = 0
    # reports
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _one_of(self, "loss", ("transition", "l2"))
        _one_of(self, "time_distribution", ("logit-normal", "uniform"))
        _one_of(self, "lr_decay", ("constant", "cosine"))
        _one_of(self, "precision", ("bf16", "float32"))
        for name in ("steps", "batch_size", "log_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup", "clip_from", "weight_decay", "spectral_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name, low, high in (("transition_ratio", 0, 1), ("label_dropout", 0, 1), ("ema_decay", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high or (name == "transition_ratio" and value == 0):
                raise ValueError(f"{name} must be in {'(0, 1]' if name == 'transition_ratio' else '[0, 1]'}, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.loss == "l2" and (self.model.num_gaussians != 1 or self.model.constant_logstd is None):
            raise ValueError("loss l2 needs model.num_gaussians=1 and a model.constant_logstd")

    def to_dict(self) -> dict:
        """Plain JSON types, as stored in checkpoints and compared on resume."""
        return json.loads(json.dumps(asdict(self)))


def _one_of(config: TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


_DIGITS_NET = GMDiTConfig(
    num_classes=10, num_gaussians=8, in_channels=3, sample_size=16, patch_size=2,
    num_layers=6, num_heads=2, head_dim=64, logstd_width=64,
)

_DIGITS = TrainConfig(
    data="digits",
    model=_DIGITS_NET,
    spectrum=SpectrumConfig(base_size=(3, 16, 16), layers=(64, 8)),
    # With the images' ratio of 0.5 the loss hardly sees the mixture's own variance here, and it collapses.
    transition_ratio=0.9,
    # Class and ink are decided at high noise: see more of it than the default does.
    time_mean=0.5, time_std=1.3,
    steps=12_000, batch_size=64, lr=1e-3, lr_decay="cosine", warmup=200, clip_norm=1.0, clip_from=0,
    weight_decay=0.01, ema_decay=0.999,
)

_CHECKERBOARD = TrainConfig(
    data="checkerboard",
    model=GMMLPConfig(num_gaussians=64),
    transition_ratio=0.9, transition_weight=1.0, label_dropout=0.0, time_distribution="uniform",
    steps=20_000, batch_size=4096, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=0,
    precision="float32", ema_decay=0.999, sample_every=5000,
)

PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "digits-vanilla": replace(
        _DIGITS, loss="l2", spectrum=None, model=replace(_DIGITS_NET, num_gaussians=1, constant_logstd=0.0)
    ),
    "checkerboard": _CHECKERBOARD,
}


def override(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """Apply ``key=value`` settings; ``model.key=value`` reaches into the model. Values are JSON or plain text."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        config = _set(config, key, value, setting)
    return config


def _set(config, key: str, value, setting: str):
    head, _, rest = key.partition(".")
    names = [f.name for f in fields(config)]
    if head not in names:
        raise ValueError(f"--set {setting}: no field {head!r}; there are {', '.join(names)}")
    current = getattr(config, head)
    if rest:
        if not hasattr(current, "__dataclass_fields__"):
            raise ValueError(f"--set {setting}: {head} has no fields of its own")
        value = _set(current, rest, value, setting)
    elif isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    elif current is not None and type(value) is not type(current):
        raise ValueError(f"--set {setting}: {head} takes a {type(current).__name__}, got {value!r}")
    return replace(config, **{head: value})
