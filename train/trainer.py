"""The training loop, read top to bottom: a step is a pure function of (weights, step number)."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow_core import GMDiT, GMDiTConfig, GMMLP, SpectrumMLP, mixture_nll, save_checkpoint, spectral_loss, transition_loss
from gmflow_core.objective import transition_pair
from gmflow_core.model.layers import explicit_attention, sdpa
from gmflow_core.path import add_noise
from gmflow_core.schedule import training_sigmas

from .config import PATHS, TrainConfig, changes
from .images import say
from .sources import open_data

STATE = "state.pt"
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


def build(config: TrainConfig, device: torch.device) -> nn.ModuleDict:
    """The networks of a run, initialised from its seed: {"model", optionally "spectrum"}."""
    torch.manual_seed(config.seed)
    if isinstance(config.model, GMDiTConfig):
        # On CPU the fused kernel's bf16 backward pass is five times slower than plain matrix products.
        model = GMDiT(config.model, attention=explicit_attention if device.type == "cpu" else sdpa)
    else:
        model = GMMLP(config.model)
    nets = nn.ModuleDict({"model": model})
    if config.spectrum is not None:
        nets["spectrum"] = SpectrumMLP(config.spectrum)
    for net in nets.values():
        net.init_weights()
    return nets.to(device)


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of a step, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed((seed << 32) + step)


def losses(nets: nn.ModuleDict, config: TrainConfig, batch: tuple[Tensor, Tensor | None], generator) -> dict[str, Tensor]:
    """Loss terms of one batch, each a per-sample tensor (B,), and ``sigma`` (B,)."""
    x_0, labels = batch
    n, device = x_0.shape[0], x_0.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    draws = normal(n) if config.time_distribution == "logit-normal" else torch.rand(n, generator=generator).to(device)
    sigma = training_sigmas(draws, config.time_distribution, config.time_shift, config.time_mean, config.time_std)
    if labels is not None:
        dropped = torch.rand(n, generator=generator).to(device) < config.label_dropout
        labels = torch.where(dropped, config.model.null_label, labels)
    if config.loss == "l2":
        noise = normal(*x_0.shape)
        velocity = predict(nets["model"], add_noise(x_0, noise, sigma), sigma, labels, config.precision)
        return {"sigma": sigma, "loss": mixture_nll(velocity, noise - x_0)}
    sigma_low, x_low, x_high = transition_pair(
        x_0, sigma, config.transition_ratio, normal(*x_0.shape), normal(*x_0.shape)
    )
    velocity = predict(nets["model"], x_high, sigma, labels, config.precision)
    transition = config.transition_weight * transition_loss(velocity, x_high, sigma, x_low, sigma_low)
    if "spectrum" not in nets:
        return {"sigma": sigma, "loss": transition}
    spectral = config.spectral_weight * spectral_loss(velocity, x_0, x_high, sigma, nets["spectrum"])
    return {"sigma": sigma, "loss": transition + spectral, "transition": transition.detach(), "spectral": spectral.detach()}


def predict(model: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None, precision: str):
    """The velocity mixture, the network under autocast and the mixture in float32."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        packed = model(x, sigma, labels)
    return model.mixture(packed)


