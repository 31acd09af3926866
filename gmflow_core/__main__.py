"""``python -m gmflow_core demo | sample | info | convert``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .cli import SOLVERS, Parser, UsageError, number, sample

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLED = MODELS / "gmdit_digits.safetensors"


def build_parser() -> Parser:
    parser = Parser(prog="python -m gmflow_core", description="Gaussian mixture flow matching without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="sample the bundled digits model and draw what it believes")
    demo.add_argument("--out", type=Path, default=Path("output"), help="folder of the pictures (default output)")
    demo.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)

    draw = commands.add_parser("sample", help="sample any checkpoint")
    draw.add_argument("checkpoint", type=Path, help="a GMFlow checkpoint: file or folder")
    draw.add_argument("--labels", help="one image each: indices, ranges and class names, e.g. 0,1,2-9")
    draw.add_argument("--count", type=number(int, 1), help="images without a class (instead of --labels)")
    draw.add_argument("--solver", choices=SOLVERS, default="gm-ode")
    draw.add_argument("--order", type=number(int, 1, 2), default=2)
    draw.add_argument("--corrections", type=number(int, 0, 100), default=0, help="correction steps of order 2 (default 0; 2 helps without guidance)")
    draw.add_argument("--steps", type=number(int, 1, 10_000), default=8, help="network steps (default 8)")
    draw.add_argument("--substeps", type=number(int, 1, 100_000), help="of GM-ODE, per step (default ceil(128 / steps))")
    draw.add_argument("--shift", type=number(float, 1e-3, 1e3), default=1.0, help="time shift of the grid (default 1)")
    draw.add_argument("--guidance", type=number(float, 0, 1, high_open=True), default=0.3,
                      help="probabilistic guidance in [0, 1), not a CFG scale (default 0.3)")
    draw.add_argument("--orthogonal", type=number(float, 0, 1), default=1.0, help="orthogonal projection (default 1)")
    draw.add_argument("--temperature", type=number(float, 1e-3, 1e3), default=1.0)
    draw.add_argument("--no-spectrum", action="store_true", help="GM-SDE with white noise")
    draw.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    draw.add_argument("--batch-size", type=number(int, 1), default=64)
    draw.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (default cpu)")
    draw.add_argument("--out", type=Path, default=Path("output"), help="folder (default output)")
    draw.add_argument("--images", action="store_true", help="also every image as its own PNG, in label order")
    draw.add_argument("--latents", action="store_true", help="also the raw samples as safetensors")

    info = commands.add_parser("info", help="what a checkpoint holds")
    info.add_argument("checkpoint", type=Path)
    info.add_argument("--heads", type=number(int, 1), help="attention heads, where the file does not say")

    convert = commands.add_parser("convert", help="any readable checkpoint to one .safetensors of ours")
    convert.add_argument("source", type=Path)
    convert.add_argument("destination", type=Path)
    convert.add_argument("--heads", type=number(int, 1), help="attention heads, where the source does not say")
    return parser


def run_sample(args) -> None:
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from .checkpoint import load_checkpoint
    from .labels import LabelError, parse_labels
    from .pictures import image_grid, scatter

    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    checkpoint = load_checkpoint(args.checkpoint, device=device)
    classes = getattr(checkpoint.config, "num_classes", None)
    if classes is None and args.labels:
        raise UsageError("--labels: this model has no classes; use --count")
    if (args.labels is None) == (args.count is None):
        raise UsageError("give either --labels (one image each) or --count (images without a class)")
    try:
        labels = None if args.labels is None else parse_labels(args.labels, classes, checkpoint.class_names)
    except LabelError as error:
        raise UsageError(f"--labels: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)

    total = len(labels) if labels is not None else args.count
    batches = -(-total // args.batch_size)
    start = time.perf_counter()
    with tqdm(total=batches * args.steps, unit="step", desc=args.solver) as bar:
        images = sample(
            checkpoint, labels, count=args.count, solver=args.solver, order=args.order, steps=args.steps,
            substeps=args.substeps, shift=args.shift, guidance=args.guidance, orthogonal=args.orthogonal,
            spectral=not args.no_spectrum, temperature=args.temperature, correction_steps=args.corrections, seed=args.seed, batch_size=args.batch_size,
            callback=lambda step: bar.update(),
        )
    seconds = time.perf_counter() - start
    if images.ndim == 2:
        scatter(images, 4.5).save(args.out / "grid.png")
    else:
        scale = max(1, round(64 / images.shape[-1]))
        image_grid(images, min(10, total), scale).save(args.out / "grid.png")
        if args.images:
            for i, image in enumerate(images):
                name = f"{i:04d}.png" if labels is None else f"{i:04d}-class{labels[i]}.png"
                image_grid(image[None], 1, gap=0).save(args.out / name)
    if args.latents:
        extra = {} if labels is None else {"labels": torch.tensor(labels)}
        save_file({"samples": images, **extra}, args.out / "samples.safetensors")
    if checkpoint.latent_space.kind == "sd-vae":
        print("note: these are latents of an SD VAE; the PNGs show their first three channels, not decoded images")
    print(f"{total} samples in {seconds:.1f} s: {args.out}/")


def run_info(args) -> None:
    from .checkpoint import format_info, identify

    print(format_info(identify(args.checkpoint, heads=args.heads)))


def run_convert(args) -> None:
    from .checkpoint import convert

    if args.destination.suffix != ".safetensors":
        raise UsageError(f"destination {args.destination} must end in .safetensors")
    convert(args.source, args.destination, heads=args.heads)
    print(args.destination)


def run_demo(args) -> None:
    from .demo import demo

    demo(BUNDLED, args.out, args.seed)


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        {"demo": run_demo, "sample": run_sample, "info": run_info, "convert": run_convert}[args.command](args)
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not installed: python -m pip install -e ".[standalone]"', file=sys.stderr)
        return 2
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
