"""Results of an evaluation as a Markdown table and as the paper's figures 6 and 7. matplotlib draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gmflow_core.files import write_picture

from ..console import say
from .settings import BASELINES, Setting

# Okabe and Ito's, and two more
INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#555555")
MARKS = "osD^vPX*"
TILE = 640  # largest side in compare.png
MANY = 2048  # samples, Inception's features: with fewer an FID says little by itself
COLUMNS = {
    "fid": ("FID", "{:.2f}"), "precision": ("precision", "{:.3f}"), "recall": ("recall", "{:.3f}"),
    "saturation": ("saturation", "{:.3f}"), "overshoot": ("overshoot", "{:.4f}"), "mottling": ("mottling", "{:.2f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "on_palette": ("on palette", "{:.1%}"), "one_ink": ("one ink", "{:.1%}"), "ink_min": ("rarest ink", "{:.1%}"),
}


# ---- the table ---------------------------------------------------------------------------------

def markdown(results: dict) -> str:
    """Every row, grouped by checkpoint; and the checkpoints' likelihoods."""
    shown = [name for name in COLUMNS if any(name in row for row in results["rows"])]
    head = ["checkpoint", "solver", "guidance", "steps", *(COLUMNS[name][0] for name in shown)]
    lines = [
        f"{results['samples']} samples a row, seed {results['seed']}, against {results['real_images']} real images "
        f"({results['reference']}; their saturation is {results['real_saturation']:.3f}).", "",
        "| " + " | ".join(head) + " |", "|" + " --- |" * len(head),
    ]
    if results["samples"] < MANY:
        lines[1:1] = [f"FID falls with the number of samples: with {results['samples']} it compares with that of as "
                      "many only."]
    if classifier := results.get("classifier"):
        lines[1:1] = [f"Features and accuracy are a classifier's that reads {classifier['held_out']:.2%} of held-out "
                      f"real images; the mottling of real images is {classifier['real_mottling']:.2f}."]
    for row in sorted(results["rows"], key=lambda row: list(results["checkpoints"]).index(row["checkpoint"])):
        setting = Setting.of_row(row)
        figures = [COLUMNS[name][1].format(row[name]) if row.get(name) is not None else "-" for name in shown]
        cells = [row["checkpoint"], setting.title, setting.guidance_title, str(setting.steps), *figures]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| checkpoint | components | training steps | NLL, nats a pixel | by quarter of sigma |",
              "|" + " --- |" * 5]
    for name, about in results["checkpoints"].items():
        nll = about["nll"]
        likelihood = [f"{nll['mean']:.3f}", ", ".join(f"{q:.2f}" for q in nll["quarters"])] if nll else ["-", "-"]
        components = "vanilla" if about["vanilla"] else str(about["components"])
        lines.append("| " + " | ".join([name, components, str(about["steps"] or "-"), *likelihood]) + " |")
    return "\n".join(lines) + "\n"


# ---- series ------------------------------------------------------------------------------------

def label(row: dict, results: dict, guidance: bool) -> str:
    """The name of a row's line: checkpoint, solver, and with ``guidance`` its kind."""
    about = results["checkpoints"][row["checkpoint"]]
    several = sum(other["vanilla"] == about["vanilla"] for other in results["checkpoints"].values()) > 1
    kind = "vanilla" if about["vanilla"] else "GMFlow"
    parts = [f"{kind} ({row['checkpoint']})" if several else kind, Setting.of_row(row).title]
    return ", ".join(parts + [{"cfg": "CFG", "probabilistic": "probabilistic"}[row["method"]]] * guidance)


def grouped(rows: list[dict], key: Callable[[dict], object]) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def against(rows: list[dict], name: str, value: str, best) -> tuple[list, list]:
    """The best ``value`` at each ``name``, as two lists in rising order of ``name``."""
    groups = grouped(rows, lambda row: row[name])
    return sorted(groups), [best(row[value] for row in groups[x]) for x in sorted(groups)]


