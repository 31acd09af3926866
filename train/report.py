"""``python -m train.report RUN``: a run on one page, ``report.html``, from its log, samples and checkpoint.
Also written at its end."""

from __future__ import annotations

import base64
import math
import sys
from html import escape
from itertools import pairwise
from pathlib import Path

from gmflow_core.cli import Parser, run_command
from gmflow_core.describe import described, identify
from gmflow_core.files import write_text

from .runlog import LOG, read_lines
from .svg import Line, chart

REPORT = "report.html"
CHECKPOINT = "checkpoint.safetensors"
SAMPLES = 8  # sample pictures on the page
WIDE, NARROW = 1100, 360  # of charts that have a row for themselves, and of three in one
USAGE = ("Components in use: exp of the entropy of the batch's mean weights. Far below K means that some have died. "
         "The entropy tells how undecided a pixel is.")
QUARTERS = ("σ < ¼", "¼ to ½", "½ to ¾", "σ > ¾")
# settings of no interest here
HIDDEN = ("data", "workers", "log_every", "sample_every", "save_every", "tensorboard", "max_bad_steps")

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --card: #fff; --ink: #26262a; --faint: #6f6f78; --edge: #e2e2de;
  --c0: #0072b2; --c1: #d08700; --c2: #009e73; --c3: #c25a94; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --card: #202226; --ink: #e6e6e3; --faint: #9a9aa3;
  --edge: #34363c; --c0: #56b4e9; --c1: #e69f00; --c2: #2cc295; --c3: #e08fbb; --bad: #ff7a6b; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1160px; padding: 28px 20px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 17px; margin: 30px 0 10px } p { margin: 4px 0; color: var(--faint) }
.tiles, .charts, .samples, .facts { display: grid; gap: 12px }
.tiles { grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); margin-top: 18px }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)) }
.charts.three { grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)) }
.samples { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)) }
.facts { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); align-items: start }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px; min-width: 0 }
.wide { grid-column: 1 / -1; overflow-x: auto } .wide > svg { min-width: 620px }
.tiles ~ p, .charts + p, .samples + p { margin-top: 8px }
.card b { display: block; font-size: 21px; font-weight: 600 }
.card span, figcaption { color: var(--faint); font-size: 13px }
svg { display: block; width: 100%; height: auto; overflow: visible } svg svg { overflow: hidden }
svg text { fill: var(--faint); font-size: 12px } svg .title { fill: var(--ink); font-size: 14px; font-weight: 600 }
svg .end { text-anchor: end } svg .middle { text-anchor: middle } svg .name { font-size: 12.5px; font-weight: 600 }
.grid { stroke: var(--edge) } .rule { stroke: var(--faint); stroke-dasharray: 4 4 }
.mark { stroke: var(--bad); stroke-width: 1.5 }
path { fill: none; stroke-linejoin: round } .raw { opacity: .28; stroke-width: 1 } .line { stroke-width: 2 }
path.c0 { stroke: var(--c0) } path.c1 { stroke: var(--c1) } path.c2 { stroke: var(--c2) } path.c3 { stroke: var(--c3) }
tspan.c0, .dot.c0 { fill: var(--c0) } tspan.c1, .dot.c1 { fill: var(--c1) }
tspan.c2, .dot.c2 { fill: var(--c2) } tspan.c3, .dot.c3 { fill: var(--c3) }
figure { margin: 0 } img { display: block; max-width: 100%; margin: 0 auto 6px; border-radius: 3px }
table { border-collapse: collapse; width: 100% }
td { padding: 3px 0; vertical-align: top } td:first-child { color: var(--faint); padding-right: 14px }
tr + tr td { border-top: 1px solid var(--edge) } td:last-child { text-align: right; overflow-wrap: anywhere }
@media print { .card, figure { break-inside: avoid } }
"""


def write_report(folder: Path, path: Path | None = None) -> Path | None:
    """Write a run's page, whole or not at all; its path, or None while the log is empty.
    ValueError if the folder holds no run."""
    lines, path = read_log(folder), path or folder / REPORT
    if not lines:
        return None
    text = page(folder, lines)
    write_text(path, text)
    return path


def page(folder: Path, lines: list[dict]) -> str:
    info = checkpoint_info(folder)
    config = info["training"].get("config", {}) if info else {}
    steps = config.get("steps")
    now = lines[-1]["step"]
    state = f"step {now:,.0f}" + (f" of {steps:,}" if steps else "") + (", finished" if steps and now >= steps else "")
    body = [
        f"<h1>{escape(folder.resolve().name)}</h1><p>{escape(config.get('data', 'a run without a save'))}, {state}</p>",
        f'<div class="tiles">{"".join(tiles(lines, info, config))}</div>',
        "<h2>Loss</h2>", cards(loss_charts(lines)),
        *section("Mixture", cards(mixture_charts(lines, info)), USAGE),
        "<h2>Optimisation</h2>", cards(optimiser_charts(lines, config), "charts three"),
        *section("Samples", samples(folder),
                 "GM-ODE in eight steps from the same noise, without guidance, by the moving average of the weights."),
        "<h2>Model, data and settings</h2>", facts(info, config),
        "<p>Pale lines are what the log holds, strong ones their running mean over a twentieth of the run.</p>",
    ]
    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(folder.resolve().name)}: training</title><style>{STYLE}</style>{''.join(body)}</html>\n")


# ---- reading -----------------------------------------------------------------------------------

def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log; one that is being written is left out."""
    path = folder / LOG
    if not path.is_file():
        if (folder / CHECKPOINT).is_file():  # stopped before its first line
            return []
        raise ValueError(f"{folder}: no {LOG} in it; give the folder of a run, as --out of python -m train named it")
    return read_lines(path)