def parameter_groups(nets: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices, none on biases."""
    matrices = [p for p in nets.parameters() if p.ndim > 1]
    vectors = [p for p in nets.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_decay == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def update_ema(ema: nn.Module, nets: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + n)/(10 + n)) so that it forgets the start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in nets.parameters()], 1 - decay)


class Trainer:
    """A run in a folder: ``state.pt`` (resume), ``checkpoint.safetensors`` (EMA, for the loader), ``log.jsonl``.

    Without a folder nothing is written or resumed.
    """

    def __init__(self, config: TrainConfig, folder: Path | None, device: torch.device):
        self.folder, self.device = folder, device
        self.data, config = open_data(config)
        self.config = config
        self.nets, self.ema = build(config, device), build(config, device).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.nets, config.weight_decay), lr=config.lr, betas=config.betas, fused=True
        )
        self.step, self.seconds, self.smooth_loss, self.history = 0, 0.0, None, []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / STATE).exists():
                self._resume()

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the numbers of the log."""
        config, start = self.config, time.perf_counter()
        generator = step_generator(config.seed, self.step)
        x_0, labels = self.data.batch(config.batch_size, generator)
        batch = x_0.to(self.device), None if labels is None else labels.to(self.device)
        terms = losses(self.nets, config, batch, generator)
        loss = terms["loss"].mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}: lower lr or clip_norm")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = config.clip_norm if self.step >= config.clip_from else float("inf")
        # Each network by itself: neither loss reaches the other's weights, so neither should scale its steps.
        norms = {name: nn.utils.clip_grad_norm_(net.parameters(), limit).item() for name, net in self.nets.items()}
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        update_ema(self.ema, self.nets, config.ema_decay, self.step)
        self.step += 1
        self.seconds += time.perf_counter() - start
        numbers = {name: value.mean().item() for name, value in terms.items() if name != "sigma"}
        previous = numbers["loss"] if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = 0.98 * previous + 0.02 * numbers["loss"]
        numbers["loss_smooth"] = self.smooth_loss
        return {"step": self.step, **numbers, **quartiles(terms), "grad_norm": norms["model"], "lr": lr, "seconds": self.seconds}

    # ---- files ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write both files, each atomically: a killed save leaves the previous one."""
        state = {
            "config": self.config.to_dict(), "data": self._data(), "step": self.step,
            "seconds": self.seconds, "smooth_loss": self.smooth_loss, "history": self.history,
            "nets": self.nets.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / (STATE + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.folder / STATE)
        self.save_checkpoint(self.folder / CHECKPOINT)

    def save_checkpoint(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """The EMA weights as one file that the loader reads."""
        spectrum = self.ema["spectrum"] if "spectrum" in self.ema else None
        save_checkpoint(
            path, self.ema["model"], spectrum, latent_space=self.data.latent_space,
            class_names=self.data.class_names, training=self.summary(), dtype=dtype,
        )

    def summary(self) -> dict:
        """What the checkpoint remembers of its training."""
        config = self.config.to_dict()
        return {
            "step": self.step, "images": self.step * self.config.batch_size, "seconds": round(self.seconds, 1),
            "device": self.device.type, "torch": torch.__version__, "log": self.history,
            "config": {k: v for k, v in config.items() if k not in ("model", "spectrum", *PATHS)},
        }

    def _data(self) -> dict:
        """What must be the same when a run goes on, beside the configuration; plain values."""
        names = self.data.class_names
        return {"classes": names and list(names), "samples": len(self.data)}

    def _resume(self) -> None:
        state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        changed = changes(state["config"], self.config.to_dict())
        if changed:
            raise ValueError(f"{self.folder} holds a run of another configuration ({'; '.join(changed)}); choose another --out")
        before, now = state["data"], self._data()
        if before["classes"] != now["classes"]:
            raise ValueError(f"{self.folder} holds a run of other classes ({before['classes']} there, {now['classes']} in the "
                             "data now); choose another --out")
        if before["samples"] != now["samples"]:
            say(f"the data has {now['samples']} samples now, {before['samples']} when the run was saved; going on with them")
        self.nets.load_state_dict(state["nets"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.smooth_loss, self.history = state["smooth_loss"], state["history"]
        trim_log(self.folder / LOG, self.step)

    def log(self, numbers: dict[str, float]) -> None:
        """One line of JSON; a sparse copy of it goes into the checkpoint."""
        with open(self.folder / LOG, "a", encoding="utf-8") as f:
            f.write(json.dumps({k: _short(v) for k, v in numbers.items()}) + "\n")
        every = max(self.config.log_every, self.config.steps // 20)
        if numbers["step"] % every == 0:
            self.history.append([numbers["step"], _short(numbers["loss_smooth"])])


def quartiles(terms: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss of each quarter of sigma in [0, 1], where the batch has any."""
    quarter = (terms["sigma"] * 4).long().clamp(max=3)
    return {f"loss_q{q}": terms["loss"][quarter == q].mean().item() for q in range(4) if (quarter == q).any()}


def trim_log(path: Path, step: int) -> None:
    """Drop lines written after the state that a run resumes from."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
