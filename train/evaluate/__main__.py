r"""How good is a checkpoint? ``python -m train.evaluate CHECKPOINT --data digits --steps 1 2 4 8 --guidance 0 0.3``

Samples with every solver, number of steps and guidance scale asked for, and compares with real images: FID, improved
precision and recall, saturation, accuracy where classes allow; of the mixture itself the negative log-likelihood. Rows
are added to OUT/results.json as they are made: run again to go on, or with other settings or checkpoints to add theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gmflow_core.cli import open_device, run_command
from gmflow_core.files import remove_remains, write_picture, write_text
from gmflow_core.guidance import TILTS
from gmflow_core.pictures import image_grid
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT

from ..console import say
from ..data.digits import Digits
from ..folder import locked
from ..runlog import short
from .digits_metrics import digit_metrics, train_svm
from .features import Features, digits_features, inception, of_pixels, train_classifier
from .figures import markdown, save_figures
from .image_metrics import (
    distances,
    frechet_distance,
    moments,
    mottling,
    overshoot,
    precision_recall,
    quantise,
    saturation,
)
from .reference import Images, Reference, file_digest, load_reference, measure_reference, real_images, save_reference
from .settings import BASELINES, GM_SOLVERS, SOLVERS, Setting, sample_images
from .subject import Subject, classes_in_data, likelihood, old_digest, open_subject

RESULTS, REFERENCE, SAMPLES = "results.json", "reference.safetensors", "samples"

# ---- one row -----------------------------------------------------------------------------------

Judge = Callable[[Tensor, Tensor], dict[str, float]]  # images (N,3,S,S) in [-1,1] and labels (N,) -> figures


def sample_features(subject: Subject, setting: Setting, features: Features, judge: Judge | None, options):
    """Features (N,D), labels (N,), means of the figures that need images, the first images,
    and the seconds of sampling."""
    samples, batch = options.samples, options.batch
    labels = torch.arange(samples) % subject.checkpoint.config.num_classes
    parts, sums, first, seconds = [], {}, [], 0.0
    for i, part in enumerate(tqdm(labels.split(batch), desc=f"{setting.title}, {setting.steps} steps", unit="batch",
                                  leave=False)):
        start = time.perf_counter()
        # A batch's seed depends on its place alone: the same noise for every setting.
        x = subject.images(sample_images(subject.checkpoint, setting, part, (options.seed << 20) + i))
        seconds += time.perf_counter() - start
        if not x.isfinite().all():
            raise ValueError(f"{subject.name}, {setting.title}, {setting.steps} steps: samples are not finite")
        pixels = quantise(x)
        parts.append(features(pixels))
        shades = {"saturation": saturation(pixels), "overshoot": overshoot(x)}
        for name, value in shades.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item() / samples
        if judge is not None or sum(map(len, first)) < options.shown:
            first.append(x)
    return torch.cat(parts), labels, sums, torch.cat(first), seconds


def measure(subject: Subject, setting: Setting, reference: Reference, features: Features, judge: Judge | None,
            classes: Tensor | None, options) -> tuple[dict, Tensor]:
    """All figures of one setting, and its first images. ``classes``: the data's index of every class of the model."""
    found, labels, figures, images, seconds = sample_features(subject, setting, features, judge, options)
    precision, recall = precision_recall(reference.features, reference.radius, found)
    row = {
        "checkpoint": subject.name, "digest": subject.digest, "components": subject.checkpoint.config.num_gaussians,
        **setting.to_dict(), "fid": frechet_distance(reference.moments, moments(found)), "precision": precision,
        "recall": recall, **figures,
    }
    if judge is not None:
        row |= judge(images, classes[labels])
    elif classes is not None:
        row["accuracy"] = neighbour_accuracy(reference.features, reference.labels, found, classes[labels])
    return row | {"seconds": seconds, "images_per_second": len(labels) / seconds}, images[: options.shown]


def neighbour_accuracy(real: Tensor, real_labels: Tensor, fake: Tensor, labels: Tensor, k: int = 5) -> float:
    """The share of samples whose class is that of most of their k nearest real images, in features."""
    nearest = torch.cat([distances(part, real).topk(k, largest=False).indices for part in fake.split(1024)])
    return (real_labels[nearest].mode(1).values == labels).double().mean().item()


