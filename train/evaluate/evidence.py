r"""What evidence does to digits, beside other ways to use it:
``python -m train.evaluate CHECKPOINT --evidence half hint grey``

Real digits in random inks are hidden but for what a task shows of them; labels are known. ``exact`` asks no checkpoint:
it is about a prior that is known exactly. Rows are added to OUT/evidence.json as they are made: run again to go on, or
with other tasks, methods or settings to add theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files import write_atomically
from gmflow_core.guidance import TILTS
from gmflow_core.hints import hint, in_colour
from gmflow_core.inspection.statistics import chosen_hypothesis
from gmflow_core.inspection.trace import Recorder
from gmflow_core.pictures import image_grid
from gmflow_core.sampler import GUIDANCE_TILT

from ..console import say
from ..data.digits import Digits
from .digits_metrics import dominant_inks, grey8, hue_metrics, train_svm
from .evidence_exact import CASES, total_variation
from .evidence_methods import CALLS, METHODS, Problem
from .evidence_tasks import TASKS, Task, Truth
from .features import digits_features
from .image_metrics import quantise
from .neighbours import precision_recall
from .reference import DigitImages, measure_reference
from .subject import open_subject

RESULTS = "evidence.json"
OLDER = {"guidance_tilt": "published"}  # what rows of before there was a choice do not say
CHOOSE = "choose"  # a hypothesis of the inspector's, and its colour asked for
EXACT = "exact"    # a prior that is known exactly
SHOWN, HYPOTHESES = 10, 8


# ---- one row -----------------------------------------------------------------------------------

class Judge:
    """Who reads digits and features."""

    def __init__(self, data: Digits):
        self.svm, self.features = train_svm(data), digits_features(data)
        self.reference = measure_reference(DigitImages(), self.features, 50_000)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """read: the SVM reads the label. one_ink: of inked pixels, the share in their image's own ink. precision,
        recall: of features, against every real digit in every ink, k = 3."""
        read = torch.from_numpy(self.svm.predict(grey8(images).numpy())) == labels
        precision, recall = precision_recall(self.reference.features, self.reference.radius,
                                             self.features(quantise(images)))
        return {"read": read.float().mean().item(), "one_ink": hue_metrics(images)["one_ink"], "precision": precision,
                "recall": recall}


def run_task(name: str, method: str, model, truth: Truth, noise: Tensor, args, guidance: float) -> tuple[
    Tensor, dict[str, float],
]:
    """All images of a row, and how they fit what was seen (rmse), what was hidden (hidden), and the true ink (ink).

    Where a task shows no pixel's whole colour, ``hidden`` is over all pixels; of grey pictures, one ink of three is
    right.
    """
    images, sums = [], torch.zeros(4)
    for i, part in enumerate(torch.arange(len(noise)).split(args.batch)):
        clean = truth.images[part]
        task = TASKS[name](clean, torch.Generator().manual_seed((args.seed << 20) + i))
        x = METHODS[method](Problem(model, task, clean, truth.labels[part], noise[part], args.steps, guidance,
                                    args.guidance_tilt))
        misfit, error = (task.observe(x) - task.observe(clean)).square(), (x - clean).square()
        seen = misfit.numel() * (task.seen.mean() if bool(task.seen.any()) else 1.0)
        sums += torch.stack([misfit.sum(), torch.as_tensor(seen), (error * (1 - task.seen)).sum(),
                             3 * (1 - task.seen).sum()])
        images.append(x)
    x = torch.cat(images)
    inks = dominant_inks(x)
    right = inks % 2 == truth.inks % 2 if name == "grey" else inks == truth.inks
    figures = {"rmse": (sums[0] / sums[1]).sqrt(), "ink": right.float().mean(), "hidden": (sums[2] / sums[3]).sqrt()}
    return x, {key: value.item() for key, value in figures.items()}


def run_choice(method: str, model, truth: Truth, noise: Tensor, args, guidance: float) -> tuple[
    Tensor, Tensor, dict[str, float],
]:
    """Every image again in the colour of one hypothesis of its first step, with ``args.choose_std``: images, labels,
    and how many come out in that ink. Hypotheses are the inspector's, the first to the
    eighth in turn; those without colour are left out: ``asked`` is how many have one."""
    images, labels, hits = [], [], []
    for part in torch.arange(len(noise)).split(args.batch):
        problem = Problem(model, None, noise[part], truth.labels[part], noise[part], args.steps, guidance,
                          args.guidance_tilt)
        rows, colours = choices(problem, part.tolist(), args.choose_std)
        pictures = colours[:, :, None, None].expand(-1, -1, *noise.shape[2:])
        evidence = hint(pictures, torch.ones_like(pictures[:, :1]), "hue", args.choose_std)
        task = Task(evidence, None, None, None, None, args.choose_std)
        x = METHODS[method](replace(problem, task=task, labels=problem.labels[rows], noise=problem.noise[rows]))
        full = (colours + 1) / 2
        wanted = dominant_inks((2 * full / full.amax(1, keepdim=True) - 1)[:, :, None, None])
        images.append(x), labels.append(problem.labels[rows]), hits.append(dominant_inks(x) == wanted)
    share = torch.cat(hits).float().mean().item()
    return torch.cat(images), torch.cat(labels), {"ink": share, "asked": sum(map(len, hits))}  # no truth to fit


def choices(problem: Problem, numbers: list[int], std: float) -> tuple[list[int], Tensor]:
    """Which images of a problem have a hypothesis that can be asked for, and its colours (N,3), for every image's
    hypothesis ``numbers[row] % 8 + 1`` of the first step."""
    recorder = Recorder(images=len(numbers), steps=1)
    problem.solve(problem.denoiser(), callback=recorder, last=1)
    trace, rows, colours = recorder.trace(), [], []
    for row, number in enumerate(numbers):
        colour, _ = chosen_hypothesis(trace, 0, row, number % HYPOTHESES + 1, HYPOTHESES)
        try:
            in_colour(colour, (1, 1), std, "")
        except ValueError:
            continue
        rows.append(row), colours.append(colour.clamp(-1, 1))
    return rows, torch.stack(colours)


def run_exact(method: str, args) -> dict[str, float]:
    """The total variation of every case."""
    return {name: total_variation(case, method, args.samples, args.steps, torch.Generator().manual_seed(args.seed))
            for name, case in CASES.items()}


# ---- the sweep ---------------------------------------------------------------------------------

def sweep(args: argparse.Namespace) -> list[dict]:
    """Everything that was asked for; the rows of evidence.json."""
    rows = Rows(args.out / RESULTS)
    if EXACT in args.evidence:
        for method in args.methods:
            facts = {"task": EXACT, "method": method, "steps": args.steps, "samples": args.samples, "seed": args.seed}
            if not rows.hold(facts):
                rows.add(facts | {"calls": args.steps * CALLS.get(method, 1), "tv": run_exact(method, args)})
    tasks = [task for task in args.evidence if task != EXACT]
    if tasks:
        sweep_digits(tasks, rows, args)
    return rows.rows


class Rows:
    """evidence.json, written whenever a row comes."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def hold(self, facts: dict) -> bool:
        return any(facts.items() <= (OLDER | row).items() for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        text = json.dumps(self.rows, indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write_text(text, encoding="utf-8"))
        say(line(row))


def sweep_digits(tasks: list[str], rows: Rows, args: argparse.Namespace) -> None:
    """The rows of the tasks that are about digits."""
    subject = open_subject(args.checkpoint, None, torch.device("cpu"), "float32")
    if tuple(Digits.shape[1:]) != (subject.image_size,) * 2 or subject.decode is not None:
        raise ValueError(f"{args.checkpoint}: evidence is evaluated on the digits, RGB pictures of 16 x 16")
    model, data = subject.checkpoint.model.requires_grad_(False), Digits.load()
    generator = torch.Generator().manual_seed(args.seed)
    truth = Truth.choose(data, args.samples, generator)
    noise = torch.randn(truth.images.shape, generator=generator)
    judge = Judge(data)
    for guidance, task, method in itertools.product(args.guidance, tasks, args.methods):
        facts = {"digest": subject.digest, "task": task, "method": method, "steps": args.steps,
                 "guidance": guidance, "samples": args.samples, "seed": args.seed}
        facts |= {"guidance_tilt": args.guidance_tilt} if guidance else {}
        if rows.hold(facts) or (task == CHOOSE and method not in ("none", "tilt", "tilt + echo")):
            continue
        start = time.perf_counter()
        if task == CHOOSE:
            images, labels, figures = run_choice(method, model, truth, noise, args, guidance)
        else:
            images, figures = run_task(task, method, model, truth, noise, args, guidance)
            labels = truth.labels
        calls = args.steps * CALLS.get(method, 1) * (2 if guidance else 1)
        rows.add({**facts, "calls": calls, **figures, **judge(images, labels),
                  "seconds": round(time.perf_counter() - start, 1)})
        name = f"{task} {method} {args.steps} steps guidance {guided(facts)}.png"
        name = name.replace(" ", "_").replace(",", "").replace("'", "")
        image_grid(images[:SHOWN], SHOWN, scale=3).save(args.out / name)


def guided(row: dict) -> str:
    """The scale of a row's guidance, and its tilt where that is not the default."""
    tilt = (OLDER | row)["guidance_tilt"]
    return f"{row['guidance']:g}" + f" {tilt}" * (row["guidance"] > 0 and tilt != GUIDANCE_TILT)


def line(row: dict) -> str:
    """A row of its table."""
    if "tv" in row:
        numbers = [f"{tv:.3f}" for tv in row["tv"].values()]
        return cells([row["task"], row["method"], row["steps"], row["calls"], *numbers])
    percent = lambda name: f"{100 * row[name]:.1f}"  # noqa: E731
    rms = lambda name: f"{row[name]:.3f}" if name in row else "-"  # noqa: E731
    return cells([row["task"], row["method"], row.get("asked", row["samples"]), guided(row), row["steps"],
                  row["calls"], rms("rmse"), percent("read"), percent("one_ink"), percent("ink"),
                  f"{row['precision']:.2f}", f"{row['recall']:.2f}", rms("hidden")])


def cells(values: list) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def table(rows: list[dict]) -> str:
    """Of the digits, and of the exact prior: the total variation of its modes' shares."""
    names = ["task", "method", "digits", "guidance", "steps", "calls", "rmse", "read", "one ink", "ink", "precision",
             "recall", "hidden"]
    parts = [(names, [row for row in rows if "tv" not in row]),
             (["prior", "method", "steps", "calls", *CASES], [row for row in rows if "tv" in row])]
    return "\n".join("\n".join([cells(heads), "|" + " --- |" * len(heads), *map(line, part), ""])
                     for heads, part in parts if part)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__.split("``")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--evidence", nargs="+", required=True, metavar="TASK", choices=(*TASKS, CHOOSE, EXACT),
                        help=f"of {', '.join((*TASKS, CHOOSE, EXACT))}")
    parser.add_argument("--methods", nargs="+", metavar="NAME",
                        default=["none", "noise mask", "one Gaussian", "tilt", "tilt + echo"],
                        choices=METHODS, help=f"of {', '.join(METHODS)} (default all but those with gradients)")
    parser.add_argument("--steps", type=int, default=8, help="network steps (default 8)")
    parser.add_argument("--guidance", nargs="+", type=float, default=[0.3], metavar="W",
                        help="probabilistic scales in [0, 1) (default 0.3)")
    parser.add_argument("--guidance-tilt", choices=TILTS, default=GUIDANCE_TILT,
                        help=f"of guidance (default {GUIDANCE_TILT})")
    parser.add_argument("--samples", type=int, default=1000, help="digits, their classes in turn (default 1000)")
    parser.add_argument("--batch", type=int, default=125, help="digits at a time (default 125)")
    parser.add_argument("--choose-std", type=float, default=1.0, help="of a chosen hypothesis' hue (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder (default runs/evidence)")
    args = parser.parse_args(arguments)
    for name, value, low in (("steps", args.steps, 1), ("samples", args.samples, 10), ("batch", args.batch, 1)):
        if value < low:
            parser.error(f"--{name} must be >= {low}, got {value}")
    if any(not 0 <= w < 1 for w in args.guidance):
        parser.error(f"--guidance takes probabilistic scales in [0, 1), got {max(args.guidance, key=abs):g}")
    return args


def main(arguments: list[str] | None) -> int:
    args = parse(arguments)
    try:
        text = table(sweep(args))
        (args.out / "evidence.md").write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0
