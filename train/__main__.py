"""``python -m train --preset digits``: train a checkpoint; run it again to go on where it stopped."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .config import PRESETS, TrainConfig, override
from .samples import save_samples
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
    """Steps until the configuration's last, with a progress bar, a log, samples and saves; Ctrl-C saves and stops."""
    config = trainer.config
    with tqdm(total=config.steps, initial=trainer.step, unit="step", smoothing=0.05) as bar:
        try:
            while trainer.step < config.steps:
                numbers = trainer.train_step()
                bar.update()
                last = trainer.step == config.steps
                if trainer.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{numbers['loss']:.3f}", lr=f"{numbers['lr']:.1e}")
                    trainer.log(numbers)
                if trainer.step % config.sample_every == 0 or last:
                    save_samples(trainer.ema, trainer.data, trainer.folder / f"samples-{trainer.step:06d}.png")
                if trainer.step % config.save_every == 0 or last:
                    trainer.save()
        except KeyboardInterrupt:
            trainer.save()
            print(f"\nstopped at step {trainer.step}; run the same command to go on", file=sys.stderr)
            raise SystemExit(130) from None


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