def curves(results: dict) -> dict[str, list[dict]]:
    """For each line of the guidance figures its rows in rising guidance: those of a method and the unguided ones, at
    the number of steps that was sampled with most scales. Lines of fewer than three points are left out."""
    found = {}
    lines = grouped(results["rows"], lambda r: (r["checkpoint"], Setting.of_row(r).title, r["steps"]))
    for (_, _, steps), rows in lines.items():
        for method in ("probabilistic", "cfg"):
            line = [row for row in rows if row["method"] == method or not Setting.of_row(row).guided]
            line = sorted({Setting.of_row(row).guided * row["guidance"]: row for row in line}.items())
            if len(line) >= 3 and any(row["method"] == method for _, row in line[1:]):
                name = label({**line[-1][1], "method": method}, results, True)
                best = found.get(name)
                if best is None or len(line) > len(best) or (len(line) == len(best) and steps > best[0]["steps"]):
                    found[name] = [row for _, row in line]
    return found


# ---- figures -----------------------------------------------------------------------------------

def save_figures(results: dict, out: Path) -> list[str]:
    """figure6.png (curves of precision and recall; FID and precision against network steps), saturation.png,
    figure7.png (against K) and compare.png, each where there is something to draw; the names of those written."""
    try:
        import matplotlib
    except ImportError:
        say("matplotlib is not installed, so no figures are drawn: python -m pip install matplotlib")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#E6E6E6", "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left",
        "legend.frameon": False, "lines.linewidth": 1.6,
        "lines.markersize": 5, "figure.facecolor": "white", "figure.dpi": 120,
    }
    written = []
    with pyplot.rc_context(style):
        for name, draw in (("figure6", figure_6), ("saturation", saturation_figure), ("figure7", figure_7)):
            figure = draw(results, pyplot)
            if figure is not None:
                figure.savefig(out / f"{name}.png", bbox_inches="tight")
                pyplot.close(figure)
                written.append(f"{name}.png")
    picture = compare(results, out)
    if picture is not None:
        write_picture(out / "compare.png", picture, optimize=True)
        written.append("compare.png")
    return written


def line_style(names: list[str]) -> dict[str, dict]:
    """A colour and a mark for each line; baselines are dashed."""
    def dashed(name: str) -> str:
        return "--" if name.startswith("vanilla") or any(b in name for b in BASELINES.values()) else "-"

    return {n: {"color": INKS[i % len(INKS)], "marker": MARKS[i // len(INKS) % len(MARKS)], "linestyle": dashed(n)}
            for i, n in enumerate(names)}


def figure_6(results: dict, pyplot):
    """Precision against recall over guidance, and the best FID and precision over guidance at each number of steps."""
    lines = {n: rows for n, rows in grouped(results["rows"], lambda r: label(r, results, False)).items()
             if len({r["steps"] for r in rows}) > 1}
    swept = curves(results)
    panels = [bool(swept), bool(lines), bool(lines)]
    if not any(panels):
        return None
    figure, axes = pyplot.subplots(1, sum(panels), figsize=(4.1 * sum(panels), 3.6), squeeze=False,
                                   layout="constrained")
    axes = list(axes[0])
    if swept:
        plot_curves(axes.pop(0), swept)
    if lines:
        style = line_style(list(lines))
        for axis, name, best, title in ((axes[0], "fid", min, "FID (lower is better)"),
                                        (axes[1], "precision", max, "Precision (higher is better)")):
            for line, rows in lines.items():
                axis.plot(*against(rows, "steps", name, best), label=line, **style[line])
            ticks = sorted({row["steps"] for row in results["rows"]})
            axis.set(title=title, xlabel="network steps, the best guidance at each", xscale="log")
            axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
            axis.minorticks_off()
        axes[0].set_yscale("log")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def plot_curves(axis, swept: dict[str, list[dict]]) -> None:
    """Precision against recall; a number beside each end tells its guidance scale."""
    from matplotlib.patheffects import Normal, Stroke

    steps = {rows[0]["steps"] for rows in swept.values()}
    words = lambda n: f", {n} step{'s' * (n > 1)}"  # noqa: E731
    for name, style in line_style(list(swept)).items():
        rows = swept[name]
        text = name if len(steps) == 1 else name + words(rows[0]["steps"])
        axis.plot([r["recall"] for r in rows], [r["precision"] for r in rows], label=text, **style)
        end = rows[-1]
        axis.annotate(f"{end['guidance']:g}", (end["recall"], end["precision"]), (-5, 0), textcoords="offset points",
                      color=style["color"], fontsize=8, ha="right", va="center",
                      path_effects=[Stroke(linewidth=2, foreground="white"), Normal()])
    axis.set(title="Precision and recall" + (words(min(steps)) if len(steps) == 1 else " over guidance"),
             xlabel="recall", ylabel="precision")
    axis.margins(x=0.09)
    axis.legend(loc="lower left", fontsize=7)  # the curves fall from left to right


def saturation_figure(results: dict, pyplot):
    """Saturation and overshoot against the scale of each kind of guidance."""
    swept = curves(results)
    if not swept:
        return None
    kinds = [method for method in ("probabilistic", "cfg")
             if any(rows[-1]["method"] == method for rows in swept.values())]
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(4.4 * len(kinds), 5.2), squeeze=False, sharey="row",
                                   sharex="col", layout="constrained")
    style = line_style(list(swept))
    for column, method in zip(axes.T, kinds, strict=True):
        for name, rows in swept.items():
            if rows[-1]["method"] == method:
                scales = [row["guidance"] if Setting.of_row(row).guided else method == "cfg" for row in rows]
                for axis, value in zip(column, ("saturation", "overshoot"), strict=True):
                    axis.plot(scales, [row[value] for row in rows], label=f"{name}, {rows[0]['steps']} steps",
                              **style[name])
        column[0].axhline(results["real_saturation"], color="#888888", linestyle=":")
        column[0].text(0.99, results["real_saturation"], "real images", transform=column[0].get_yaxis_transform(),
                       color="#666666", fontsize=8, ha="right", va="bottom")
        column[0].set(title={"probabilistic": "Probabilistic guidance", "cfg": "Vanilla CFG"}[method])
        column[1].set(xlabel={"probabilistic": "scale (0 is none)", "cfg": "scale (1 is none)"}[method])
        column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5)
    axes[0, 0].set_ylabel("mean saturation (HSV)")
    axes[1, 0].set_ylabel("RMS beyond the range")
    return figure


