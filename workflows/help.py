"""Makes the pictures of the nodes' help pages, web/docs/NODE/picture.png, on a ComfyUI that has this pack.

    python -m workflows.help --server URL GMFlowGuider GMFlowKSampler

Needs Pillow. A row is what one node saves; its caption is the node's title, grey after the first comma.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .build import CHARACTERS, SIZE, TEN
from .graph import Flow, Output
from .picture import FAINT, INK, PAPER, outputs
from .run import RunError, Server

DOCS = Path(__file__).resolve().parent.parent / "web" / "docs"
ZOOM, GAP, EDGE, CAPTION = 2, 3, 12, 30
COLOURS = 160  # a help page loads faster without the rest


class Rows(Flow):
    """A flow whose nodes save rows of pictures."""

    def __init__(self, name: str, info: dict):
        super().__init__(name, info, {})
        self.group("", pos=(0, 0))
        self.vae = self.add("VAELoader", vae_name="pixel_space").out

    def model(self, dtype: str = "default") -> Output:
        return self.add("GMFlowLoader", model_name=CHARACTERS, weight_dtype=dtype).out

    def classes(self, model: Output, labels: str = TEN) -> Output:
        return self.add("GMFlowClassConditioning", model=model, labels=labels)["positive"]

    def empty(self, model: Output, images: int = 10) -> Output:
        return self.add("GMFlowEmptyLatent", model=model, batch_size=images).out

    def row(self, caption: str, latent: Output) -> None:
        images = self.add("VAEDecode", samples=latent, vae=self.vae).out
        self.add("SaveImage", caption, images=images, filename_prefix="gmflow/help")

    def painted(self, caption: str, model: Output, positive: Output, latent: Output, **settings) -> None:
        settings = {"seed": 1, "steps": 8, "guidance": 0.4} | settings
        self.row(caption, self.add("GMFlowKSampler", model=model, positive=positive, latent_image=latent,
                                   **settings)["latent"])

    def custom(self, model: Output, sampler: Output, steps: int, guidance: float, part: int = 0, **settings):
        """GMFlow Sampler Custom behind GMFlow Guider; ``part``: end after so many of the steps."""
        sigmas = self.add("GMFlowScheduler", model=model, steps=steps).out
        if part:
            sigmas = self.add("SplitSigmas", sigmas=sigmas, step=part)["high_sigmas"]
        guider = self.add("GMFlowGuider", model=model, positive=self.classes(model), guidance=guidance, **settings).out
        return self.add("GMFlowSamplerCustom", noise=self.add("RandomNoise", noise_seed=1).out, guider=guider,
                        sampler=sampler, sigmas=sigmas, latent_image=self.empty(model))


def class_conditioning(flow: Rows) -> None:
    model = flow.model()
    latent = flow.empty(model)

    def blend(*labels: str) -> Output:
        first, second = (flow.classes(model, label) for label in labels)
        return flow.add("ConditioningCombine", conditioning_1=first, conditioning_2=second).out

    flow.painted("ten kinds, one label each", model, flow.classes(model), latent)
    flow.painted("thumb, one for all", model, flow.classes(model, "thumb"), latent)
    for pair in (("mood", "thumb"), ("voxel person", "voxel robot")):
        flow.painted(f"{pair[0]} and {pair[1]}, ConditioningCombine", model, blend(*pair), latent)
    negative = flow.add("GMFlowClassConditioning", model=model, labels="0")["negative"]
    flow.painted("negative, used as positive", model, negative, latent, guidance=0.0)


def empty_latent(flow: Rows) -> None:
    model = flow.model()
    for images in (1, 4, 10):
        labels = ", ".join(TEN.split(", ")[:images])
        flow.painted(f"batch_size {images}, {SIZE} x {SIZE}", model, flow.classes(model, labels),
                     flow.empty(model, images))
    for scale in (1.5, 2.0):
        larger = flow.add("LatentUpscaleBy", samples=flow.empty(model, 5), upscale_method="nearest-exact",
                          scale_by=scale).out
        size = round(scale * SIZE)
        flow.painted(f"not this node, {size} x {size}", model, flow.classes(model, ", ".join(TEN.split(", ")[:5])),
                     larger)


def guider(flow: Rows) -> None:
    model, sampler = flow.model(), flow.add("SamplerGMFlowODE").out
    for scale in (0.0, 0.2, 0.4, 0.7):
        flow.row(f"guidance {scale:g}", flow.custom(model, sampler, 8, scale)["output"])
    for scale in (2.0, 4.0, 8.0):
        flow.row(f"vanilla CFG, cfg_scale {scale:g}",
                 flow.custom(model, sampler, 8, 0.0, method="vanilla CFG", cfg_scale=scale)["output"])


def inspector(flow: Rows) -> None:
    model = flow.model()
    trace = flow.add("GMFlowKSampler", model=model, positive=flow.classes(model, "critter"),
                     latent_image=flow.empty(model, 1), seed=1, guidance=0.4)["trace"]
    for view in ("components", "timeline"):
        flow.add("GMFlowInspector", trace=trace, step=0, view=view)


def ksampler(flow: Rows) -> None:
    model = flow.model()
    positive, latent = flow.classes(model), flow.empty(model)
    for solver in ("GM-ODE", "GM-SDE"):
        for steps in (1, 2, 4, 8):
            flow.painted(f"{solver}, {steps} step{'s' * (steps > 1)}", model, positive, latent, solver=solver,
                         steps=steps)


def loader(flow: Rows) -> None:
    for dtype in ("float32", "bfloat16", "fp8_e4m3fn", "fp8_e5m2"):
        model = flow.model(dtype)
        flow.painted(dtype, model, flow.classes(model), flow.empty(model))


def sampler_custom(flow: Rows) -> None:
    model, sampler = flow.model(), flow.add("SamplerGMFlowODE").out
    for part in (2, 4, 6):
        sampled = flow.custom(model, sampler, 8, 0.4, part=part)
        for name in ("output", "denoised_output"):
            flow.row(f"{name}, after {part} of 8 steps", sampled[name])


def gm_ode(flow: Rows) -> None:
    model = flow.model()
    for steps, substeps in ((2, 64), (4, 32)):
        for small, order in ((1, 1), (substeps, 1), (substeps, 2)):
            sampler = flow.add("SamplerGMFlowODE", order=order, substeps=small).out
            flow.row(f"{steps} steps, substeps {small}, order {order}",
                     flow.custom(model, sampler, steps, 0.0)["output"])
    for tilt in ("published", "limited"):
        sampler = flow.add("SamplerGMFlowODE", tilt=tilt).out
        flow.row(f"8 steps, tilt {tilt}", flow.custom(model, sampler, 8, 0.0)["output"])


def gm_sde(flow: Rows) -> None:
    model = flow.model()
    for steps in (1, 2, 4, 8):
        for spectral in (True, False):
            sampler = flow.add("SamplerGMFlowSDE", spectral=spectral).out
            flow.row(f"spectral {'on' if spectral else 'off'}, {steps} step{'s' * (steps > 1)}",
                     flow.custom(model, sampler, steps, 0.0)["output"])


PICTURES = {
    "GMFlowClassConditioning": class_conditioning, "GMFlowEmptyLatent": empty_latent, "GMFlowGuider": guider,
    "GMFlowInspector": inspector, "GMFlowKSampler": ksampler, "GMFlowLoader": loader,
    "GMFlowSamplerCustom": sampler_custom, "SamplerGMFlowODE": gm_ode, "SamplerGMFlowSDE": gm_sde,
}


def strip(images: list[Image.Image]) -> Image.Image:
    sized = [image.resize((ZOOM * image.width, ZOOM * image.height), Image.NEAREST) for image in images]
    row = Image.new("RGB", (sum(i.width + GAP for i in sized) - GAP, sized[0].height), PAPER)
    for number, image in enumerate(sized):
        row.paste(image, (number * (image.width + GAP), 0))
    return row


def rows(found: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Every node's pictures side by side under their caption."""
    strips = [(caption, strip(images)) for caption, images in found]
    size = max(s.width for _, s in strips) + 2 * EDGE, sum(CAPTION + s.height + EDGE for _, s in strips) + EDGE // 2
    picture = Image.new("RGB", size, PAPER)
    pen, font, y = ImageDraw.Draw(picture), ImageFont.load_default(20), EDGE // 2
    for caption, row in strips:
        head, comma, rest = caption.partition(",")
        pen.text((EDGE, y), head, INK, font)
        pen.text((EDGE + pen.textlength(head, font), y), comma + rest, FAINT, font)
        picture.paste(row, (EDGE, y + CAPTION))
        y += CAPTION + row.height + EDGE
    return picture


def panels(found: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Wide pictures one under the other; of the lower one the images and the hypotheses' weights."""
    images = [images[0].reduce(2) for _, images in found]
    images[-1] = images[-1].crop((0, 0, images[-1].width, round(0.68 * images[-1].height)))
    size = max(i.width for i in images), sum(i.height for i in images)
    picture = Image.new("RGB", size, images[0].getpixel((0, 0)))
    y = 0
    for image in images:
        picture.paste(image, (0, y))
        y += image.height
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflows.help", description="Make the help pages' pictures.")
    parser.add_argument("names", nargs="+", choices=PICTURES)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    arguments = parser.parse_args()
    server = Server(arguments.server)
    try:
        info = server.json("/object_info")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    for name in arguments.names:
        flow = Rows(name, info)
        PICTURES[name](flow)
        try:
            found = outputs(server, flow.api())
        except RunError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return error.code
        picture = (panels if name == "GMFlowInspector" else rows)(found)
        path = DOCS / name / "picture.png"
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
