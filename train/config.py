"""One dataclass says everything about a run; PRESETS are instances of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass, replace

from gmflow_core import GMDiTConfig, GMMLPConfig, SpectrumConfig

DATASETS = ("digits", "checkerboard", "imagefolder", "latents")

# A run may go on with other values of these: they say where and how fast, not what is learnt.
FREE = ("init_from", "data_path", "workers", "accumulate", "parallel", "ema_device", "checkpoint_activations",
        "compile", "tf32", "max_bad_steps", "log_every", "sample_every", "save_every", "tensorboard")
PATHS = ("init_from", "data_path")  # settings that are text even if they look like a number
LATER = {"mean_weight": 0.0, "cooldown": 0}  # settings that older runs did not have, at what they did


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Lengths are in optimizer steps; a step is ``batch_size`` images.

    The defaults of the objective and optimizer are the published image recipe.
    """

    data: str                                # one of DATASETS
    model: GMDiTConfig | GMMLPConfig
    spectrum: SpectrumConfig | None = None   # trained beside the model when given
    init_from: str | None = None             # a GMFlow checkpoint or a diffusers DiT to start from (train.initialise)
    # data from files
    data_path: str | None = None             # the folder
    classes: str = "model"                   # or "data": model.num_classes becomes what the data has
    flip: bool = True                        # mirror images at random, latents where encoded with --flips; never digits
    workers: int = 2                         # threads that decode images
    # objective
    loss: str = "transition"                 # or "l2": vanilla flow matching, needs K = 1 and a constant log_std
    transition_ratio: float = 0.5
    transition_weight: float = 2.0
    spectral_weight: float = 1.0
    mean_weight: float = 0.0                 # squared error of the mixture's mean; 0, the published loss, has none
    label_dropout: float = 0.1
    time_distribution: str = "logit-normal"  # or "uniform"
    time_mean: float = 0.0                   # of the logit-normal
    time_std: float = 1.0
    time_shift: float = 1.0
    # optimizer
    steps: int = 200_000
    batch_size: int = 4096                   # of all processes together
    accumulate: int = 1                      # a process takes its part of a batch in so many pieces, to save memory
    parallel: str = "ddp"                    # or "fsdp": processes share out weights, their average and AdamW's state
    optimizer: str = "adamw"                 # or "adamw8bit", of bitsandbytes or torchao
    lr: float = 2e-4
    lr_decay: str = "constant"               # or "cosine": to zero at the last step; or "cooldown": to zero at the end
    cooldown: int = 0                        # in so many last steps, constant before
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05               # of matrices; never of biases
    warmup: int = 1000
    clip_norm: float = 10.0
    clip_from: int = 1000                    # the first steps have large, harmless gradients
    ema_decay: float = 0.9999
    precision: str = "bf16"                  # autocast of the network; or "float32". Mixtures are always float32
    max_bad_steps: int = 10                  # give up after so many steps in a row whose loss or gradient is not finite
    ema_device: str = "same"                 # or "cpu", to save memory on the GPU
    checkpoint_activations: bool = False     # compute them again in the backward pass: a third slower, much less memory
    compile: bool = False                    # torch.compile of the network
    tf32: bool = True                        # matrix products of float32 in TF32 on CUDA
    seed: int = 0
    # reports
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 500
    tensorboard: bool = True                 # scalars and samples for TensorBoard, if it is installed

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _one_of(self, "data", DATASETS)
        _one_of(self, "classes", ("model", "data"))
        _one_of(self, "loss", ("transition", "l2"))
        _one_of(self, "time_distribution", ("logit-normal", "uniform"))
        _one_of(self, "lr_decay", ("constant", "cosine", "cooldown"))
        _one_of(self, "precision", ("bf16", "float32"))
        _one_of(self, "optimizer", ("adamw", "adamw8bit"))
        _one_of(self, "ema_device", ("same", "cpu"))
        _one_of(self, "parallel", ("ddp", "fsdp"))
        for name in ("steps", "batch_size", "accumulate", "workers", "max_bad_steps", "log_every", "sample_every",
                     "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup", "clip_from", "weight_decay", "spectral_weight", "mean_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name, low, high in (("transition_ratio", 0, 1), ("label_dropout", 0, 1), ("ema_decay", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high or (name == "transition_ratio" and value == 0):
                wanted = "(0, 1]" if name == "transition_ratio" else "[0, 1]"
                raise ValueError(f"{name} must be in {wanted}, got {value}")
        if (self.lr_decay == "cooldown") != (self.cooldown > 0) or not 0 <= self.cooldown <= self.steps:
            raise ValueError(f"cooldown, the last steps of lr_decay=cooldown, must be from 1 to steps={self.steps} "
                             f"with it and 0 without, got {self.cooldown}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.loss == "l2" and (self.model.num_gaussians != 1 or self.model.constant_logstd is None):
            raise ValueError("loss l2 needs model.num_gaussians=1 and a model.constant_logstd")
        if self.loss == "l2" and self.mean_weight:
            raise ValueError("loss l2 is the squared error of the mean alone: mean_weight must be 0")
        if self.parallel == "fsdp" and (self.optimizer, self.ema_device) != ("adamw", "same"):
            raise ValueError("parallel fsdp shares out what optimizer=adamw and ema_device=same keep; got optimizer "
                             f"{self.optimizer!r}, ema_device {self.ema_device!r}: set these two, or parallel=ddp")
        if self.spectrum is not None:
            _check_spectrum(self.spectrum, self.model)

    def to_dict(self) -> dict:
        """Plain JSON types, as stored in checkpoints and compared on resume;
        without the later settings where they change nothing."""
        plain = json.loads(json.dumps(asdict(self)))
        return {k: v for k, v in plain.items() if k not in LATER or v != LATER[k]}


def changes(before: dict, after: dict) -> list[str]:
    """In words, where two configurations (dicts) differ that must be the same throughout a run."""
    lengths = {"constant": ("steps",), "cooldown": ("steps", "cooldown")}  # what comes before the end is the same
    free = FREE + (lengths.get(after["lr_decay"], ()) if before["lr_decay"] == after["lr_decay"] else ())
    before, after = LATER | before, LATER | after
    return [f"{k}: {before.get(k)} there, {after[k]} asked for" for k in after
            if before.get(k) != after[k] and k not in free]


def _check_spectrum(spectrum: SpectrumConfig, model: GMDiTConfig | GMMLPConfig) -> None:
    if not isinstance(model, GMDiTConfig):
        raise ValueError("a spectrum is for images: --set spectrum=null")
    sample = (model.in_channels, model.sample_size, model.sample_size)
    if spectrum.base_size != sample:
        raise ValueError(f"spectrum.base_size {list(spectrum.base_size)} must be the model's sample {list(sample)}")


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

# The published recipe for ImageNet 256x256; 512 images a GPU on eight of them.
# Its data are latents of Stable Diffusion's VAE.
_IMAGENET = TrainConfig(
    data="latents", model=GMDiTConfig(), spectrum=SpectrumConfig(), optimizer="adamw8bit", checkpoint_activations=True,
)

# DiT's smaller sizes (Peebles & Xie 2023) on latents of any classes, for one GPU.
_DIT_S = GMDiTConfig(num_layers=12, num_heads=6, head_dim=64, logstd_width=384)
_DIT_B = GMDiTConfig(num_layers=12, num_heads=12, head_dim=64, logstd_width=768)
_ONE_GPU = replace(_IMAGENET, classes="data", optimizer="adamw", checkpoint_activations=False, steps=400_000,
                   batch_size=256, lr=1e-4)

_IMAGES = TrainConfig(  # DiT-S on small pictures of your own
    data="imagefolder", classes="data",
    model=replace(_DIT_S, in_channels=3, sample_size=64, patch_size=4),
    spectrum=SpectrumConfig(base_size=(3, 64, 64), layers=(64, 8)),
    steps=100_000, batch_size=128, lr=2e-4,
)

_CHARACTERS = TrainConfig(  # small pictures of sixteen kinds, drawn by train.characters
    data="imagefolder", flip=False, workers=1,
    model=replace(_DIGITS_NET, num_classes=16, sample_size=24, patch_size=3, num_heads=3),
    spectrum=SpectrumConfig(base_size=(3, 24, 24), layers=(64, 8)),
    transition_ratio=0.9, mean_weight=2.0, time_mean=0.5, time_std=1.3,
    steps=36_000, batch_size=64, lr=1e-3, lr_decay="cooldown", cooldown=6_000, warmup=200, clip_norm=1.0, clip_from=0,
    weight_decay=0.01, ema_decay=0.999, precision="float32",
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
    "characters": _CHARACTERS,
    "checkerboard": _CHECKERBOARD,
    **{f"checkerboard-k{k}": replace(_CHECKERBOARD, model=GMMLPConfig(num_gaussians=k)) for k in (1, 8, 64)},
    "checkerboard-vanilla": replace(_CHECKERBOARD, loss="l2", model=GMMLPConfig(num_gaussians=1, constant_logstd=0.0)),
    "images64": _IMAGES,
    "dit-s2": replace(_ONE_GPU, model=_DIT_S),
    "dit-b2": replace(_ONE_GPU, model=_DIT_B),
    "imagenet256-dit-xl2-k8": _IMAGENET,
}


def override(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """Apply ``key=value`` settings; ``model.key=value`` reaches into the model. Values are JSON or plain text.

    They are checked together at the end: a model and its spectrum may change size at once.
    ``model.num_classes=N`` fixes the number of classes where a preset leaves it to the data.
    """
    parts = {f.name: getattr(config, f.name) for f in fields(config)}
    values = {name: vars(part).copy() if is_dataclass(part) else part for name, part in parts.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _set(values, key, text if key in PATHS and value is not None else value, setting)
        if key == "model.num_classes":
            values["classes"] = "model"
    return TrainConfig(**{k: type(parts[k])(**v) if isinstance(v, dict) else v for k, v in values.items()})


def _set(values: dict, key: str, value, setting: str) -> None:
    head, _, rest = key.partition(".")
    if head not in values:
        raise ValueError(f"--set {setting}: no field {head!r}; there are {', '.join(values)}")
    current = values[head]
    if rest:
        if not isinstance(current, dict):
            raise ValueError(f"--set {setting}: {head} has no fields of its own")
        return _set(current, rest, value, setting)
    if isinstance(current, dict) and not (head == "spectrum" and value is None):
        raise ValueError(f"--set {setting}: set a field of {head}: {', '.join(f'{head}.{name}' for name in current)}")
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    elif not isinstance(current, dict) and current is not None and type(value) is not type(current):
        raise ValueError(f"--set {setting}: {head} takes a {type(current).__name__}, got {value!r}")
    values[head] = value