def checkpoint_info(folder: Path) -> dict | None:
    """What the checkpoint says of itself; None before the first save."""
    path = folder / CHECKPOINT
    return identify(path) if path.is_file() else None


def series(lines: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) where the log has one."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]


def speed(lines: list[dict], batch: int | None) -> list[tuple[float, float]]:
    """Images a second: of the log, else of its clock."""
    logged = series(lines, "images_per_second")
    clock = series(lines, "seconds")
    if logged or not batch:
        return logged
    return [(b[0], (b[0] - a[0]) * batch / (b[1] - a[1])) for a, b in pairwise(clock) if b[1] > a[1]]


# ---- parts of the page -------------------------------------------------------------------------

def tiles(lines: list[dict], info: dict | None, config: dict) -> list[str]:
    """The figures at the top."""
    loss, seconds = series(lines, "loss_smooth"), series(lines, "seconds")
    rates = speed(lines, config.get("batch_size"))
    saves = [value for _, value in series(lines, "save_seconds")]
    found = {"loss, smoothed": f"{loss[-1][1]:.4g}"} if loss else {}
    if info:
        found["parameters"] = large(info["parameters"] + info["spectrum_parameters"])
    if config:
        found["images seen"] = large(lines[-1]["step"] * config["batch_size"])
    if seconds:
        found["of training"] = duration(seconds[-1][1])
    left = config.get("steps", 0) - lines[-1]["step"]
    if left > 0 and rates:
        found["left, about"] = duration(left * config["batch_size"] / rates[-1][1])
    if rates:
        found["images a second"] = f"{sorted(value for _, value in rates)[len(rates) // 2]:,.1f}"
    for name, label, unit in (("mfu", "of the GPU's peak", 100), ("memory_gb", "GB on the GPU", 1)):
        if values := series(lines, name):
            found[label] = f"{values[-1][1] * unit:.3g}" + (" %" if name == "mfu" else "")
    if saves:
        found["longest halt for a save"] = f"{max(saves):.2g} s"
    found["skipped steps"] = f"{max([value for _, value in series(lines, 'skipped')], default=0):.0f}"
    return [f'<div class="card"><b>{value}</b><span>{label}</span></div>' for label, value in found.items()]