# ---- the sweep ---------------------------------------------------------------------------------

def settings(subject: Subject, args: argparse.Namespace) -> list[Setting]:
    """What was asked for and suits the checkpoint: a vanilla model has neither GM solvers nor probabilistic
    guidance."""
    allowed = BASELINES if subject.vanilla else SOLVERS
    solvers = [s for s in args.solvers or (("euler",) if subject.vanilla else ("gm-ode2", "gm-sde2")) if s in allowed]
    scales = [(w, "probabilistic") for w in args.guidance if w == 0 or not subject.vanilla]
    scales += [(w, "cfg") for w in args.cfg]
    grid = [(steps, w, method) for w, method in scales for steps in args.steps]
    plain = {"corrections": args.corrections, "substeps": args.substeps, "tilt": args.tilt}
    found = [
        Setting(s, n, w, m, guidance_tilt=args.guidance_tilt, **(plain if s in GM_SOLVERS else {}))
        for s in solvers for n, w, m in grid
    ]
    return found + (ablations(grid) if args.ablations and not subject.vanilla else [])


def ablations(grid: list[tuple[int, float, str]]) -> list[Setting]:
    """The paper's, at every point of a grid: A2 white noise, A4 DPM-Solver++ SDE on the mixture's mean, B1 no substeps,
    no projection, no re-anchoring, and the published tilt. (A3 is ``--cfg``;
    A5 is a training, with transition_ratio=1.)"""
    found = []
    for n, w, method in grid:
        found += [Setting("gm-sde2", n, w, method), Setting("gm-sde2", n, w, method, spectral=False),
                  Setting("sde-dpm++2m", n, w, method)]
        found += [Setting("gm-ode2", n, w, method), Setting("gm-ode2", n, w, method, substeps=1)]
        found += [Setting("gm-ode2", n, w, method, reanchored=False)]
        found += [Setting(s, n, w, method, tilt="published") for s in ("gm-ode2", "gm-sde2")]
        if w and method == "probabilistic":
            found += [Setting("gm-ode2", n, w, method, orthogonal=0.0)]
    return found


def judges(network: str, images: Images, weights: str | None, device) -> tuple[Features, Judge | None, dict]:
    """The feature network that was asked for, what it or another judges samples by, and what the results say of it."""
    if network == "digits":
        return digits_features(images.data), partial(digit_metrics, svm=train_svm(Digits.load())), {}
    if network == "inception":
        return inception(weights, device), None, {}
    classifier = train_classifier(images)
    say(f"the classifier reads {classifier.held_out:.2%} of the held-out tenth of {images.name}")
    some = images.pixels(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000])
    about = {"held_out": short(classifier.held_out), "real_mottling": short(mottling(some).mean().item())}
    return of_pixels(classifier.net), classifier.judge, {"classifier": about}


