"""Does it do what the paper says? ``python -m train.reproduce checkerboard [--quick] [--out DIR]``

Trains GMFlow with K = 1, 8 and 64 and vanilla flow matching on the checkerboard, samples each with every solver at 1 to
32 network calls, draws the paper's figures 2 and 3 and writes figures of merit. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core import GMDenoiser
from gmflow_core.cli import Parser, number, open_device, run_command
from gmflow_core.files import write_picture, write_text
from gmflow_core.pictures import scatter, sheet

from .config import PRESETS, TrainConfig
from .data.checkerboard import Checkerboard
from .evaluate.baselines import EULER, MISSING, SCHEDULERS, has_diffusers
from .evaluate.checkerboard_metrics import cells, metrics
from .evaluate.settings import SOLVERS, Setting, solve
from .folder import locked
from .trainer import Trainer

STEPS = (1, 2, 4, 8, 16, 32)  # network calls
ABLATION = "GM-ODE 2, not re-anchored"
GM_SOLVERS = ("GM-ODE 1", "GM-ODE 2", ABLATION, "GM-SDE 1", "GM-SDE 2")
KEYS = {title: key for key, title in SOLVERS.items()}
TITLES = {"k1": "GMFlow K=1", "k8": "GMFlow K=8", "k64": "GMFlow K=64", "vanilla": "vanilla"}
POINTS, QUICK_POINTS = 32_768, 4096
FIGURES = {
    "outside": "Share of samples outside the support",
    "kl": "KL(true || samples) of histograms, nats",
    "wasserstein": "Sliced Wasserstein distance to true samples (a cell is 2 wide)",
    "spread": "Spread: RMS distance from the centre over the true one (below 1: gathered in the centre)",
    "uneven": "Unevenness over the 8 cells (total variation)",
}


@dataclass(frozen=True)
class Row:
    """One row of the tables and pictures."""

    model: str   # a key of TITLES
    solver: str

    @property
    def title(self) -> str:
        return f"{TITLES[self.model]}, {self.solver}"


# ---- training ----------------------------------------------------------------------------------

def configs(quick: bool, steps: int | None = None) -> dict[str, TrainConfig]:
    """The four trainings. ``quick``: fewer and smaller steps at a higher learning rate that falls to zero.
    ``steps`` of each, if given."""
    base = replace(PRESETS["checkerboard"], save_every=250)
    if quick:
        base = replace(base, steps=2500, batch_size=512, lr=1e-3, lr_decay="cosine", ema_decay=0.99)
    base = replace(base, steps=steps or base.steps)
    gm = {f"k{k}": replace(base, model=replace(base.model, num_gaussians=k)) for k in (64, 8, 1)}
    return gm | {"vanilla": replace(base, loss="l2", model=replace(base.model, num_gaussians=1, constant_logstd=0.0))}


def trained(config: TrainConfig, folder: Path, device: torch.device, name: str) -> tuple[nn.Module, float]:
    """The moving average of a finished run in ``folder`` and its seconds; goes on with a run that is not finished."""
    trainer = Trainer(config, folder, device)
    if trainer.changed:
        raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(trainer.changed)}); "
                         "choose another --out")
    with tqdm(total=config.steps, initial=trainer.step, desc=name, unit="step", smoothing=0.05, mininterval=1) as bar:
        while trainer.step < config.steps:
            numbers = trainer.train_step()
            bar.update()
            if trainer.step % config.log_every == 0 or trainer.step == config.steps:
                bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
                trainer.log(numbers)
            if trainer.step % config.save_every == 0 or trainer.step == config.steps:
                trainer.save()
    return trainer.ema["model"].eval(), trainer.seconds


# ---- sampling ----------------------------------------------------------------------------------

def rows(baselines: bool) -> list[Row]:
    """Every model with every solver; ``baselines``: also those that need diffusers."""
    vanilla = [EULER, *(SCHEDULERS if baselines else ())]
    return [Row(k, s) for k in ("k64", "k8", "k1") for s in GM_SOLVERS] + [Row("vanilla", s) for s in vanilla]


@torch.no_grad()
def sample_points(model: nn.Module, solver: str, steps: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Samples (N,2) from noise x (N,2), by a solver of GM_SOLVERS, EULER or SCHEDULERS, in ``steps`` network calls."""
    reanchored = solver != ABLATION
    setting = Setting(KEYS[solver] if reanchored else "gm-ode2", steps, reanchored=reanchored, tilt="published")
    return solve(setting, GMDenoiser(model), x, generator=generator)