def figure_7(results: dict, pyplot):
    """FID and precision against the number of components, the best over guidance;
    a line a solver and number of steps."""
    rows = [row for row in results["rows"] if not results["checkpoints"][row["checkpoint"]]["vanilla"]]
    rows.sort(key=lambda r: (Setting.of_row(r).title, r["steps"]))
    groups = grouped(rows, lambda r: f"{Setting.of_row(r).title}, {r['steps']} step{'s' * (r['steps'] > 1)}")
    lines = {name: group for name, group in groups.items() if len({row["components"] for row in group}) > 1}
    if not lines:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(8.2, 3.4), layout="constrained")
    for axis, value, best, title in ((axes[0], "fid", min, "FID (lower is better)"),
                                     (axes[1], "precision", max, "Precision (higher is better)")):
        for (name, group), style in zip(lines.items(), line_style(list(lines)).values(), strict=True):
            axis.plot(*against(group, "components", value, best), label=name, **style)
        ticks = sorted({row["components"] for row in rows})
        axis.set(title=title, xlabel="components K, the best guidance at each", xscale="log")
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.minorticks_off()
    axes[0].set_yscale("log")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def compare(results: dict, out: Path):
    """The first samples of every solver and guidance that was run with several numbers of steps:
    a Pillow image, or None."""
    from PIL import Image

    from gmflow_core.pictures import sheet

    lines = grouped(results["rows"], lambda r: f"{label(r, results, False)}\n{guidance_words(r)}")
    lines = {name: {row["steps"]: row for row in rows} for name, rows in lines.items()
             if len({row["steps"] for row in rows}) > 1}
    if not lines:
        return None
    steps = sorted({n for line in lines.values() for n in line})

    def tile(row: dict | None):
        if row is None or not (out / row["picture"]).is_file():
            return Image.new("RGB", (1, 1), "white")
        picture = Image.open(out / row["picture"]).convert("RGB")
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        return picture

    tiles = [[tile(line.get(n)) for n in steps] for line in lines.values()]
    return sheet(tiles, list(lines), [f"{n} step{'s' * (n > 1)}" for n in steps], "The same noise and classes")


def guidance_words(row: dict) -> str:
    setting = Setting.of_row(row)
    return f"guidance {setting.guidance:g}" if setting.guided and setting.method == "probabilistic" else \
        f"CFG {setting.guidance:g}" if setting.guided else "unguided"
