"""Throughput of a DiT: training on made-up latents, guided sampling, and the solver's share of a step.

    python tests/bench/bench_dit.py --preset imagenet256-dit-xl2-k8 --batch 64 --sample-batch 125   # a GPU
    python tests/bench/bench_dit.py --preset dit-s2 --batch 4 --sample-batch 4 --repeats 2           # a CPU

Weights are random. Not a test: nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from safetensors.torch import save_file  # noqa: E402

from gmflow_core import GMDenoiser, flow_sigmas, sample_gm_ode, sample_gm_sde  # noqa: E402
from train.config import PRESETS, override  # noqa: E402
from train.data.latents import FORMAT, INDEX  # noqa: E402
from train.step import build  # noqa: E402
from train.throughput import forward_flops, peak_flops  # noqa: E402
from train.trainer import Trainer  # noqa: E402


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def made_up_latents(folder: Path, shape: tuple[int, ...], classes: int) -> Path:
    """A folder as python -m train.encode writes it, of noise."""
    count = max(256, classes)
    save_file({"latents": torch.randn(count, *shape).half(), "labels": torch.arange(count) % classes},
              folder / "shard-00000.safetensors")
    index = {"format": FORMAT, "shape": list(shape), "scale": 0.18215, "shift": 0.0, "vae": "noise",
             "size": shape[1] * 8, "classes": [str(i) for i in range(classes)], "flips": False,
             "shards": [{"file": "shard-00000.safetensors", "count": count}]}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def training(config, device: torch.device, repeats: int) -> None:
    """Images a second of whole steps: data, both passes, optimizer, moving average."""
    trainer = Trainer(config, None, device)
    for _ in range(2):
        trainer.train_step()
    start = clock(device)
    for _ in range(repeats):
        trainer.train_step()
    rate = repeats * config.batch_size / (clock(device) - start)
    words = f"training, batch {config.batch_size}: {rate:.2f} images/s"
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
        words += f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
        words += f", MFU {3 * forward_flops(config.model) * rate / peak:.1%}" if peak else ""
    print(words)


@torch.no_grad()
def sampling(config, device: torch.device, batch: int, steps: int, repeats: int) -> None:
    """Guided samples a second, and what of a step is not the network."""
    nets = build(config, device).to(device)
    model, spectrum = (nets["model"].eval().to(torch.bfloat16 if device.type == "cuda" else torch.float32),
                       nets["spectrum"].eval())
    labels = torch.arange(batch, device=device) % config.model.num_classes
    x = torch.randn(batch, config.model.in_channels, config.model.sample_size, config.model.sample_size, device=device)
    inside, forward = 0.0, model.forward

    def timed(*args, **options):
        nonlocal inside
        start = clock(device)
        result = forward(*args, **options)
        inside += clock(device) - start
        return result

    model.forward = timed
    denoiser = GMDenoiser(model, labels, 0.45)
    for name, run in (
        ("GM-ODE 2", lambda: sample_gm_ode(denoiser, x, flow_sigmas(steps), substeps=max(1, 128 // steps))),
        ("GM-SDE 2", lambda: sample_gm_sde(denoiser, x, flow_sigmas(steps), spectrum=spectrum)),
    ):
        run()
        seconds, network = [], []
        for _ in range(repeats):
            inside, start = 0.0, clock(device)
            run()
            seconds.append(clock(device) - start)
            network.append(inside)
        whole, net = statistics.median(seconds) / steps, statistics.median(network) / steps
        print(f"{name}, batch {batch}, {steps} steps, guided: {whole:.4f} s a step, of it {whole - net:.4f} s "
              f"({1 - net / whole:.1%}) not the network; {batch / (whole * steps):.3f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(p for p in PRESETS if PRESETS[p].data == "latents"),
                        default="imagenet256-dit-xl2-k8")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[],
                        help="as of python -m train")
    parser.add_argument("--batch", type=int, default=64, help="of training")
    parser.add_argument("--sample-batch", type=int, default=125)
    parser.add_argument("--steps", type=int, default=8, help="network steps of sampling")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = replace(PRESETS[args.preset], optimizer="adamw", batch_size=args.batch)
    config = override(config, [f"model.num_classes={config.model.num_classes}", *args.settings])
    model = config.model
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{args.preset} {' '.join(args.settings)}on {name}, torch {torch.__version__}: "
          f"{forward_flops(model) / 1e9:.1f} GFLOP a forward pass of an image")
    with tempfile.TemporaryDirectory() as folder:
        made_up_latents(Path(folder), (model.in_channels, model.sample_size, model.sample_size), model.num_classes)
        training(replace(config, data_path=folder, classes="model", flip=False), device, args.repeats)
    sampling(config, device, args.sample_batch, args.steps, args.repeats)


if __name__ == "__main__":
    main()
