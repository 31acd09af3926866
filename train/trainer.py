"""A run in a folder: one optimizer step at a time, files, resume."""

from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from gmflow_core import save_checkpoint
from gmflow_core.files import file_size, not_written, remove_remains, write_atomically
from gmflow_core.pickles import torch_says

from .config import PATHS, TrainConfig, changes
from .console import attempt, say
from .data.open import open_data
from .folder import keep_snapshot
from .holdout import held_out_figures, split
from .initialise import initialise
from .runlog import LOG, RunLog
from .saving import Background, HostCopies
from .step import (
    Inputs,
    Objective,
    averaged,
    build,
    learning_rate,
    make_optimizer,
    networks_of,
    prepare,
    recompute_activations,
    set_learning_rate,
    step_inputs,
    tally,
    update_ema,
)
from .team import Team, share_of, whole
from .throughput import Speed

STATE = "state.pt"
CHECKPOINT = "checkpoint.safetensors"
__all__ = ["CHECKPOINT", "LOG", "STATE", "Trainer"]


class Trainer:
    """A run in a folder: ``state.pt`` (resume), ``checkpoint.safetensors`` (EMA, for the loader), ``log.jsonl``.

    Without a folder nothing is written or resumed. In a team every member is a trainer, and all of them
    have the same weights at every step.
    """

    def __init__(self, config: TrainConfig, folder: Path | None, device: torch.device, team: Team | None = None):
        self.folder, self.device, self.team = folder, device, team or Team(device)
        check_pieces(config, self.team.size)
        data, self.config = open_data(config)
        self.data, self.held_out = split(data, self.config)
        resumed = folder is not None and (folder / STATE).exists()
        self.shared_out = self.config.parallel == "fsdp" and self.team.size > 1
        self.nets, self.ema, self.averages = self._networks(initialised=not resumed)
        self.optimizer = make_optimizer(self.config, self.nets, device)
        self.step, self.images, self.seconds, self.smooth_loss = 0, 0, 0.0, None
        self.skipped, self.skipped_in_a_row = 0, 0  # steps whose loss or gradient was not finite
        part = self.team.part(config.batch_size)
        self.inputs = Ahead(lambda step: step_inputs(self.config, self.data, step, part))
        self.copies, self.writer = HostCopies(device), Background()
        self.save_seconds = 0.0  # for which training stood still, since the last line of the log
        self.changed: list[str] = []  # in words, settings that the run began with and has no more
        self.run_log = None if folder is None else self._open(folder)
        if resumed:
            self._resume()
        elif self.run_log and self.team.first:
            self._begin()
        self.team.agree({"step": self.step, **self._data()},
                        "all machines need the same --out, on storage that they share, and the same data")
        self.objective = self._objective()
        self.speed = Speed(self.config, self.team, self.step, self.seconds)

    def _networks(self, initialised: bool) -> tuple[nn.ModuleDict, nn.ModuleDict, dict[float, nn.ModuleDict]]:
        """The networks, their moving average and those beside it, where they are kept; whole or shared out."""
        config, device = self.config, self.device
        prepare(device, config.tf32)
        nets = build(config, device)
        if config.init_from is not None and initialised:
            initialise(nets, config, config.init_from)
        ema, *others = (copy.deepcopy(nets).requires_grad_(False) for _ in (config.ema_decay, *config.ema_decays))
        for module in (nets, ema, *others):
            if self.shared_out:
                self.team.share_out(module)
            else:
                module.to(device if module is nets or config.ema_device == "same" else "cpu")
        return nets, ema, dict(zip(config.ema_decays, others, strict=True))

    def _open(self, folder: Path) -> RunLog:
        """The run's folder without what a killed save left, and its log."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.team.first:
            remove_remains(folder)
        return RunLog(folder, max(self.config.log_every, self.config.steps // 20), self.config.tensorboard)

    def _objective(self) -> nn.Module:
        """What a step calls: the losses of the networks, as the team and the settings want them computed."""
        if self.config.checkpoint_activations:
            recompute_activations(self.nets["model"])
        if self.config.compile:
            self.nets["model"].compile()
        objective = Objective(self.nets, self.config)
        return objective if self.shared_out else self.team.wrap(objective)

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self) -> dict:
        """One optimizer step; returns the numbers of the log, with ``skipped`` if the weights were left as they
        were."""
        config, start = self.config, time.perf_counter()
        inputs = self.inputs.take(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = [], {}
        for piece in inputs.split(config.accumulate):
            with self.team.alone(self.objective, len(loss) + 1 < config.accumulate):
                terms = self.objective(piece.map(lambda value: value.to(self.device, non_blocking=True)))
                (terms["loss"].mean() / config.accumulate).backward()
            loss.append(terms["loss"].detach())
            sums = {name: sums.get(name, 0) + value for name, value in tally(terms).items()}
        numbers = averaged(self.team.sum(sums))
        limit = config.clip_norm if config.clip_norm and self.step >= config.clip_from else float("inf")
        # Each network by itself: neither loss reaches the other's weights, so neither should scale its steps.
        norms = {name: whole(nn.utils.clip_grad_norm_(net.parameters(), limit)).item()
                 for name, net in self.nets.items()}
        if not all(map(math.isfinite, (numbers["loss"], *norms.values()))):
            self.seconds += time.perf_counter() - start
            return self._skip(inputs, torch.cat(loss).cpu(), numbers["loss"], norms)
        lr = learning_rate(config, self.step)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        for decay, ema in {config.ema_decay: self.ema, **self.averages}.items():
            update_ema(ema, self.nets, decay, self.step)
        self.step, self.images, self.skipped_in_a_row = self.step + 1, self.images + config.batch_size, 0
        self.seconds += time.perf_counter() - start
        previous = numbers["loss"] if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = 0.98 * previous + 0.02 * numbers["loss"]
        return {"step": self.step, **numbers, "loss_smooth": self.smooth_loss, "grad_norm": norms["model"], "lr": lr,
                "seconds": self.seconds}

    def _skip(self, inputs: Inputs, loss: torch.Tensor, mean: float, norms: dict[str, float]) -> dict:
        """Leave the weights as they are; keep the inputs of the first such step; give up after too many in a row."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = f"loss {mean:g}, gradient {', '.join(f'{name} {norm:g}' for name, norm in norms.items())}"
        # Of a team, whose part it is keeps it.
        mine = not loss.isfinite().all() or (math.isfinite(mean) and self.team.first)
        suffix = f"_rank{self.team.rank}.pt" if self.team.size > 1 else ".pt"
        if mine and self.folder is not None and not any(self.folder.glob("nan_step_*" + suffix)):
            kept = self.folder / f"nan_step_{self.step}{suffix}"
            batch = {"x_0": inputs.x_0, "labels": inputs.labels, "sigma": inputs.sigma, "noises": list(inputs.noises),
                     "loss": loss}
            content = {"step": self.step, "seed": self.config.seed, "grad_norm": norms, **batch}
            try:
                write_atomically(kept, lambda path: _save(content, path))
                what += f"; its inputs are in {kept}"
            except OSError as error:
                what += f"; {error}"
        if mine or self.team.first:
            say(f"step {self.step} is skipped, not finite: {what}")
        if self.skipped_in_a_row >= self.config.max_bad_steps:
            first = self.step - self.skipped_in_a_row + 1
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, "
                f"{first} to {self.step} ({what}); "
                "the last save is as it was. Try a lower lr or clip_norm, or precision=float32, with another --out"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.images = self.step + 1, self.images + self.config.batch_size
        return {"step": self.step, "loss": mean, "grad_norm": norms["model"], "skipped": self.skipped}

    # ---- files ---------------------------------------------------------------------------------

    def save(self, wait: bool = True) -> None:
        """Write both files, each atomically: what fails or is killed leaves the previous one. OSError if it fails.

        Without ``wait`` only copies are made here, and ``writer`` tells of a failure. All of a team save; the first
        writes.
        """
        if not (self.team.first or self.shared_out):
            return
        start = time.perf_counter()
        attempt("a save", self.writer.wait)  # the one before
        state = self.copies.take(self.state(), keep=self.team.first)
        if self.team.first:
            self.writer.start(partial(self._write, state, self.summary()))
        self.save_seconds += time.perf_counter() - start
        if wait:
            self.writer.wait()

    def reserve(self) -> None:
        """Make the host's buffers: page-locking them may take seconds, which no save should."""
        if self.team.first or self.shared_out:
            self.copies.take(self.state(), keep=self.team.first)

    def state(self) -> dict:
        """All that a run needs to go on."""
        return {
            "config": self.config.to_dict(), "data": self._data(), "step": self.step,
            "skipped": [self.skipped, self.skipped_in_a_row], "images": self.images,
            "averages": {f"{decay:g}": ema.state_dict() for decay, ema in self.averages.items()},
            "seconds": self.seconds, "smooth_loss": self.smooth_loss,
            "history": self.run_log.history if self.run_log else [],
            "nets": self.nets.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
        }

    def _write(self, state: dict, summary: dict) -> None:
        """``state.pt``, and from the same copies the EMA weights as one file that the loader reads, also numbered."""
        write_atomically(self.folder / STATE, lambda path: _save(state, path))
        self._write_average(state["ema"], self.folder / CHECKPOINT, summary)
        for decay, ema in state["averages"].items():
            path = self.folder / f"checkpoint-ema-{decay}.safetensors"
            self._write_average(ema, path, summary | {"ema_decay": float(decay)})
        if self.config.keep:
            keep_snapshot(self.folder / CHECKPOINT, state["step"], self.config.keep)

    def _write_average(self, weights: dict, path: Path, summary: dict) -> None:
        ema = networks_of(self.config, torch.device("cpu"), weights)
        spectrum = ema["spectrum"] if "spectrum" in ema else None
        try:
            save_checkpoint(
                path, ema["model"], spectrum, latent_space=self.data.latent_space, class_names=self.data.class_names,
                training=summary, time_shift=self.config.sampling_shift,
                total_substeps=self.config.total_substeps,
            )
        except (OSError, SafetensorError) as error:
            raise not_written(path, error) from error

    def average(self) -> nn.ModuleDict | None:
        """The moving average to sample with; where it is shared out, gathered for the first. All of a team must ask."""
        if not self.shared_out:
            return self.ema
        state = HostCopies(torch.device("cpu")).take(self.ema.state_dict(), keep=self.team.first)
        return networks_of(self.config, self.device, state) if self.team.first else None

    def summary(self) -> dict:
        """What the checkpoint remembers of its training."""
        config, sources = self.config.to_dict(), self.data.sources
        return {
            "step": self.step, "images": self.images, "seconds": round(self.seconds, 1),
            "skipped": self.skipped, "processes": self.team.size, "device": self.device.type,
            "torch": torch.__version__, "log": list(self.run_log.history) if self.run_log else [],
            "init_from": config["init_from"] and Path(config["init_from"]).name,
            "config": {k: v for k, v in config.items() if k not in ("model", "spectrum", *PATHS)},
            **({"sources": sources} if sources else {}),
        }

    def _data(self) -> dict:
        """What must be the same when a run goes on, beside the configuration; plain values."""
        names = self.data.class_names
        return {"classes": names and list(names), "samples": len(self.data)}

    def _begin(self) -> None:
        """At step 0, in a folder without a state. ValueError if it holds a checkpoint, which a save would replace."""
        if (self.folder / CHECKPOINT).exists():
            raise ValueError(f"{self.folder} holds {CHECKPOINT} but no {STATE} to go on from, and a new run would "
                             "replace it; choose another --out, or --fresh, which moves it aside, or --overwrite")
        self.run_log.resume(-1, [])  # the lines of a run that was killed before its first save

    def _resume(self) -> None:
        state = _load(self.folder / STATE)
        refused, changed = changes(state["config"], self.config.to_dict())
        if refused:
            raise ValueError(f"{self.folder} holds a run of another configuration ({'; '.join(refused)}); "
                             "choose another --out, or --fresh to begin again")
        self.changed = changed
        if changed and self.team.first:
            say(f"the run goes on with other settings than it began with: {'; '.join(changed)}")
        before, now = state["data"], self._data()
        if before["classes"] != now["classes"]:
            raise ValueError(f"{self.folder} holds a run of other classes ({before['classes']} there, "
                             f"{now['classes']} in the data now); choose another --out")
        if before["samples"] != now["samples"]:
            say(f"the data has {now['samples']} samples now, {before['samples']} when the run was saved; "
                "going on with them")
        self._fill(state)
        self.step, self.seconds, self.smooth_loss = state["step"], state["seconds"], state["smooth_loss"]
        self.images = state.get("images", state["step"] * state["config"]["batch_size"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if self.team.first:
            self.run_log.resume(self.step, state["history"])

    def _fill(self, state: dict) -> None:
        """Weights and AdamW's moments, of which every member takes its share if they are shared out."""
        pairs = [(self.nets, state["nets"]), (self.ema, state["ema"])]
        for decay, ema in self.averages.items():
            saved = state.get("averages", {}).get(f"{decay:g}")
            if saved is None and self.team.first:
                say(f"the run had no average of decay {decay:g} so far: it starts as that of {self.config.ema_decay:g}")
            pairs.append((ema, saved or state["ema"]))
        for own, saved in pairs:
            like = own.state_dict()
            own.load_state_dict({name: share_of(value, like[name]) for name, value in saved.items()})
        optimizer = state["optimizer"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: share_of(v, parameters[i]) if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            for i, values in optimizer["state"].items()
        }
        self.optimizer.load_state_dict(optimizer | {"state": moments})

    def held_out_figures(self) -> dict[str, float]:
        """Loss and NLL of the moving average on what is held out; of a team all must ask, and the first gets them."""
        ema = self.average()
        if self.held_out is None or ema is None:
            return {}
        home = next(ema.parameters()).device
        found = held_out_figures(ema.to(self.device), self.config, self.held_out, self.device)
        ema.to(home)
        return found

    def log(self, numbers: dict) -> None:
        """One line in the log."""
        self.run_log.write(numbers)


def check_pieces(config: TrainConfig, processes: int) -> None:
    """ValueError unless a batch splits evenly over the processes and what each of them accumulates."""
    pieces = processes * config.accumulate
    if config.batch_size % pieces:
        raise ValueError(f"batch_size {config.batch_size} does not split into {pieces} equal pieces: "
                         f"{processes} processes, accumulate={config.accumulate}")


class Ahead:
    """Computes the inputs of the next step while this one is trained."""

    def __init__(self, function):
        self.function, self.pool = function, ThreadPoolExecutor(1)
        self.step, self.future = None, None

    def take(self, step: int) -> Inputs:
        future = self.future if self.step == step else self.pool.submit(self.function, step)
        self.step, self.future = step + 1, self.pool.submit(self.function, step + 1)
        return future.result()


def _save(state: dict, path: Path) -> None:
    with open(path, "wb") as file:  # torch's own writer hides the reason of a failure
        torch.save(state, file)


def _load(path: Path) -> dict:
    file_size(path)  # a pipe would wait for ever
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch documents no list of what a damaged file raises
        raise ValueError(f"{path}: damaged ({torch_says(error)}); --fresh begins again, "
                         "or choose another --out") from error
