r"""How good is a checkpoint? ``python -m train.evaluate CHECKPOINT --data digits --steps 1 2 4 8 --guidance 0 0.3``

Samples with every solver, number of steps and guidance scale asked for, and compares with real images: FID, improved
precision and recall, saturation, accuracy where classes allow; of the mixture itself the negative log-likelihood. Rows
are added to OUT/results.json as they are made: run again to go on, or with other settings or checkpoints to add theirs.
Under torchrun every process samples its share; the first computes the figures and writes.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from gmflow_core.cli import number, run_command
from gmflow_core.files import remove_remains, write_text
from gmflow_core.guidance import TILTS
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT
from gmflow_core.schedule import SHIFTS

from ..folder import locked
from ..team import Team, launched, leaving
from .figures import markdown, save_figures
from .results import RESULTS
from .rows import SAMPLES
from .settings import SOLVERS
from .sweep import sweep

PATIENCE = timedelta(hours=12)  # the first is alone with figures and real images' classifier


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
    parser.add_argument("--substeps", type=int, help="of GM-ODE in each step; 0 is 128 / steps, as published "
                        "(default: each checkpoint's own)")
    parser.add_argument("--ablations", action="store_true",
                        help="also the paper's ablations A2, A4, B1, no projection, "
                             "no re-anchoring; the published tilt")
    parser.add_argument("--samples", type=int, default=1000,
                        help="samples of each setting, its classes in turn (default 1000; the paper: 50000)")
    parser.add_argument("--real-samples", type=int, default=50_000, help="real images at most (default 50000)")
    parser.add_argument("--batch", type=int, default=125, help="samples at a time (default 125)")
    parser.add_argument("--shift", type=number(float, *SHIFTS),
                        help="time shift of every solver's grid, 1 is uniform (default: each checkpoint's own)")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--vae", help="of latents: a diffusers AutoencoderKL, a folder or a name on the hub")
    parser.add_argument("--inception", help="torch-fidelity's weights file (default: it downloads its own)")
    parser.add_argument("--features", choices=("inception", "classifier"),
                        help="of a folder's images: Inception's, or for small pictures those of a small classifier "
                             "that learns the folder's classes first (default inception; the digits have their own)")
    parser.add_argument("--shown", type=int, default=10, metavar="N",
                        help="first samples of each setting that are kept as a picture (default 10)")
    parser.add_argument("--npz", action="store_true",
                        help="also keep all samples of each setting as OUT/samples/NAME.npz, "
                             "in the layout of ADM's evaluation")
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
        ("substeps", [args.substeps or 0], 0), ("shown", [args.shown], 1),
    ):
        if min(values, default=low) < low:
            parser.error(f"--{name} must be >= {low}, got {min(values)}")
    if args.data == "digits" and args.features:
        parser.error(f"--features {args.features} is of a folder's images: the digits have features of their own")
    if any(not 0 <= w < 1 for w in args.guidance):
        parser.error("--guidance takes probabilistic scales in [0, 1), "
                     f"got {max(args.guidance, key=abs):g}; CFG scales are --cfg")
    return args


def evaluate(args: argparse.Namespace, team: Team) -> None:
    with locked(args.out, "evaluates") if team.first else nullcontext():
        if team.first:
            remove_remains(args.out)
            remove_remains(args.out / SAMPLES)
        results = sweep(args, team)
        if results is None:
            return
        pictures = save_figures(results, args.out)
        table = markdown(results)
        write_text(args.out / "table.md", table)
    print(table + "\n" + ", ".join(str(args.out / name) for name in [RESULTS, "table.md", *pictures]))


def main(arguments: list[str] | None = None) -> int:
    if any(word.split("=")[0] == "--evidence" for word in (sys.argv[1:] if arguments is None else arguments)):
        from .evidence import main as evaluate_evidence

        if launched()[2] > 1:
            print("error: --evidence is evaluated by one process: run it without torchrun", file=sys.stderr)
            return 2
        return evaluate_evidence(arguments)

    def action() -> None:
        args = parse(arguments)
        team = Team.join(args.device, PATIENCE)
        with team.quiet():
            evaluate(args, team)

    return leaving(lambda: run_command(action, "stopped; run the same command to go on"))


if __name__ == "__main__":
    sys.exit(main())