def sample_all(models: dict[str, nn.Module], table: list[Row], points: int,
               device: torch.device) -> dict[Row, list[Tensor]]:
    """Samples on the CPU, a list over STEPS for each row; all rows start from the same noise."""
    x = torch.randn(points, 2, generator=torch.Generator().manual_seed(1)).to(device)
    samples = {}
    for row in tqdm(table, desc="sampling", unit="row"):
        draws = (sample_points(models[row.model], row.solver, n, x, torch.Generator().manual_seed(2)) for n in STEPS)
        samples[row] = [y.cpu() for y in draws]
    return samples


# ---- figures of merit --------------------------------------------------------------------------

def measure(samples: dict[Row, list[Tensor]], points: int) -> dict:
    """Every figure of every row, and of true samples: what the figures are where nothing is wrong."""
    true, other = (Checkerboard.load().batch(points, torch.Generator().manual_seed(s))[0] for s in (3, 4))
    table = [
        {"model": row.model, "solver": row.solver, "steps": n, **metrics(x, true)}
        for row, draws in samples.items() for n, x in zip(STEPS, draws, strict=True)
    ]
    return {"points": points, "true_samples": metrics(other, true), "rows": table}


def markdown(result: dict) -> str:
    """One table a figure: rows are models and solvers, columns the number of network calls."""
    parts = []
    for name, title in FIGURES.items():
        floor = _cell(name, result["true_samples"][name])
        lines = [f"**{title}** (true samples: {floor})", "", "| model, solver | " + " | ".join(map(str, STEPS)) + " |"]
        lines.append("|" + " --- |" * (len(STEPS) + 1))
        values: dict[Row, list[str]] = {}
        for r in result["rows"]:
            values.setdefault(Row(r["model"], r["solver"]), []).append(_cell(name, r[name]))
        parts.append("\n".join(lines + [f"| {row.title} | " + " | ".join(v) + " |" for row, v in values.items()]))
    return "\n\n".join(parts) + "\n"


def _cell(name: str, value: float) -> str:
    if value != value:
        return "-"
    return f"{100 * value:.1f} %" if name == "outside" else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


# ---- pictures ----------------------------------------------------------------------------------

INSIDE, OUTSIDE = (0, 90, 150), (222, 95, 0)  # inks that the colour-blind tell apart
FIGURE_2 = [Row("k64", s) for s in ("GM-ODE 1", "GM-ODE 2", "GM-SDE 1", "GM-SDE 2")]
FIGURE_2 += [Row("vanilla", s) for s in (EULER, *SCHEDULERS)]
FIGURE_3 = [Row(k, s) for k in ("k1", "k8", "k64") for s in ("GM-ODE 1", "GM-ODE 2", ABLATION)]
DRAWN = 8192  # more points would hide each other


def board(size: int, limit: float):
    """The support, faintly, on white."""
    from PIL import Image

    centres = ((torch.arange(size) + 0.5) / size * 2 - 1) * limit
    y, x = torch.meshgrid(centres.flip(0), centres, indexing="ij")
    faint = torch.where(cells(torch.stack([x, y], -1).reshape(-1, 2)) >= 0, 232, 255).byte()
    return Image.frombytes("L", (size, size), faint.numpy().tobytes()).convert("RGB")