class Results:
    """OUT/results.json: read, added to, written after every row."""

    def __init__(self, path: Path, facts: dict):
        self.path, self.content = path, {**facts, "checkpoints": {}, "rows": []}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
                self.content.setdefault("reference_content", facts["reference_content"])  # older files have none
                changed = [f"{k}: {self.content[k]} there, {facts[k]} asked for" for k in facts
                           if self.content[k] != facts[k]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not results of this program ({error}); choose another --out") from None
            if changed:
                raise ValueError(f"{path} compares with something else ({'; '.join(changed)}); choose another --out")

    def has(self, subject: Subject, setting: Setting) -> bool:
        wanted = {"digest": subject.digest, **setting.to_dict()}
        return any(wanted.items() <= row.items() for row in self.content["rows"])

    def about(self, subject: Subject, nll: Callable[[], dict | None]) -> None:
        """Remember a checkpoint. ValueError if another one has its name."""
        known = self.content["checkpoints"]
        before = known.get(subject.name, {}).get("digest")
        if before not in (None, subject.digest) and before == old_digest(subject.checkpoint.path):
            for row in (known[subject.name], *self.content["rows"]):
                if row["digest"] == before:
                    row["digest"] = subject.digest
        if subject.name not in known:
            config, training = subject.checkpoint.config, subject.checkpoint.training
            known[subject.name] = {
                "digest": subject.digest, "components": config.num_gaussians, "vanilla": subject.vanilla,
                "steps": training.get("step"), "nll": nll(),
            }
        elif known[subject.name]["digest"] != subject.digest:
            raise ValueError(f"{self.path} holds another checkpoint of the name {subject.name}; "
                             "choose another --out, or rename the file")

    def add(self, row: dict) -> None:
        self.content["rows"].append({name: short(value) for name, value in row.items()})
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def sweep(args: argparse.Namespace) -> dict:
    """Everything that was asked for; the content of results.json."""
    device = open_device(args.device)
    subjects = [open_subject(path, args.vae, device, args.precision) for path in args.checkpoints]
    if len({s.name for s in subjects}) < len(subjects):
        raise ValueError(f"checkpoints need different names, got {', '.join(s.name for s in subjects)}: "
                         "rename a file or its folder")
    unsuited = [s.name for s in subjects if not settings(s, args)]
    if unsuited:
        advice = (f"nothing to sample {', '.join(unsuited)} with: "
                  f"a vanilla model takes --solvers {', '.join(BASELINES)}, and --guidance 0 or --cfg")
        if len(unsuited) == len(subjects):
            raise ValueError(advice)
        say(advice)
    images = real_images(args.data, subjects[0].image_size)
    for subject in subjects:
        if subject.image_size != subjects[0].image_size:
            raise ValueError(f"{subject.name} makes {subject.image_size} pixels, "
                             f"{subjects[0].name} {subjects[0].image_size}: evaluate them apart")
    is_digits = args.data == "digits"
    network = args.features or ("digits" if is_digits else "inception")
    weights = file_digest(Path(args.inception)) if network == "inception" and args.inception else ""
    kind = f"{network} {weights} {images.content} {len(images)} {args.real_samples} {subjects[0].image_size}"
    args.out.mkdir(parents=True, exist_ok=True)
    features, judge, about = judges(network, images, args.inception, device)
    reference = known = load_reference(args.out / REFERENCE, kind)
    if reference is None:
        reference = measure_reference(images, features, args.real_samples)
    results = Results(args.out / RESULTS, {
        "reference": reference.name, "real_images": reference.count, "real_saturation": short(reference.saturation),
        "samples": args.samples, "seed": args.seed, **({"features": args.features} if args.features else {}),
        "reference_content": hashlib.sha256(kind.encode()).hexdigest()[:12],
    })
    results.content |= about
    if known is None:
        save_reference(args.out / REFERENCE, reference, kind)
    for subject in subjects:
        results.about(subject, partial(likelihood, subject, images, args.batch))
        classes = classes_in_data(subject, images)
        if judge is not None and classes is None:
            raise ValueError(f"{subject.name}: its classes are not those of {images.name}, which samples are judged "
                             "by: evaluate it on its own data")
        for setting in tqdm(settings(subject, args), desc=subject.name, unit="row"):
            if not results.has(subject, setting):
                row, shown = measure(subject, setting, reference, features, judge, classes, args)
                save_shown(args.out, row, shown)
                results.add(row)
                say(f"{subject.name}, {setting.title}, guidance {setting.guidance_title}, {setting.steps} steps: "
                    f"FID {row['fid']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}")
    results.write()
    return results.content


def save_shown(out: Path, row: dict, images: Tensor) -> None:
    """The first images of a row as OUT/samples/NAME.png; the row gets the name."""
    setting = Setting.of_row(row)
    words = [row["checkpoint"], setting.title, f"{setting.steps} steps", setting.guidance_title]
    name = "".join(c if c.isalnum() or c in "-.+" else "_" for c in " ".join(words)) + ".png"
    (out / SAMPLES).mkdir(exist_ok=True)
    columns = min(-(-len(images) // 2), 16)
    write_picture(out / SAMPLES / name, image_grid(images, columns, scale=max(1, 48 // images.shape[-1])))
    row["picture"] = f"{SAMPLES}/{name}"


# ---- the command -------------------------------------------------------------------------------

def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__.split("``")[0],
                                     epilog="Of evidence (hints, grey and small pictures): --evidence TASK ..., "
                                            "see --evidence half --help")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", required=True,
                        help="real images: digits, a folder with a subfolder for each class, or ADM's .npz")
    parser.add_argument("--solvers", nargs="+", metavar="NAME",
                        help=f"of {', '.join(SOLVERS)} (default gm-ode2 gm-sde2; euler for a vanilla model)")
    parser.add_argument("--steps", nargs="+", type=int, default=[8], metavar="N", help="network steps (default 8)")
    parser.add_argument("--guidance", nargs="+", type=float, default=[0.0], metavar="W",
                        help="probabilistic scales in [0, 1) (default 0, none)")
    parser.add_argument("--cfg", nargs="+", type=float, default=[], metavar="S",
                        help="also vanilla CFG of these scales, 1 or more (A3)")
    parser.add_argument("--corrections", type=int, default=0, help="correction steps of the second order (default 0)")
    parser.add_argument("--tilt", choices=TILTS, default=SECOND_ORDER_TILT,
                        help=f"of order 2 (default {SECOND_ORDER_TILT})")
    parser.add_argument("--guidance-tilt", choices=TILTS, default=GUIDANCE_TILT,
                        help=f"of guidance (default {GUIDANCE_TILT})")
    parser.add_argument("--substeps", type=int, default=0, help="of GM-ODE (default 0: 128 / steps, as published)")
    parser.add_argument("--ablations", action="store_true",
                        help="also the paper's ablations A2, A4, B1, no projection, "
                             "no re-anchoring; the published tilt")
    parser.add_argument("--samples", type=int, default=1000,
                        help="samples of each setting, its classes in turn (default 1000; the paper: 50000)")
    parser.add_argument("--real-samples", type=int, default=50_000, help="real images at most (default 50000)")
    parser.add_argument("--batch", type=int, default=125, help="samples at a time (default 125)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", help="of latents: a diffusers AutoencoderKL, a folder or a name on the hub")
    parser.add_argument("--inception", help="torch-fidelity's weights file (default: it downloads its own)")
    parser.add_argument("--features", choices=("inception", "classifier"),
                        help="of a folder's images: Inception's, or for small pictures those of a small classifier "
                             "that learns the folder's classes first (default inception; the digits have their own)")
    parser.add_argument("--shown", type=int, default=10, metavar="N",
                        help="first samples of each setting that are kept as a picture (default 10)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32",
                        help="of the network (default float32)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder (default runs/evaluation)")
    args = parser.parse_args(arguments)
    bad = [s for s in args.solvers or () if s not in SOLVERS]
    if bad:
        parser.error(f"--solvers: no solver {', '.join(bad)}; there are {', '.join(SOLVERS)}")
    for name, values, low in (
        ("steps", args.steps, 1), ("samples", [args.samples], 5), ("real-samples", [args.real_samples], 5),
        ("batch", [args.batch], 1), ("cfg", args.cfg, 1), ("corrections", [args.corrections], 0),
        ("substeps", [args.substeps], 0), ("shown", [args.shown], 1),
    ):
        if min(values, default=low) < low:
            parser.error(f"--{name} must be >= {low}, got {min(values)}")
    if args.data == "digits" and args.features:
        parser.error(f"--features {args.features} is of a folder's images: the digits have features of their own")
    if any(not 0 <= w < 1 for w in args.guidance):
        parser.error("--guidance takes probabilistic scales in [0, 1), "
                     f"got {max(args.guidance, key=abs):g}; CFG scales are --cfg")
    return args


def main(arguments: list[str] | None = None) -> int:
    if any(word.split("=")[0] == "--evidence" for word in (sys.argv[1:] if arguments is None else arguments)):
        from .evidence import main as evaluate_evidence

        return evaluate_evidence(arguments)

    def action() -> None:
        args = parse(arguments)
        with locked(args.out, "evaluates"):
            remove_remains(args.out)
            results = sweep(args)
            pictures = save_figures(results, args.out)
            table = markdown(results)
            write_text(args.out / "table.md", table)
        print(table + "\n" + ", ".join(str(args.out / name) for name in [RESULTS, "table.md", *pictures]))

    return run_command(action, "stopped; run the same command to go on")


if __name__ == "__main__":
    sys.exit(main())
