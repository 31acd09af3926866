r"""The characters: sixteen kinds of small pictures to learn from. ``python -m train.characters --out FOLDER --size 24``

DiceBear's styles draw them, any number of each; only styles whose own metadata say CC0 1.0 are used. A picture
depends on its class, its number and the seed alone, so that the set is the same everywhere. FOLDER gets a subfolder
for each class, as ``data=imagefolder`` reads it, with ``sources.json`` and ``CREDITS.md``: who drew what, under which
licence. Run it again to go on. It needs ``pip install "gmflow-nodes[characters]"``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from gmflow_core.files import write_atomically

from .data.images import SOURCES

STYLES = {  # class -> DiceBear's style
    "blob": "blobs", "clay": "clay", "critter": "critters", "cutout": "cutouts", "landscape": "landscape",
    "marble": "marbles", "mood": "moods", "peep": "open-peeps", "pixel person": "pixel-art", "pixel robot": "pixelbot",
    "planet": "planets", "sprout": "sprouts", "thumb": "thumbs", "voxel person": "voxel-art",
    "voxel robot": "voxel-bot", "waves": "waves",
}
# Two styles draw no ground; they get one of these, the voxel styles' own five.
GROUNDS = {name: ["#b6e3f4", "#c0aede", "#d1d4f9", "#ffd5dc", "#ffdfbf"] for name in ("peep", "pixel person")}
PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")
CC0 = ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/")
DRAWN = 120   # pixels; averaged down to the size
CHUNK = 50    # pictures between two reports of a worker


# ---- styles ------------------------------------------------------------------------------------

def definition(style: str) -> dict:
    """A style as DiceBear publishes it."""
    return json.loads((files("dicebear_styles") / f"{style}.json").read_text("utf-8"))


def source(name: str, meta: dict) -> dict[str, str]:
    """Who made a class's style, and under which licence. ValueError unless its metadata say CC0 1.0."""
    license, creator, work = (meta.get(key) or {} for key in ("license", "creator", "source"))
    if (license.get("name"), license.get("url")) != CC0:
        raise ValueError(f"style {STYLES[name]}: its licence is {license.get('name')!r} ({license.get('url')}); "
                         f"only {CC0[0]} is used")
    return {
        "class": name, "style": STYLES[name], "title": work.get("name", ""), "source": work.get("url", ""),
        "creator": creator.get("name", ""), "license": CC0[0], "license_url": CC0[1],
    }


def about(size: int, pictures: int, seed: int) -> dict:
    """What ``sources.json`` says of a set; also what makes two sets the same."""
    return {
        "data": "characters", "size": size, "pictures": pictures, "seed": seed,
        "drawn_by": {package: version(package) for package in PACKAGES},
        "styles": [source(name, definition(style)["meta"]) for name, style in STYLES.items()],
    }


def credits_page(facts: dict) -> str:
    """``sources.json`` for people."""
    drawn_by = ", ".join(f"{name} {number}" for name, number in facts["drawn_by"].items())
    rows = [f"| {s['class']} | {s['style']} | [{s['title']}]({s['source']}) | {s['creator']} "
            f"| [{s['license']}]({s['license_url']}) |" for s in facts["styles"]]
    return "\n".join([
        "# Credits", "", f"{facts['pictures']} pictures of each class at {facts['size']} x {facts['size']}, drawn by "
        f"{drawn_by} (seed {facts['seed']}). Every style is in the public domain by its own metadata:", "",
        "| class | style | work | creator | licence |", "|---|---|---|---|---|", *rows, "",
    ])


# ---- pictures ----------------------------------------------------------------------------------

@cache
def _style(name: str):
    from dicebear import Style

    return Style(definition(STYLES[name]))


def paint(name: str, index: int, seed: int = 0) -> Image.Image:
    """One picture of a class, RGB, 120 x 120."""
    from dicebear import Avatar
    from resvg_py import svg_to_bytes

    options = {"seed": f"{name} {seed} {index}", "size": DRAWN}
    if name in GROUNDS:
        options["backgroundColor"] = GROUNDS[name]
    svg = Avatar(_style(name), options).to_string()
    png = svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def path_of(folder: Path, name: str, index: int) -> Path:
    return folder / name / f"{index:05d}.png"


def render(folder: Path, name: str, indices: list[int], size: int, seed: int) -> int:
    """Write some pictures of a class; their number."""
    for index in indices:
        picture = paint(name, index, seed).resize((size, size), Image.Resampling.BOX)
        write_atomically(path_of(folder, name, index), partial(picture.save, format="png"))
    return len(indices)


def characters(folder: Path, size: int, pictures: int, seed: int, workers: int) -> None:
    """All that a folder lacks of a set. ValueError if it holds another set, or a style is not CC0."""
    facts, said = about(size, pictures, seed), folder / SOURCES
    if said.exists():
        before = json.loads(said.read_text("utf-8"))
        changed = [f"{key} {before.get(key)} there, {fact} asked for" for key, fact in facts.items()
                   if before.get(key) != fact]
        if changed:
            raise ValueError(f"{folder} holds another set ({'; '.join(changed)}); choose another --out")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and not a set of this program; choose another --out")
    for name in STYLES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_atomically(said, lambda path: path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8"))
    write_atomically(folder / "CREDITS.md", lambda path: path.write_text(credits_page(facts), "utf-8"))
    todo = {name: [i for i in range(pictures) if not path_of(folder, name, i).exists()] for name in STYLES}
    total = pictures * len(STYLES)
    done = total - sum(map(len, todo.values()))
    with ProcessPoolExecutor(workers) as pool, tqdm(total=total, initial=done, unit="picture") as bar:
        jobs = [pool.submit(render, folder, name, some[i : i + CHUNK], size, seed)
                for name, some in todo.items() for i in range(0, len(some), CHUNK)]
        try:
            for job in as_completed(jobs):
                bar.update(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- the command -------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.characters", description=__doc__.split("``")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets a subfolder for each class")
    parser.add_argument("--size", type=int, default=24, help="height and width in pixels, at most 120 (default 24)")
    parser.add_argument("--pictures", type=int, default=3000, help="of each class (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other pictures (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw (default: one a core)")
    args = parser.parse_args(arguments)
    for name, high in (("size", DRAWN), ("pictures", 100_000), ("workers", 1000)):
        if not 1 <= getattr(args, name) <= high:
            parser.error(f"--{name} must be from 1 to {high}, got {getattr(args, name)}")
    try:
        characters(args.out, args.size, args.pictures, args.seed, args.workers)
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: {error}; the characters need: python -m pip install {' '.join(PACKAGES)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.pictures * len(STYLES)} pictures in {args.out}; "
          f"train with: python -m train --preset characters --data {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
