"""Every checkpoint with every setting that was asked for, by one process or by a team."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from gmflow_core import Checkpoint
from gmflow_core.schedule import TOTAL_SUBSTEPS, default_substeps

from ..console import say
from ..data.digits import Digits
from ..runlog import short
from ..team import Team
from .digits_metrics import digit_metrics, train_svm
from .features import (
    Classifier,
    Features,
    inception,
    load_classifier,
    of_pixels,
    save_classifier,
    train_classifier,
    train_digits_net,
)
from .figures import MANY
from .image_metrics import mottling
from .reference import (
    DigitImages,
    Images,
    Reference,
    file_digest,
    load_reference,
    measure_reference,
    real_images,
    save_reference,
)
from .results import RESULTS, Results
from .rows import Judge, Samples, draw, figures, file_name, labels_of, save_picture, save_set
from .settings import BASELINES, GM_SOLVERS, SOLVERS, Setting
from .subject import Subject, classes_in_data, likelihood, open_subject

REFERENCE, CLASSIFIER = "reference.safetensors", "classifier.safetensors"


# ---- what was asked for ------------------------------------------------------------------------

def settings(subject: Subject, args: argparse.Namespace) -> list[Setting]:
    """What was asked for and suits the checkpoint: a vanilla model has neither GM solvers nor probabilistic
    guidance."""
    allowed = BASELINES if subject.vanilla else SOLVERS
    solvers = [s for s in args.solvers or (("euler",) if subject.vanilla else ("gm-ode2", "gm-sde2")) if s in allowed]
    scales = [(w, "probabilistic") for w in args.guidance if w == 0 or not subject.vanilla]
    scales += [(w, "cfg") for w in args.cfg]
    grid = [(steps, w, method) for w, method in scales for steps in args.steps]
    plain = {"corrections": args.corrections, "substeps": args.substeps or 0, "tilt": args.tilt}
    found = [
        Setting(s, n, w, m, guidance_tilt=args.guidance_tilt, **(plain if s in GM_SOLVERS else {}))
        for s in solvers for n, w, m in grid
    ]
    found += ablations(grid) if args.ablations and not subject.vanilla else []
    return [as_it_is_sampled(setting, subject.checkpoint, args) for setting in found]


def as_it_is_sampled(setting: Setting, checkpoint: Checkpoint, args: argparse.Namespace) -> Setting:
    """A setting with the checkpoint's own time shift and substeps, where no others are asked for."""
    substeps, total = setting.substeps, checkpoint.total_substeps
    if setting.solver not in ("gm-ode1", "gm-ode2"):
        substeps = 0  # they have none
    elif not substeps and args.substeps is None and total != TOTAL_SUBSTEPS:
        substeps = default_substeps(setting.steps, total)
    return replace(setting, shift=args.shift or checkpoint.time_shift, substeps=substeps)


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
        found += [Setting(s, n, w, method, tilt="published", guidance_tilt="published") for s in ("gm-ode2", "gm-sde2")]
        if w and method == "probabilistic":
            found += [Setting("gm-ode2", n, w, method, orthogonal=0.0)]
    return found


def opened(args: argparse.Namespace, device: torch.device) -> tuple[list[Subject], Images]:
    """The checkpoints and the real images. ValueError where they do not go together."""
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
    return subjects, images


@dataclass(frozen=True)
class Judges:
    """What samples are judged by, and what the results say of it."""

    features: Features
    judge: Judge | None = None
    about: dict = field(default_factory=dict)
    learnt: Classifier | None = None  # just now, so that nothing that was kept is of its features


def judges(args: argparse.Namespace, network: str, images: Images, kind: str, team: Team) -> Judges:
    """The feature network that was asked for and what it or another judges samples by.

    A network that has to learn first does so in the first of the team: elsewhere it might learn a little otherwise.
    """
    if isinstance(images, DigitImages):
        net = team.share(train_digits_net, images.data)
        return Judges(of_pixels(net), partial(digit_metrics, svm=train_svm(Digits.load())))
    if network == "inception":
        return Judges(team.together(inception, args.inception, team.device))
    kept = team.share(load_classifier, args.out / CLASSIFIER, kind)
    classifier = kept or team.share(train_classifier, images)
    say(f"the classifier reads {classifier.held_out:.2%} of the held-out tenth of {images.name}")
    about = {"held_out": short(classifier.held_out), "real_mottling": team.share(real_mottling, images)}
    return Judges(of_pixels(classifier.net), classifier.judge, {"classifier": about}, None if kept else classifier)


def real_mottling(images: Images) -> float:
    """The mean mottling of a thousand real images."""
    some = images.pixels(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000])
    return short(mottling(some).mean().item())


