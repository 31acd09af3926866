"""``python -m gmflow_core demo | sample | inspect | info | convert``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .cli import Parser, UsageError, number, open_device, read_evidence, run_command, sample_images
from .guidance import TILTS
from .sampler import GUIDANCE_TILT, SECOND_ORDER_TILT, SOLVERS, SamplerOptions
from .schedule import SHIFTS
from .solver import SecondOrder

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLED = MODELS / "gmdit_characters.safetensors"


def build_parser() -> Parser:
    parser = Parser(prog="python -m gmflow_core", description="Gaussian mixture flow matching without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="sample the bundled model and draw what it believes")
    demo.add_argument("--out", type=Path, default=Path("output"), help="folder of the pictures (default output)")
    demo.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)

    sampling = commands.add_parser("sample", help="sample any checkpoint")
    add_sampling(sampling)
    sampling.add_argument("--count", type=number(int, 1), help="images without a class (instead of --labels)")
    sampling.add_argument("--batch-size", type=number(int, 1), default=64)
    sampling.add_argument("--out", type=Path, default=Path("output"), help="folder (default output)")
    sampling.add_argument("--images", action="store_true", help="also every image as its own PNG, in label order")
    sampling.add_argument("--latents", action="store_true", help="also the raw samples as safetensors")

    look = commands.add_parser("inspect",
                               help="what the mixture believes at a step: a picture, an animation or numbers")
    add_sampling(look)
    look.add_argument("--view", default="sheet", help="components, weights, entropy, spread, winners, guidance, "
                                                      "timeline, pixel or sheet (default)")
    look.add_argument("--step", type=number(int, -10_000, 10_000), default=0,
                      help="network step from 0; -1 is the last (default 0)")
    look.add_argument("--image", type=number(int, 0), default=0, help="which of the labels, from 0 (default 0)")
    look.add_argument("--arrange", default="aligned", help="components aligned over the image (default), ranked or raw")
    look.add_argument("--max-components", type=number(int, 1), default=8)
    look.add_argument("--pixel", type=number(int, 0), nargs=2, metavar=("X", "Y"),
                      help="for --view pixel (default the middle); with a .json its mixture at every step")
    look.add_argument("--out", type=Path, default=Path("output/inspect.png"),
                      help=".png or .jpg of one step, .gif or .webp over all steps, .json numbers, "
                           ".safetensors mixtures (default output/inspect.png)")

    info = commands.add_parser("info", help="what a checkpoint holds")
    info.add_argument("checkpoint", type=Path)
    info.add_argument("--heads", type=number(int, 1), help="attention heads, where the file does not say")

    convert = commands.add_parser("convert", help="any readable checkpoint to one .safetensors of ours")
    convert.add_argument("source", type=Path)
    convert.add_argument("destination", type=Path)
    convert.add_argument("--heads", type=number(int, 1), help="attention heads, where the source does not say")
    return parser


def add_sampling(parser) -> None:
    """Arguments of every command that samples."""
    parser.add_argument("checkpoint", type=Path, help="a GMFlow checkpoint: file or folder")
    parser.add_argument("--labels", help="one image each: indices, ranges and class names, e.g. 0,1,2-9; where names "
                        'are numbers #1 is the index and "1" the name')
    parser.add_argument("--solver", choices=SOLVERS, default="gm-ode")
    parser.add_argument("--order", type=number(int, 1, 2), default=2, help="of the solver (default 2)")
    parser.add_argument("--corrections", type=number(int, 0, 100), default=0,
                        help="correction steps of order 2 (default 0; 2 helps without guidance)")
    parser.add_argument("--tilt", choices=TILTS, default=SECOND_ORDER_TILT,
                        help=f"of order 2: limited moves no pixel further than asked (default {SECOND_ORDER_TILT})")
    parser.add_argument("--steps", type=number(int, 1, 10_000), default=8, help="network steps (default 8)")
    parser.add_argument("--substeps", type=number(int, 1, 100_000),
                        help="of GM-ODE, per step (default: the checkpoint's own, ceil(16 / steps) for the characters, "
                        "else ceil(128 / steps))")
    parser.add_argument("--shift", type=number(float, *SHIFTS),
                        help="time shift of the grid (default: the checkpoint's own, the characters' 3, else 1)")
    parser.add_argument("--guidance", type=number(float, 0, 1, high_open=True), default=0.3,
                        help="probabilistic guidance in [0, 1), not a CFG scale (default 0.3)")
    parser.add_argument("--guidance-tilt", choices=TILTS, default=GUIDANCE_TILT,
                        help=f"likewise of guidance (default {GUIDANCE_TILT})")
    parser.add_argument("--orthogonal", type=number(float, 0, 1), default=1.0, help="orthogonal projection (default 1)")
    parser.add_argument("--temperature", type=number(float, 1e-3, 1e3), default=1.0)
    parser.add_argument("--no-spectrum", action="store_true", help="GM-SDE with white noise")
    parser.add_argument("--hint", type=Path, metavar="PNG",
                        help="a picture of the model's size whose colours are known where its alpha is not 0")
    parser.add_argument("--hint-std", type=number(float, 1e-4, 100),
                        help="how far they may be off, of [-1, 1] (default 0.05)")
    parser.add_argument("--grey", type=Path, metavar="PNG", help="likewise, but only the mean of the channels is known")
    parser.add_argument("--grey-std", type=number(float, 1e-4, 100), help="likewise (default 0.05)")
    parser.add_argument("--small", type=Path, metavar="PNG",
                        help="a picture whose pixels are the means of the image's blocks")
    parser.add_argument("--small-std", type=number(float, 1e-4, 100), help="likewise (default 0.02)")
    parser.add_argument("--no-propagate", action="store_true",
                        help="leave out the echo that carries them to other pixels (half the calls)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (default cpu)")


def open_checkpoint(args):
    """The checkpoint on the asked-for device, and the labels as indices or None."""
    from .checkpoint import load_checkpoint
    from .labels import LabelError, parse_labels

    checkpoint = load_checkpoint(args.checkpoint, device=open_device(args.device))
    classes = checkpoint.config.num_classes
    if args.labels is None:
        return checkpoint, None
    if classes is None:
        raise UsageError("--labels: this model has no classes; use --count")
    try:
        return checkpoint, parse_labels(args.labels, classes, checkpoint.class_names)
    except LabelError as error:
        raise UsageError(f"--labels: {error}") from None


def sample_as_asked(args, checkpoint, labels, **rest):
    """Images of a checkpoint with the arguments of :func:`add_sampling`."""
    options = SamplerOptions(
        args.solver, args.order, args.substeps or 0, spectral=not args.no_spectrum,
        second_order=SecondOrder(correction_steps=args.corrections, tilt=args.tilt), temperature=args.temperature,
        shift=args.shift or checkpoint.time_shift, total_substeps=checkpoint.total_substeps,
    )
    return sample_images(
        checkpoint, labels, options, steps=args.steps, guidance=args.guidance, orthogonal=args.orthogonal,
        guidance_tilt=args.guidance_tilt, seed=args.seed, **rest,
    )


def run_sample(args) -> None:
    import torch
    from tqdm import tqdm

    from .files import remove_remains, write_picture, write_safetensors
    from .pictures import image_grid, scatter

    checkpoint, labels = open_checkpoint(args)
    if (args.labels is None) == (args.count is None):
        raise UsageError("give either --labels (one image each) or --count (images without a class)")
    evidence = read_evidence(args, checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("grid.png", "samples.safetensors"):
        remove_remains(args.out / name)

    total = len(labels) if labels is not None else args.count
    batches = -(-total // args.batch_size)
    start = time.perf_counter()
    with tqdm(total=batches * args.steps, unit="step", desc=args.solver) as bar:
        images = sample_as_asked(
            args, checkpoint, labels, count=args.count, batch_size=args.batch_size, evidence=evidence,
            callback=lambda step: bar.update(),
        )
    seconds = time.perf_counter() - start
    if images.ndim == 2:
        write_picture(args.out / "grid.png", scatter(images, 4.5))
    else:
        scale = max(1, round(64 / images.shape[-1]))
        write_picture(args.out / "grid.png", image_grid(images, min(10, total), scale))
        if args.images:
            for i, image in enumerate(images):
                name = f"{i:04d}.png" if labels is None else f"{i:04d}-class{labels[i]}.png"
                write_picture(args.out / name, image_grid(image[None], 1, gap=0))
    if args.latents:
        extra = {} if labels is None else {"labels": torch.tensor(labels)}
        write_safetensors(args.out / "samples.safetensors", {"samples": images, **extra}, {"format": "pt"})
    if checkpoint.latent_space.kind == "sd-vae":
        print("note: these are latents of an SD VAE; the PNGs show their first three channels, not decoded images")
    print(f"{total} samples in {seconds:.1f} s: {args.out}/")


def run_inspect(args) -> None:
    import json

    from .files import remove_remains, write_picture, write_text
    from .inspection.statistics import statistics
    from .inspection.tiles import save_animation
    from .inspection.trace import Recorder, save_trace
    from .inspection.views import draw

    checkpoint, labels = open_checkpoint(args)
    if labels is None or checkpoint.config.sample_size is None:
        raise UsageError("inspect draws image models: give --labels, one image each")
    kind = args.out.suffix.lower()
    check_inspection(args, kind, len(labels), checkpoint.config.sample_size)
    recorder = Recorder(images=len(labels))
    sample_as_asked(args, checkpoint, labels, batch_size=len(labels), evidence=read_evidence(args, checkpoint),
                    callback=recorder)
    trace = recorder.trace()
    pixel = args.pixel and tuple(args.pixel)
    moving = kind in (".gif", ".webp")
    panel = lambda step: draw(  # noqa: E731
        trace, args.view, step, args.image, args.arrange, args.max_components, lambda x: x, pixel, steady=moving
    )
    shown = range(args.steps) if moving else [args.step]
    pictures = [] if kind in (".json", ".safetensors") else [panel(step) for step in shown]
    numbers = statistics(trace, args.image, args.max_components, pixel) if kind == ".json" else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(args.out)
    if kind == ".json":
        write_text(args.out, json.dumps(numbers, indent=1) + "\n")
    elif kind == ".safetensors":
        save_trace(trace, args.out)
    elif moving:
        save_animation(pictures, args.out)
    else:
        write_picture(args.out, pictures[0])
    if checkpoint.latent_space.kind == "sd-vae":
        print("note: these are latents of an SD VAE; pictures show their first three channels, not decoded images")
    print(args.out)


def check_inspection(args, kind: str, images: int, size: int) -> None:
    """UsageError or ValueError for what could not be drawn, before anything is sampled."""
    from .inspection.scene import ARRANGEMENTS
    from .inspection.statistics import check_pixel
    from .inspection.trace import check_place
    from .inspection.views import VIEWS

    if kind not in (".png", ".jpg", ".gif", ".webp", ".json", ".safetensors"):
        raise UsageError(f"--out {args.out}: must end in .png, .jpg, .gif, .webp, .json or .safetensors")
    for option, value, known in (("--view", args.view, VIEWS), ("--arrange", args.arrange, ARRANGEMENTS)):
        if value not in known:
            raise UsageError(f"{option} {value}: must be one of {', '.join(known)}")
    check_place(args.step, args.image, args.steps, images)
    if args.pixel:
        check_pixel(args.pixel, size, size)


def run_info(args) -> None:
    from .describe import format_info, identify

    print(format_info(identify(args.checkpoint, heads=args.heads)))


def run_convert(args) -> None:
    from .checkpoint import convert
    from .files import remove_remains

    if args.destination.suffix != ".safetensors":
        raise UsageError(f"destination {args.destination} must end in .safetensors")
    remove_remains(args.destination)
    convert(args.source, args.destination, heads=args.heads)
    print(args.destination)


def run_demo(args) -> None:
    from .demo import demo

    demo(BUNDLED, args.out, args.seed)


def main(argv: list[str] | None = None) -> int:
    commands = {"demo": run_demo, "sample": run_sample, "inspect": run_inspect, "info": run_info,
                "convert": run_convert}

    def action() -> None:
        args = build_parser().parse_args(argv)
        commands[args.command](args)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
