"""Encode a folder of images to latents: ``python -m train.encode FOLDER --vae PATH_OR_HUB_ID --out DIR``.

The result is what ``data=latents`` trains on (:mod:`.latents`). Run the same command again to go on where
it stopped: finished shards are kept. Under torchrun every process makes its share of the shards. A latent is one draw
from the VAE's posterior, and that draw depends on nothing but the image's place in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from gmflow_core.cli import Parser, number, open_device, run_command
from gmflow_core.files import remove_remains, write_atomically, write_text
from gmflow_core.model import SD_VAE_SCALE

from .console import say
from .data.decode import decode, to_unit
from .data.images import ImageList, find_images, fingerprint
from .data.latents import FORMAT, INDEX
from .folder import locked
from .team import launched
from .vae import load_vae

PLAN = "plan.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoder:
    """A VAE as the loop needs it: images (B,3,S,S) in [-1,1] -> mean and standard deviation (B,C,H,W)."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    name: str
    scale: float
    shift: float
    weights: str = ""  # a fingerprint of them


def diffusers_encoder(source: str, device: torch.device) -> Encoder:
    """diffusers' AutoencoderKL, from a folder or from the Hugging Face hub."""
    vae = load_vae(source, device)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(images.to(device)).latent_dist
        return posterior.mean.cpu(), posterior.std.cpu()

    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
    name = Path(source).resolve().name if Path(source).is_dir() else source
    scale = float(SD_VAE_SCALE if scale is None else scale)
    return Encoder(encode, name, scale, float(shift or 0.0), fingerprint_of(vae.state_dict()))


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """Of names and values of weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def encode_folder(
    images: ImageList, out: Path, encoder: Encoder, *, size: int = 256, flips: bool = False, workers: int = 2,
    batch: int = 16, shard_size: int = 4096, dtype: str = "float16", rank: int = 0, world: int = 1,
) -> dict | None:
    """Write the shards that are not there yet, then the index, which is returned.

    Of ``world`` processes each makes every ``world``-th shard; the first waits for all and writes the index, others
    return None.
    """
    count = len(images.paths)
    plan = {
        "format": FORMAT, "vae": encoder.name, "scale": encoder.scale, "shift": encoder.shift, "size": size,
        "flips": flips, "dtype": dtype, "shard_size": shard_size, "classes": list(images.classes), "found": count,
        "files": digest(images), "contents": fingerprint(images), "vae_weights": encoder.weights,
    }
    out.mkdir(parents=True, exist_ok=True)
    check_plan(out / PLAN, plan, write=rank == 0)
    shards = [(out / f"shard-{i:05d}.safetensors", range(count)[i * shard_size : (i + 1) * shard_size])
              for i in range(-(-count // shard_size))]
    mine = shards[rank::world]
    total = sum(len(chosen) for _, chosen in mine)
    with tqdm(total=total, unit="image", disable=rank > 0) as bar, ThreadPoolExecutor(workers) as pool:
        for path, chosen in mine:
            if finished(path) is None:
                tensors, bad = encode_images(images, chosen, encoder, size, flips, batch, DTYPES[dtype], pool, bar)
                write_atomically(path, partial(save_file, tensors, metadata={"broken": json.dumps(bad)}))
            else:
                bar.update(len(chosen))
    if rank > 0:
        return None
    made = [wait_for(path) for path, _ in shards]
    broken = [name for shard in made for name in shard["broken"]]
    made = [shard for shard in made if shard["count"]]
    if not made:
        raise ValueError(f"{images.folder}: none of its {count} images can be read")
    say_empty_classes(images, broken)
    index = {k: v for k, v in plan.items() if k not in ("files", "contents", "shard_size")} | {
        "shape": made[0]["shape"], "images": sum(s["count"] for s in made), "broken": broken,
        "shards": [{"file": s["file"], "count": s["count"]} for s in made],
    }
    write_json(out / INDEX, index)
    return index


def encode_images(images: ImageList, chosen: range, encoder: Encoder, size, flips, batch, dtype, pool, bar):
    """The tensors of one shard, and the names of the images that could not be read."""
    parts, broken = [], []
    for first in range(chosen.start, chosen.stop, batch):
        asked = range(first, min(first + batch, chosen.stop))
        decoded = dict(zip(asked, pool.map(lambda i: try_decode(images.paths[i], size), asked), strict=True))
        broken += [images.paths[i].relative_to(images.folder).as_posix() for i, image in decoded.items()
                   if image is None]
        good = [i for i, image in decoded.items() if image is not None]
        if good:
            x = to_unit(torch.stack([decoded[i] for i in good]))
            part = {"latents": sample_latents(encoder, x, [2 * i for i in good]), "labels": images.labels[good]}
            if flips:
                part["flipped"] = sample_latents(encoder, x.flip(-1), [2 * i + 1 for i in good])
            parts.append(part)
        bar.update(len(asked))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
    tensors = {name: value.to(torch.int64 if name == "labels" else dtype).contiguous()
               for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} of images {chosen.start} to {chosen.stop - 1} are not finite in {dtype}: "
                             "use --dtype float32, or the VAE is damaged")
    return tensors, broken


def sample_latents(encoder: Encoder, images: Tensor, seeds: list[int]) -> Tensor:
    """A latent of each image (B,C,H,W), scaled and shifted, drawn with a seed of its own."""
    with torch.no_grad():
        mean, std = (part.float() for part in encoder.encode(images))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return (mean + std * noise - encoder.shift) * encoder.scale


def say_empty_classes(images: ImageList, broken: list[str]) -> None:
    """Name the classes of which no image could be read."""
    gone = set(broken)
    for label, name in enumerate(images.classes):
        chosen = (images.labels == label).nonzero()[:, 0].tolist()
        if all(images.paths[i].relative_to(images.folder).as_posix() in gone for i in chosen):
            say(f"{images.folder}: none of the {len(chosen)} images of the class {name} can be read: it has no latents")


SAID: set[str] = set()


def say_once(words: str) -> None:
    """A note on decoded images, the first time."""
    if words not in SAID:
        SAID.add(words)
        say(words)


def try_decode(path: Path, size: int) -> Tensor | None:
    """The image (3,S,S) uint8, or None with a word to stderr if it cannot be read."""
    try:
        return decode(path, size, note=say_once)
    except Exception as error:  # a damaged file may raise anything: Pillow lists nothing
        say(f"{path}: cannot be read, left out ({type(error).__name__}: {error})")
        return None


# ---- files -------------------------------------------------------------------------------------

def digest(images: ImageList) -> str:
    """Of the names and classes of all images, in their order."""
    names = "\n".join(path.relative_to(images.folder).as_posix() for path in images.paths)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def check_plan(path: Path, plan: dict, write: bool) -> None:
    """``write`` the plan of a new folder; ValueError if the folder was begun with another one."""
    if not path.exists():
        return write_json(path, plan) if write else None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error}); delete the folder, or choose another --out") from None
    known = {k: v for k, v in plan.items() if k in before}  # an older version kept no fingerprints
    changed = [k for k in known if before[k] != known[k]]
    inputs = {"contents", "classes", "files"}
    words = [f"{k} {before[k]!r}, not {known[k]!r}" for k in changed if k not in {"vae_weights", *inputs}]
    words += ["other weights of the VAE"] * ("vae_weights" in changed) + ["other images"] * bool(inputs & set(changed))
    if changed:
        raise ValueError(f"{path.parent} was begun with {', '.join(words)}; choose another --out, or delete it")
    if plan.keys() - known.keys():
        say(f"{path.parent} was begun by a version without fingerprints: see to it that VAE and images are the same")


def finished(path: Path) -> dict | None:
    """What a shard holds, or None if it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as shard:
            broken = json.loads((shard.metadata() or {})["broken"])
            shape = list(shard.get_slice("latents").get_shape()) if "latents" in shard.keys() else [0]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return {"file": path.name, "count": shape[0], "shape": shape[1:], "broken": broken}


