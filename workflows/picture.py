"""Runs workflows on a ComfyUI and makes their pictures ``NAME.jpg`` of what they put out.

    python -m workflows.picture --server URL quickstart guidance_sweep

Needs Pillow. A block is what one node saves; previews count only where they are all that there is, and an
inspector's panels stand two in a row. The page shows pictures in squares, so blocks are wrapped to be nearly one.
A workflow whose model is a download gets a card of words.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import urllib.parse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .run import RunError, Server, failure, load

HERE = Path(__file__).resolve().parent
WIDTH, GAP, CAPTION, PAPER, INK, FAINT = 840, 6, 34, (24, 24, 27), (212, 212, 216), (140, 140, 148)
CARDS = {
    "imagenet_gmdit": ("ImageNet", "256 x 256, 1000 classes", "the published GM-DiT-XL/2, K = 8",
                       "its files are a download: see the note inside"),
}


def outputs(server: Server, workflow: dict) -> list[tuple[str, list[Image.Image]]]:
    """(title, images) of every node with images, in the workflow's order."""
    entry = server.wait(workflow, server.queue(workflow), 600, lambda state: None)
    if problem := failure(workflow, entry):
        raise RunError(1, problem)
    found = []
    for number, node in workflow.items():
        images = entry["outputs"].get(number, {}).get("images", [])
        if images and node["class_type"] != "PreviewImage":
            files = [server.request("/view?" + urllib.parse.urlencode(image)) for image in images]
            found.append((node["_meta"]["title"], [Image.open(io.BytesIO(file)).convert("RGB") for file in files]))
    return found


def tiled(images: list[Image.Image], columns: int, width: int) -> Image.Image:
    """Rows of images, all of the width of a column; pixels stay square-edged when they grow."""
    cell = (width - GAP * (columns - 1)) // columns
    sized = [i.resize((cell, round(cell * i.height / i.width)), Image.NEAREST if cell >= i.width else Image.LANCZOS)
             for i in images]
    rows = [sized[n : n + columns] for n in range(0, len(sized), columns)]
    sheet = Image.new("RGB", (width, sum(max(i.height for i in row) + GAP for row in rows) - GAP), PAPER)
    y = 0
    for row in rows:
        for x, image in enumerate(row):
            sheet.paste(image, (x * (cell + GAP), y))
        y += max(i.height for i in row) + GAP
    return sheet


def compose(found: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    panels = [(title, images[0]) for title, images in found if images[0].width > 256]
    if panels:
        cell = (WIDTH - GAP) // 2
        # One panel alone is shown with what came of it.
        shown = panels if len(panels) > 1 else [(title, images[0]) for title, images in found]
        drawn = [captioned(title, tiled([image], 1, cell)) for title, image in shown]
        return padded(tiled(drawn, 2, WIDTH))
    if len(found) == 1:
        return padded(tiled(found[0][1], 5, WIDTH))
    return padded(min((blocks(found, lines) for lines in (1, 2)),
                      key=lambda sheet: abs(math.log(sheet.width / sheet.height))))


def blocks(found: list[tuple[str, list[Image.Image]]], lines: int) -> Image.Image:
    """Every node's images with its title, in so many lines where they are more than five."""
    rows = []
    for title, images in found:
        many = len(images) > 5
        rows.append(captioned(title, tiled(images, -(-len(images) // (lines if many else 1)),
                                           WIDTH if many else WIDTH * 3 // 5)))
    width = max(row.width for row in rows)
    sheet, y = Image.new("RGB", (width, sum(row.height + 2 * GAP for row in rows) - 2 * GAP), PAPER), 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height + 2 * GAP
    return sheet


def card(head: str, *lines: str) -> Image.Image:
    """Words in a square."""
    sheet = Image.new("RGB", (880, 880), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((440, 360), head, INK, ImageFont.load_default(120), anchor="mm")
    for i, line in enumerate(lines):
        pen.text((440, 480 + 56 * i), line, FAINT, ImageFont.load_default(38), anchor="mm")
    return sheet


def captioned(title: str, image: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (image.width, image.height + CAPTION), PAPER)
    sheet.paste(image, (0, CAPTION))
    ImageDraw.Draw(sheet).text((0, 4), title, INK, ImageFont.load_default(22))
    return sheet


def padded(image: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (image.width + 40, image.height + 40), PAPER)
    sheet.paste(image, (20, 20))
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflows.picture", description="Make the workflows' pictures.")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    arguments = parser.parse_args()
    for name in arguments.names:
        try:
            words = CARDS.get(name)
            picture = card(*words) if words else compose(outputs(Server(arguments.server),
                                                                 load(HERE / "api" / f"{name}.json")))
        except RunError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return error.code
        path = HERE / f"{name}.jpg"
        picture.save(path, quality=76, optimize=True)
        print(f"{path.name}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