def loss_charts(lines: list[dict]) -> list[str]:
    skipped = [step for step, _ in series(lines, "skipped")]
    title = "Loss" + (f", {len(skipped)} skipped steps marked" if skipped else "")
    return [
        chart(title, [Line("loss", series(lines, "loss"))], width=WIDE, marks=skipped),
        chart("Loss by noise level", [Line(name, series(lines, f"loss_q{q}")) for q, name in enumerate(QUARTERS)],
              width=WIDE),
        chart("Transition loss", [Line("transition", series(lines, "transition"))]),
        chart("Spectral loss", [Line("spectral", series(lines, "spectral"))]),
    ]


def mixture_charts(lines: list[dict], info: dict | None) -> list[str]:
    k = info["num_gaussians"] if info else None
    return [
        chart(title, [Line(name, series(lines, name))], bounds=(0, 1.1 * most if k else None),
              rule=(most, label) if k else None)
        for name, title, most, label in (
            ("components", "Components in use", k or 0, f"all {k}"),
            ("entropy", "Entropy of a pixel's weights, in nats", math.log(k or 1), "undecided"),
        )
    ]


def optimiser_charts(lines: list[dict], config: dict) -> list[str]:
    clip = config.get("clip_norm")
    return [
        chart(title, [line], width=NARROW, bounds=(0, None),
              rule=(clip, "clipped above") if clip and line.name == "norm" else None)
        for title, line in (
            ("Gradient norm, before clipping", Line("norm", series(lines, "grad_norm"))),
            ("Learning rate", Line("lr", series(lines, "lr"), smooth=False)),
            ("Images a second", Line("speed", speed(lines, config.get("batch_size")))),
        )
    ]


def cards(charts: list[str], style: str = "charts") -> str:
    """Charts in boxes; one that is drawn wide has a row for itself."""
    boxes = [f'<div class="card{" wide" if f"0 0 {WIDE} " in svg[:40] else ""}">{svg}</div>' for svg in charts if svg]
    return f'<div class="{style}">{"".join(boxes)}</div>' if boxes else ""


def section(title: str, content: str, note: str) -> list[str]:
    return [f"<h2>{title}</h2>", content, f"<p>{note}</p>"] if content else []


def samples(folder: Path) -> str:
    """The first and the last sample pictures and some between, inside the page."""
    paths = sorted(folder.glob("samples-*.png"))
    last = len(paths) - 1
    chosen = [paths[i] for i in sorted({round(k * last / (SAMPLES - 1)) for k in range(SAMPLES)})] if paths else []
    figures = []
    for path in chosen:
        data = base64.b64encode(path.read_bytes()).decode()
        step = path.stem.removeprefix("samples-")
        caption = f"step {int(step):,}" if step.isdigit() else path.name
        figures.append(f'<figure class="card"><img alt="samples of {caption}" src="data:image/png;base64,{data}">'
                       f"<figcaption>{caption}</figcaption></figure>")
    return f'<div class="samples">{"".join(figures)}</div>' if figures else ""


def facts(info: dict | None, config: dict) -> str:
    if info is None:
        return "<p>Nothing has been saved yet; the first save brings them.</p>"
    run = {name: info["training"][name] for name in ("device", "processes", "torch", "init_from")
           if info["training"].get(name)}
    model = {name: words for name, words in described(info).items() if name != "training"}
    model |= {"data": config.get("data"), **run}
    shown = [(name, plain(value)) for name, value in config.items() if name not in HIDDEN]
    half = -(-len(shown) // 2)
    return f'<div class="facts">{"".join(table(rows) for rows in (model.items(), shown[:half], shown[half:]))}</div>'


def table(rows) -> str:
    cells = "".join(f"<tr><td>{escape(str(name).replace('_', ' '))}</td><td>{escape(str(value))}</td></tr>"
                    for name, value in rows)
    return f'<div class="card"><table>{cells}</table></div>'


def plain(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def large(count: float) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> int:
    parser = Parser(prog="python -m train.report",
                                     description="A run on one page, also while it goes on.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help=f"the page (default {REPORT} in that folder)")

    def action() -> int:
        args = parser.parse_args()
        path = write_report(args.run, args.out)
        print(path or f"{args.run / LOG} has no line yet: the run has to train log_every steps first")
        return 0 if path else 2

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
