"""``python -m train --preset digits``: train a checkpoint; run it again to go on where it stopped."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from gmflow_core import __version__
from gmflow_core.checkpoint import convert
from gmflow_core.cli import Parser, UsageError, number, run_command
from gmflow_core.sampler import USUAL

from .config import PRESETS, TrainConfig, override
from .console import attempt
from .folder import begin_again, check_export, locked
from .preview import save_samples
from .report import write_report
from .runlog import short
from .settings import presets_help, read_settings, settings_help
from .stop import StopRequest, forgive_streams
from .team import Team, leaving
from .throughput import forward_flops
from .trainer import CHECKPOINT, Trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m train", description="Train a GMFlow checkpoint.")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what to train")
    parser.add_argument("--data", metavar="FOLDER",
                        help="folder of the data, for presets that need one (sets data_path)")
    parser.add_argument("--init-from", metavar="FILE",
                        help="start from a GMFlow checkpoint of any K, or from a DiT in diffusers' layout or its "
                             "own (sets init_from)")
    parser.add_argument("--settings", type=Path, metavar="FILE",
                        help="settings in a JSON or YAML file; --set goes before")
    parser.add_argument("--set", dest="assignments", metavar="KEY=VALUE", action="append", default=[],
                        help="change one setting, e.g. steps=500 or model.num_layers=4; may be repeated")
    parser.add_argument("--holdout", type=float, metavar="SHARE",
                        help="keep so much of the data out of training and log its loss and NLL (sets holdout)")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/PRESET)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="begin again; an earlier run in --out is moved aside")
    again.add_argument("--overwrite", action="store_true", help="begin again; an earlier run in --out is deleted")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads (default: torch's choice)")
    parser.add_argument("--export", type=Path, help="also write the finished checkpoint here, in float16")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, take one step, write nothing")
    parser.add_argument("--list-presets", action="store_true", help="what there is to train")
    parser.add_argument("--help-settings", action="store_true", help="every setting, its default and its meaning")
    parser.add_argument("--version", action="store_true", help="versions of this program and of PyTorch")
    return parser.parse_args(arguments)


def configuration(args: argparse.Namespace) -> TrainConfig:
    """The preset with the settings of the file, of the options, and of ``--set``, the later before the earlier."""
    if args.preset is None:
        raise UsageError("--preset is needed; --list-presets says what there is")
    options = {"data_path": args.data, "init_from": args.init_from, "holdout": args.holdout}
    settings = read_settings(args.settings) if args.settings else []
    settings += [f"{key}={value}" for key, value in options.items() if value is not None]
    return override(PRESETS[args.preset], settings + args.assignments)


def train(trainer: Trainer) -> None:
    """Steps until the configuration's last; the first of a team keeps a progress bar, a log, samples,
    saves and a report.

    Ctrl-C and SIGTERM end it after the current step, with a save: SystemExit with the shell's code for the signal.
    """
    config, team = trainer.config, trainer.team
    with (
        StopRequest(patient=team.size > 1) as stop,
        tqdm(total=config.steps, initial=trainer.step, unit="step", smoothing=0.05, disable=not team.first) as bar,
    ):
        try:
            start = trainer.step
            while trainer.step < config.steps and not team.any(stop.signal):
                numbers = trainer.train_step()
                bar.update()
                if trainer.step == start + 1:
                    trainer.reserve()
                after_step(trainer, numbers, bar)
        finally:  # whatever ends the run
            attempt("a save", trainer.writer.wait, "")
            trainer.run_log.close()
        trainer.save()
        if team.first:
            attempt("the report", lambda: write_report(trainer.folder), "", Exception)
        team.wait()
        if trainer.step < config.steps:
            if team.first:
                print(f"stopped at step {trainer.step}, saved; run the same command to go on", file=sys.stderr)
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))


SHOWN = {"loss": "loss", "lr": "lr", "images_per_second": "images/s", "mfu": "MFU", "memory_gb": "GB",
         "skipped": "skipped"}


def after_step(trainer: Trainer, numbers: dict, bar: tqdm) -> None:
    """What is due after a step: a line in the log, samples, a save.
    The first writes, others may have a part of the weights."""
    config, step = trainer.config, trainer.step
    last = step == config.steps
    attempt("a save", trainer.writer.check)
    if trainer.held_out is not None and (step % config.sample_every == 0 or last):
        numbers = numbers | trainer.held_out_figures()
    if trainer.team.first and (step % config.log_every == 0 or last or {"skipped", "holdout_loss"} & numbers.keys()):
        numbers = numbers | trainer.speed.report(step, trainer.seconds)
        if trainer.save_seconds:
            numbers["save_seconds"], trainer.save_seconds = trainer.save_seconds, 0.0
        attempt("the log", lambda: trainer.log(numbers))
        bar.set_postfix({label: f"{numbers[name]:.3g}" for name, label in SHOWN.items() if name in numbers})
    if step % config.sample_every == 0 or last:
        attempt("samples", lambda: draw_samples(trainer), errors=Exception)
    if step % config.save_every == 0 and not last:  # the last save is train's: it must not fail
        trainer.save(wait=False)


def draw_samples(trainer: Trainer) -> None:
    path, ema = trainer.folder / f"samples-{trainer.step:06d}.png", trainer.average()
    if trainer.team.first:
        config = trainer.config
        options = replace(USUAL, shift=config.sampling_shift, total_substeps=config.total_substeps)
        picture = save_samples(ema, trainer.data, path, device=trainer.device, options=options)
        trainer.run_log.picture(picture, trainer.step)


def dry_run(config: TrainConfig, team: Team) -> None:
    """The settings, the size of the networks and the numbers of one small step; nothing is written."""
    size = max(1, min(config.batch_size, 16) // team.size) * team.size
    trainer = Trainer(replace(config, batch_size=size, accumulate=1), None, team.device, team)
    numbers = trainer.train_step()
    if team.first:
        whole = replace(trainer.config, batch_size=config.batch_size, accumulate=config.accumulate)
        print(json.dumps(whole.to_dict(whole=True), indent=2))
        flops = forward_flops(trainer.config.model)
        print(f"{sum(p.numel() for p in trainer.nets.parameters()):,} parameters on {team.device}, "
              f"{flops / 1e9:.3g} GFLOP a sample")
        print(json.dumps({name: short(value) for name, value in numbers.items()}))


def run(args: argparse.Namespace, team: Team, config: TrainConfig) -> None:
    folder = args.out or Path("runs") / args.preset
    with locked(folder, "trains") if team.first else nullcontext():
        if team.first and (args.fresh or args.overwrite):
            begin_again(folder, keep=args.fresh)
        team.wait()
        trainer = Trainer(config, folder, team.device, team)
        train(trainer)
        if args.export and team.first:
            convert(folder / CHECKPOINT, args.export, dtype=torch.float16)
    if team.first:
        print(f"checkpoint: {args.export or folder / CHECKPOINT}")


def action() -> None:
    args = parse()
    if args.version or args.list_presets or args.help_settings:
        texts = {"version": version, "list_presets": presets_help, "help_settings": settings_help}
        return print("\n\n".join(text() for name, text in texts.items() if getattr(args, name)))
    forgive_streams()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = configuration(args)
    if args.export:
        check_export(args.export)
    team = Team.join(args.device)
    if args.dry_run:
        dry_run(config, team)
    else:
        run(args, team, config)


def version() -> str:
    return f"gmflow-nodes {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> int:
    stopped = "stopped, not saved since the last save; run the same command to go on from there"
    return leaving(lambda: run_command(action, stopped))


if __name__ == "__main__":
    sys.exit(main())