def say_few(samples: int, reference: Reference, known: bool) -> None:
    """A word where a covariance has no full rank. ``known``: that of real images was given."""
    features = len(reference.mean)
    counts = [(samples, "samples")] + [(reference.count, "real images")] * (not known)
    few = [f"{count:,} {what}" for count, what in counts if count < features]
    if few:
        say(f"FID means little here: {' and '.join(few)} are fewer than the {features:,} features, so that covariances "
            f"are of deficient rank; take {max(features, MANY):,} or more")


# ---- the sweep ---------------------------------------------------------------------------------

def sweep(args: argparse.Namespace, team: Team) -> dict | None:
    """Everything that was asked for; the content of results.json at the first of the team, None elsewhere."""
    subjects, images = team.together(opened, args, team.device)
    network = args.features or ("digits" if args.data == "digits" else "inception")
    weights = file_digest(Path(args.inception)) if network == "inception" and args.inception else ""
    kind = f"{network} {weights} {images.content} {len(images)} {args.real_samples} {subjects[0].image_size}"
    by = judges(args, network, images, kind, team)
    reference = None if by.learnt else team.at_first(load_reference, args.out / REFERENCE, kind)
    known = team.share(lambda: reference is not None)
    if not known:
        reference = measure_reference(images, by.features, args.real_samples, team=team)
    results = team.at_first(begun, args, reference, kind, by.about)
    if not known:
        team.at_first(save_reference, args.out / REFERENCE, reference, kind)
    if by.learnt:  # after the reference: an older one must not be taken for one of these features
        team.at_first(save_classifier, args.out / CLASSIFIER, by.learnt, kind)
    team.at_first(say_few, args.samples, reference, images.known is not None)
    for subject in subjects:
        classes = team.together(classes_of, subject, images, by.judge)
        measure = partial(figures, subject, reference=reference, judge=by.judge, classes=classes, device=team.device)
        for setting in tqdm(team.share(left, results, subject, images, args), desc=subject.name, unit="row",
                            disable=not team.first):
            keep = args.samples if by.judge is not None else args.shown
            samples = draw(team, subject, setting, by.features, keep, args.npz, args)
            team.at_first(add_row, results, args, subject, setting, samples, measure)
    team.at_first(lambda: results.write())
    return results and results.content


def begun(args: argparse.Namespace, reference: Reference, kind: str, about: dict) -> Results:
    """The results to add to."""
    results = Results(args.out / RESULTS, {
        "reference": reference.name, "real_images": reference.count, "real_saturation": short(reference.saturation),
        "samples": args.samples, "seed": args.seed, "noise": "by image",
        **({"features": args.features} if args.features else {}),
        "reference_content": hashlib.sha256(kind.encode()).hexdigest()[:12],
    })
    results.content |= about
    return results


def classes_of(subject: Subject, images: Images, judge: Judge | None) -> torch.Tensor | None:
    """The data's index of every class of the model; ValueError if a judge needs it and there is none."""
    classes = classes_in_data(subject, images)
    if judge is not None and classes is None:
        raise ValueError(f"{subject.name}: its classes are not those of {images.name}, which samples are judged "
                         "by: evaluate it on its own data")
    return classes


def left(results: Results, subject: Subject, images: Images, args: argparse.Namespace) -> list[Setting]:
    """The settings whose row, or sample set where they are asked for, is not there yet."""
    results.about(subject, partial(likelihood, subject, images, args.batch))

    def there(setting: Setting) -> bool:
        row = results.row(subject, setting)
        return row is not None and (not args.npz or (args.out / row.get("npz", "no")).is_file())

    return [setting for setting in settings(subject, args) if not there(setting)]


def add_row(results: Results, args: argparse.Namespace, subject: Subject, setting: Setting, samples: Samples,
            measure: Callable[[Setting, Samples], dict]) -> None:
    """Write what there is of a row: its sample set if it was asked for; its picture and figures if it is new."""
    name, row = file_name(subject, setting), results.row(subject, setting)
    new = row is None
    if row is None:
        row = measure(setting, samples)
        save_picture(args.out / f"{name}.png", samples.images[: args.shown])
        row["picture"] = f"{name}.png"
    if samples.pixels is not None:
        classes = subject.checkpoint.config.num_classes
        save_set(args.out / f"{name}.npz", samples.pixels, labels_of(subject, args.samples) if classes > 1 else None)
        row["npz"] = f"{name}.npz"
    if not new:
        return results.write()
    results.add(row)
    say(f"{subject.name}, {setting.title}, guidance {setting.guidance_title}, {setting.steps} steps: "
        f"FID {row['fid']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}")