def tile(points: Tensor, size: int = 132, limit: float = 4.8):
    """Points (N,2) as a small picture: blue where they belong, orange where they do not, over the faint board."""
    from PIL import Image, ImageChops

    points = points[:DRAWN]
    belongs = cells(points) >= 0
    picture = board(size, limit)
    for part, ink in ((points[belongs], INSIDE), (points[~belongs], OUTSIDE)):
        inked = ImageChops.lighter(scatter(part, limit, size), Image.new("RGB", picture.size, ink))
        picture = ImageChops.multiply(picture, inked)
    return picture


def grid(samples: dict[Row, list[Tensor]], wanted: list[Row], title: str, note: str):
    """A row of tiles for each wanted row that was sampled, a column for each number of network calls."""
    shown = [row for row in wanted if row in samples]
    tiles = [[tile(x) for x in samples[row]] for row in shown]
    names = [f"{TITLES[row.model]}\n{row.solver}" for row in shown]
    return sheet(tiles, names, [f"{n} step{'s' if n > 1 else ''}" for n in STEPS], title, note)


def save_pictures(samples: dict[Row, list[Tensor]], out: Path) -> None:
    """figure2.png: GMFlow beside vanilla flow matching; figure3.png: numbers of components, orders, the ablation."""
    note = "Blue: on the board. Orange: outside its cells. A step is one network call."
    for name, wanted, title in (
        ("figure2", FIGURE_2, "The checkerboard in a few steps: GMFlow and vanilla flow matching"),
        ("figure3", FIGURE_3, "Components, second order, and second order without re-anchoring"),
    ):
        picture = grid(samples, wanted, title, note)
        few = picture.quantize(96, method=2, dither=0)  # octree: keeps rare colours
        write_picture(out / f"{name}.png", few, optimize=True)


# ---- the command -------------------------------------------------------------------------------

def run(trainings: dict[str, TrainConfig], out: Path, points: int, device: torch.device) -> dict:
    """Everything: the runs in out/NAME, figures.json, table.md, and the two pictures."""
    models, seconds = {}, {}
    for name, config in trainings.items():
        models[name], seconds[name] = trained(config, out / name, device, TITLES[name])
    baselines = has_diffusers()
    if not baselines:
        print(MISSING, file=sys.stderr)
    start = time.perf_counter()
    samples = sample_all(models, rows(baselines), points, device)
    seconds["sampling"] = time.perf_counter() - start
    result = {
        **measure(samples, points),
        "steps": {name: config.steps for name, config in trainings.items()},
        "batch_size": {name: config.batch_size for name, config in trainings.items()},
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
        "left_out": [] if baselines else list(SCHEDULERS),
        "device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }
    plain = [{k: None if v != v else v for k, v in row.items()} for row in result["rows"]]  # JSON has no NaN
    write_text(out / "figures.json", json.dumps(result | {"rows": plain}, indent=1) + "\n")
    write_text(out / "table.md", markdown(result))
    save_pictures(samples, out)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m train.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["checkerboard"], help="what to reproduce")
    parser.add_argument("--quick", action="store_true", help="train for minutes instead of hours")
    parser.add_argument("--steps", type=number(int, 1), metavar="N",
                        help="steps of each training instead of 20,000 (2,500 with --quick)")
    parser.add_argument("--out", type=Path, help="folder (default runs/reproduce-checkerboard[-quick][-N])")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")

    def action() -> None:
        args = parser.parse_args(arguments)
        name = "reproduce-checkerboard" + "-quick" * args.quick + (f"-{args.steps}" if args.steps else "")
        out, device = args.out or Path("runs") / name, open_device(args.device)
        with locked(out, "reproduces"):
            result = run(configs(args.quick, args.steps), out, QUICK_POINTS if args.quick else POINTS, device)
        print(markdown(result) + f"\n{out / 'table.md'}, {out / 'figures.json'}, {out / 'figure2.png'}, "
                                 f"{out / 'figure3.png'}")

    return run_command(action, "stopped; run the same command to go on from the last save")


if __name__ == "__main__":
    sys.exit(main())