def wait_for(path: Path, patience: float = 60) -> dict:
    """What a shard holds, once it is there: another process may still be at it. torchrun ends all if one fails."""
    waited = 0.0
    while (made := finished(path)) is None:
        time.sleep(1)
        waited += 1
        if waited % patience == 0:
            say(f"waiting for {path.name}, which another process of this team makes")
    return made


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m train.encode", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="images, a subfolder for each class")
    parser.add_argument("--vae", required=True,
                        help="diffusers AutoencoderKL: a folder or a name on the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    count = number(int, 1)
    parser.add_argument("--size", type=count, default=256, help="images are cut to this size (default 256)")
    parser.add_argument("--flips", action="store_true",
                        help="also encode every image mirrored: twice the time and space")
    parser.add_argument("--workers", type=number(int, 1, 1024), default=2,
                        help="threads that decode images (default 2)")
    parser.add_argument("--batch", type=count, default=16, help="images at a time in the VAE (default 16)")
    parser.add_argument("--shard-size", type=count, default=4096, help="images a file (default 4096)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored latents (default float16)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    return parser.parse_args()


def action() -> None:
    args = parse()
    images = find_images(args.folder)
    rank, local, world = launched()
    device = open_device(args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    with locked(args.out, "encodes") if rank == 0 else nullcontext():
        if rank == 0:
            remove_remains(args.out)
        index = encode_folder(
            images, args.out, diffusers_encoder(args.vae, device), size=args.size, flips=args.flips,
            workers=args.workers, batch=args.batch, shard_size=args.shard_size, dtype=args.dtype,
            rank=rank, world=world,
        )
    if index is not None:
        print(f"{args.out}: {index['images']} images, {len(index['classes'])} classes, latents {index['shape']}, "
              f"{len(index['broken'])} left out")


def main() -> int:
    return run_command(action, "stopped; run the same command to go on")


if __name__ == "__main__":
    sys.exit(main())
