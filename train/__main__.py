"""``python -m train --preset digits``: train a checkpoint; run it again to go on where it stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .config import PRESETS, TrainConfig, override
from .images import say
from .samples import save_samples
from .stop import StopRequest
from .trainer import CHECKPOINT, Trainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train", description="Train a GMFlow checkpoint.")
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), help="what to train")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the data, for presets that need one (sets data_path)")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[],
                        help="change one setting, e.g. steps=500 or model.num_layers=4; may be repeated")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/PRESET)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--export", type=Path, help="also write the finished checkpoint here, in float16")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, take one step, write nothing")
    return parser.parse_args()


def train(trainer: Trainer) -> None:
    """Steps until the configuration's last, with a progress bar, a log, samples and saves.

    Ctrl-C and SIGTERM end it after the current step, with a save: SystemExit with the shell's code for the signal.
    """
    config, folder = trainer.config, trainer.folder
    with StopRequest() as stop, tqdm(total=config.steps, initial=trainer.step, unit="step", smoothing=0.05) as bar:
        while trainer.step < config.steps and not stop.signal:
            numbers = trainer.train_step()
            bar.update()
            step, last = trainer.step, trainer.step == config.steps
            if step % config.log_every == 0 or last or "skipped" in numbers:
                bar.set_postfix({name: f"{numbers[name]:.3g}" for name in ("loss", "lr", "skipped") if name in numbers})
                attempt("the log", lambda: trainer.log(numbers))
            if step % config.sample_every == 0 or last:
                attempt("samples", lambda: save_samples(trainer.ema, trainer.data, folder / f"samples-{step:06d}.png"))
            if step % config.save_every == 0 and not last:
                attempt("a save", trainer.save)
        trainer.save()
    if stop.signal:
        print(f"stopped at step {trainer.step}, saved; run the same command to go on", file=sys.stderr)
        raise SystemExit(128 + stop.signal)


def attempt(what: str, write: Callable[[], None]) -> None:
    """A full disk should not end a run: say so and go on."""
    try:
        write()
    except OSError as error:
        say(f"{what} failed: {error}; training goes on")


def dry_run(config: TrainConfig, device: torch.device) -> None:
    """The settings, the size of the networks and the numbers of one step; nothing is written."""
    print(json.dumps(config.to_dict(), indent=2))
    trainer = Trainer(replace(config, batch_size=min(config.batch_size, 16)), None, device)
    print(f"{sum(p.numel() for p in trainer.nets.parameters()):,} parameters on {device}")
    print(json.dumps(trainer.train_step()))


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        data = [f"data_path={args.data}"] if args.data else []
        config = override(PRESETS[args.preset], data + args.settings)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if args.dry_run:
            dry_run(config, device)
            return 0
        trainer = Trainer(config, args.out or Path("runs") / args.preset, device)
        train(trainer)
        if args.export:
            trainer.save_checkpoint(args.export, torch.float16)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {args.export or trainer.folder / CHECKPOINT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
