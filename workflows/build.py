"""Makes every workflow: ``NAME.json`` for the page and ``api/NAME.json`` for programs, from one description.

    python -m workflows.build                         write all of them
    python -m workflows.build --snapshot URL          first renew tests/data/object_info.json from a running server
    python -m workflows.build --compare URL           does another server's version agree on what is used?
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from . import text_to_image
from .graph import GAP, Flow, Group, Output, fields, inputs_of, options

HERE = Path(__file__).resolve().parent
SNAPSHOT = HERE.parent / "tests" / "data" / "object_info.json"
# Kept short.
LISTED = ({("GMFlowLoader", "model_name"), ("VAELoader", "vae_name"), ("GMFlowImageNetClass", "class_name")}
          | text_to_image.LISTED)
CHARACTERS, SIZE = "gmdit_characters.safetensors", 24
TEN = "critter, cutout, mood, peep, pixel person, planet, sprout, thumb, voxel person, voxel robot"
CHOSEN = 4  # a hypothesis of a body, of the seed in choose_a_hypothesis
PASS = 70   # so much lower, a node lets a link pass above it to its neighbour's first input
BLUE, GREEN, PURPLE, BROWN = "#3f789e", "#4a7a4a", "#6d5a96", "#8a6d3b"


def start(flow: Flow, labels: str, images: int) -> tuple[Group, Output, Output, Output, Output]:
    """The group that every workflow of the bundled model begins with: model, both conditionings and an empty latent."""
    group = flow.group("Model and classes", pos=(380, 0))
    model = flow.add("GMFlowLoader", model_name=CHARACTERS).out
    classes = flow.add("GMFlowClassConditioning", model=model, labels=labels)
    latent = flow.add("GMFlowEmptyLatent", model=model, batch_size=images).out
    return group, model, classes["positive"], classes["negative"], latent


def pixels(flow: Flow, drop: int = 0) -> Output:
    """The core's VAE for models that paint pixels: it only changes their range."""
    return flow.add("VAELoader", "No VAE: RGB pixels", vae_name="pixel_space", drop=drop).out


def enlarge(flow: Flow, latent: Output, vae: Output) -> Output:
    """A column of two nodes: pixels, large enough to be seen."""
    images = flow.add("VAEDecode", size=(240, 60), samples=latent, vae=vae).out
    return flow.add("ImageScaleBy", "Enlarge the pixels", size=(240, 90), under=True, image=images,
                    upscale_method="nearest-exact", scale_by=8.0).out


def quickstart(flow: Flow) -> None:
    flow.note("""
# Characters in four steps

The bundled model paints pictures of 24 x 24 pixels in sixteen kinds. It needs no download and no GPU.

Press **Run**: one of each kind.

### Try
- **labels**: *thumb*, or *planet, mood, 10-14*. Give one label for all images, or one for each image of \
**batch_size**.
- **steps**: 8 is finer; with 1 every pixel chooses by itself.
- **guidance**: 0 is the model alone, 0.4 is good here, 0.75 is strong. It is no CFG scale.
- **solver**: GM-SDE adds noise at every step, GM-ODE none.

*No VAE*: this model works on pixels. Models of Stable Diffusion's latents need its VAE there.
""", size=(340, 400))
    group, model, positive, negative, latent = start(flow, "0-15", 16)
    group = flow.group("Sample", right_of=group, color=GREEN)
    sampler = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=positive, negative=negative,
                       latent_image=latent, seed=1, steps=4, guidance=0.4)
    group = flow.group("To an image", right_of=group, color=PURPLE)
    images = enlarge(flow, sampler["latent"], pixels(flow))
    flow.group("Look and keep", right_of=group, color=BROWN)
    flow.add("PreviewImage", size=(440, 250), images=images)
    flow.add("SaveImage", size=(440, 290), images=images, filename_prefix="gmflow/quickstart")


def guidance_sweep(flow: Flow) -> None:
    flow.note("""
# Two kinds of guidance

Five rows, the same noise: compare one picture down its column.

**Probabilistic guidance** (rows 1 to 3) re-weights the mixture: components that the class makes likelier gain. \
0 is none.

**Vanilla CFG** (rows 4 and 5) moves every component by the difference to the unconditional mean, \
as Stable Diffusion's guidance does. 1 is none.

### See
- Guidance makes shapes plainer, and more alike. Colours may change.
- Strong vanilla CFG drives colours to their ends; probabilistic guidance keeps them.

### Try
- **orthogonal** 0: guidance may brighten too.
- **labels** *critter*: ten critters.
- **method** *probabilistic* in a GMFlow Guider gives the same as the rows above. \
Its **end_percent** 0.5 guides only the first half.
""", size=(340, 500))
    group, model, positive, _, latent = start(flow, TEN, 10)
    gutter, rows = group.right, []
    flow.around(latent.node, "model")

    def look(title: str, name: str, latents: Output) -> None:
        images = enlarge(flow, latents, pixels(flow, PASS))  # one for all would send its links through every row
        flow.add("SaveImage", title, size=(1560, 290), images=images, filename_prefix=f"gmflow/guidance/{name}")

    row = None
    for scale in (0.0, 0.4, 0.7):
        title = f"Probabilistic guidance {scale or '0: none'}"
        row = flow.group(title, across=True,
                         **(dict(right_of=group, pos=(None, 0), gap=200) if row is None else dict(below=row)))
        sampled = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=positive,
                           latent_image=latent, seed=7, steps=8, guidance=scale)
        look(title, f"probabilistic_{scale}", sampled["latent"])
        rows.append((sampled, sampled))

    common = flow.group("The same for both", pos=(group.pos[0], row.bottom + 40), color=GREEN)
    sigmas = flow.add("GMFlowScheduler", model=model, steps=8)
    noise = flow.add("RandomNoise", noise_seed=7).out
    sampler = flow.add("SamplerGMFlowODE").out
    guided = []
    for scale in (1.5, 4.0):
        title = f"Vanilla CFG {scale:g}"
        row = flow.group(title, below=row, across=True, color=PURPLE)
        guider = flow.add("GMFlowGuider", size=(300, 250), show_advanced=True, model=model, positive=positive,
                          method="vanilla CFG", cfg_scale=scale)
        sampled = flow.add("SamplerCustomAdvanced", size=(300, 130), under=True, noise=noise, guider=guider.out,
                           sampler=sampler, sigmas=sigmas.out, latent_image=latent)
        look(title, f"vanilla_{scale}", sampled["output"])
        rows.append((guider, sampled))
        guided.append(sampled)
        decoder, beside = flow.nodes[-3], sampled.pos[0] + sampled.size[0] + GAP
        flow.route(decoder, "samples", (beside, sampled["output"].height), (beside, decoder.socket("samples")))
    # The uppermost output has the line furthest right, so that none crosses another one's way there.
    for number, name in enumerate(("sampler", "noise", "sigmas")):
        flow.trunk(gutter + 70 + 22 * number, *((node, name) for node in guided))
    for number, name in enumerate(("latent_image", "positive", "model")):
        ends = [(sampled if name == "latent_image" else asked, name) for asked, sampled in rows]
        flow.trunk(gutter + 136 + 22 * number, *ends)
    above, left = common.pos[1] - 20, common.pos[0] - 20
    flow.route(sigmas, "model", (gutter + 40, model.height), (gutter + 40, above), (left, above),
               (left, sigmas.socket("model")))


def advanced_custom_sampling(flow: Flow) -> None:
    flow.note("""
# The parts of a sampler

What **GMFlow KSampler** does in one node, in parts for the core's *SamplerCustomAdvanced*: noise, guider, \
sampler and sigmas.

Four steps, the same noise, two solvers.

**Sampler GM-ODE** is deterministic: between two looks of the network it follows the mixture in many cheap substeps.

**Sampler GM-SDE** draws an image from the mixture at every step and noises it again. \
*spectral* draws neighbouring pixels together.

### Try
- **order** 1: the plain solvers.
- **temperature** 0.5: less variety.
- **spectral** off, with 2 steps.
- A core *CFGGuider* or *BasicGuider* for GMFlow Guider, or *KSamplerSelect* for a GM sampler: all fit.
- To inspect the mixture, use **GMFlow Sampler Custom**, which has a trace.
""", size=(340, 500))
    group, model, positive, negative, latent = start(flow, TEN, 10)
    group = flow.group("Noise, guidance, schedule", right_of=group, color=GREEN)
    noise = flow.add("RandomNoise", noise_seed=4).out
    guider = flow.add("GMFlowGuider", model=model, positive=positive, negative=negative, guidance=0.4).out
    sigmas = flow.add("GMFlowScheduler", model=model, steps=4).out
    vae = pixels(flow)
    solvers = [("GM-ODE: deterministic", "ode", "SamplerGMFlowODE", 320),
               ("GM-SDE: stochastic", "sde", "SamplerGMFlowSDE", 290)]
    row = None
    for title, name, solver, height in solvers:
        beside = dict(right_of=group, pos=(None, 0), gap=80) if row is None else dict(below=row)
        row = flow.group(title, across=True, color=PURPLE, **beside)
        sampler = flow.add(solver, size=(280, height), show_advanced=True).out
        sampled = flow.add("SamplerCustomAdvanced", size=(280, 130), under=True, noise=noise, guider=guider,
                           sampler=sampler, sigmas=sigmas, latent_image=latent)
        images = enlarge(flow, sampled["output"], vae)
        flow.add("SaveImage", title, size=(680, 380), images=images, filename_prefix=f"gmflow/custom/{name}")


def core_sampler_compat(flow: Flow) -> None:
    flow.note("""
# With the core's KSampler

A GMFlow model is an ordinary MODEL: the core sees a flow model that predicts the mixture's mean. \
Every sampler and scheduler runs.

Here *euler* and *dpmpp_2m* with **cfg** 1.5 are beside **GMFlow KSampler** with guidance 0.4. \
The same seed gives the same noise in all three.

### See
The core's samplers see only the mean; GM-ODE follows the whole mixture between the steps. \
With 8 steps they agree on most shapes.

### Try
- **steps** 2 everywhere: the mean blends the colours that are still possible. With 1 it is a grey blur, \
and GM-ODE gives every pixel a colour of its own.
- Another **sampler_name** or **scheduler**.
- **cfg** 1 is no guidance.
""", size=(340, 380))
    group, model, positive, negative, latent = start(flow, TEN, 10)
    vae = pixels(flow)
    column = dict(model=model, positive=positive, negative=negative, latent_image=latent, seed=1, steps=8)
    row = None
    for name in ("euler", "dpmpp_2m", "gm-ode"):
        ours = name == "gm-ode"
        beside = dict(right_of=group, pos=(None, 0), gap=80) if row is None else dict(below=row)
        row = flow.group("GMFlow KSampler" if ours else f"Core KSampler: {name}", across=True,
                         color=GREEN if ours else PURPLE, **beside)
        if ours:
            sampled = flow.add("GMFlowKSampler", size=(300, 400), guidance=0.4, **column)
        else:
            sampled = flow.add("KSampler", size=(300, 290), cfg=1.5, sampler_name=name, scheduler="simple",
                               denoise=1.0, **column)
        images = enlarge(flow, sampled.out, vae)
        flow.add("SaveImage", "GM-ODE" if ours else name, size=(620, 350 if ours else 290), images=images,
                 filename_prefix=f"gmflow/core/{name}")


def inpaint_and_img2img(flow: Flow) -> None:
    flow.note("""
# Change an image

**1**: four planets, from noise.

**2, inpaint**: *Set Latent Noise Mask* frees the white part of the mask, the planet itself; the class becomes *mood*. \
What the mask keeps stays exactly as it is: a face in the same sky.

**3, image to image**: the planets are noised to **denoise** 0.8 and painted again as moods.

### Try
- Another mask: **width**, **height**, **x** and **y** of the white part, in the model's pixels (24 x 24).
- **denoise** 0.3 keeps almost all, 0.9 almost nothing.
- Your own picture: *Load Image*, scaled to 24 x 24, and *VAE Encode* with the pixel VAE.
""", size=(340, 420))
    first = flow.group("Model", pos=(380, 0))
    model = flow.add("GMFlowLoader", model_name=CHARACTERS).out
    latent = flow.add("GMFlowEmptyLatent", model=model, batch_size=4).out
    vae = pixels(flow)

    # Lower than the rows' samplers, so that links to these pass above it.
    source = flow.group("1  Paint planets", right_of=first, gap=120, pos=(None, 140), color=GREEN)
    classes = flow.add("GMFlowClassConditioning", size=(300, 176), model=model, labels="planet")
    painter = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=classes["positive"],
                       latent_image=latent, seed=5, guidance=0.4)
    planets = painter["latent"]
    images = enlarge(flow, planets, vae)
    decoder = flow.nodes[-2]
    flow.add("SaveImage", "Planets", size=(300, 370), images=images, filename_prefix="gmflow/change/1_source")

    mask = flow.group("The mask: white is free", right_of=source, gap=120, pos=(None, 140), color=BROWN)
    keep = flow.add("SolidMask", "Keep (black)", value=0.0, width=SIZE, height=SIZE).out
    free = flow.add("SolidMask", "Free (white)", value=1.0, width=14, height=14).out
    where = flow.add("MaskComposite", "Where it is free", destination=keep, source=free, x=5, y=5, operation="add")

    def change(title: str, name: str, label: str, seed: int, group: dict, mask: Output | None = None,
               **settings) -> tuple:
        row = flow.group(title, across=True, color=PURPLE, **group)
        classes = flow.add("GMFlowClassConditioning", drop=110, model=model, labels=label)
        start, first = planets, None
        if mask is not None:
            first = flow.add("SetLatentNoiseMask", under=True, samples=planets, mask=mask)
            start = first.out
        sampler = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=classes["positive"],
                           latent_image=start, seed=seed, guidance=0.4, **settings)
        images = enlarge(flow, sampler["latent"], pixels(flow, PASS))
        flow.add("SaveImage", title[3:], size=(400, 450), images=images, filename_prefix=f"gmflow/change/{name}")
        return row, classes, first or sampler, sampler

    row, asked, masked, inpainter = change("2  Inpaint: a mood in its place", "2_inpainted", "mood", 6,
                                           dict(right_of=mask, gap=120, pos=(None, 0)), where.out)
    _, other, _, changer = change("3  Image to image: from planets to moods", "3_image_to_image", "mood", 5,
                                  dict(below=row, pos=(mask.pos[0], None)), denoise=0.8)

    one, two, three = first.right + 60, source.right, mask.right
    flow.trunk(one + 20, (classes, "model"), (painter, "model"))
    flow.trunk(one, (painter, "latent_image"))
    flow.trunk(one - 20, (decoder, "vae"))
    over, turn = model.height, (three + 80, model.height)
    flow.route(inpainter, "model", (one + 20, over), (two + 80, over), turn)
    flow.route(asked, "model", (one + 20, over), (two + 80, over), turn, (three + 80, asked.socket("model")))
    down = [(one + 20, over), (two + 80, over), (two + 80, changer.socket("model"))]
    flow.route(changer, "model", *down)
    flow.route(other, "model", *down, (two + 80, other.socket("model")))
    under = over + 22
    flow.route(masked, "samples", (two + 40, planets.height), (two + 40, under), (three + 40, under),
               (three + 40, masked.socket("samples")))
    flow.route(changer, "latent_image", (two + 40, planets.height), (two + 40, changer.socket("latent_image")))
    flow.around(where, "destination")


def inspect_components(flow: Flow) -> None:
    flow.note("""
# What is the model undecided between?

At every pixel the network predicts a mixture of eight Gaussians, not one colour. **GMFlow Inspector** shows it, \
at any step of a sampler's **trace**.

**Components**: at step 0, in pure noise, hypotheses are other grounds and other bodies. \
Three steps on one of each has nearly all the weight. A hypothesis keeps its number and colour.

**Entropy**: bright where the model is undecided.

**All steps**: the image, the entropy and the weight of every hypothesis from noise to image.

After a run, move the **pointer** over an inspector's small picture: that pixel's components.

### Try
- **seed**, **labels**, **step** (-1 is the last), other **view**s.
- **guidance** 0 in the sampler: more stays open.
- **image**: which one of the batch; a trace keeps the first four.
- **order** raw: how the network numbers them.

Changing only an inspector samples no new image.
""", size=(340, 560))
    group, model, positive, negative, latent = start(flow, "critter", 1)
    group = flow.group("Sample", right_of=group, color=BROWN)
    sampled = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=positive, negative=negative,
                       latent_image=latent, seed=2, steps=8, guidance=0.4)
    images = enlarge(flow, sampled["latent"], pixels(flow))
    flow.add("SaveImage", "The image", size=(300, 380), images=images, filename_prefix="gmflow/inspect")
    panel = dict(size=(620, 830), trace=sampled["trace"])
    group = flow.group("Components: the choices, and what becomes of them", right_of=group, across=True, color=PURPLE)
    for step in (0, 3, 6):
        flow.add("GMFlowInspector", f"Components at step {step}", step=step, view="components", **panel)
    flow.group("Where the choices are", below=group, across=True, color=GREEN)
    flow.add("GMFlowInspector", "Entropy at step 3", step=3, view="entropy", **panel)
    last = flow.add("GMFlowInspector", "All steps", step=3, view="timeline", **panel)
    flow.add("PreviewAny", "Numbers of every step (JSON)", size=(620, 830), source=last["statistics"])


def paint_a_hint(flow: Flow) -> None:
    flow.note("""
# One painted pixel decides the colour

Ten pictures, the same noise twice. Above: as the model likes. Below: **one pixel** of each is said to be pink, \
and the whole body follows.

**GMFlow Hint** takes a picture and a mask of where it is known. **GMFlow Apply Evidence** makes a model that paints \
what agrees with it. No training, no gradients: the hint re-weights the mixture, and an *echo*, one more call of the \
network a step, carries it to the other pixels.

### Paint it yourself
Put *Load Image* for the two nodes *The colour* and *The pixel* (its image and its mask): *Open in Mask Editor* in its \
menu paints the mask. Newer versions have a *Painter* node for both (with Nodes 2.0 switched on). Any size of the \
image's shape will do.

### Try
- **propagate** off: only the pixel itself is asked for, and it gets lost.
- **kind** hue, with *the pixel* as large as the picture and **std** 1: all in this colour.
- A rough sketch: **std** 0.3 to 1 and **end_percent** 0.2.
- **color** of *The colour*, **x** and **y** of the pixel.
""", size=(340, 620))
    group, model, positive, negative, latent = start(
        flow, "blob, clay, critter, marble, mood, planet, sprout, voxel person, voxel robot, waves", 10)
    hint = flow.group("The hint", below=group, color=BROWN)
    colour = flow.add("EmptyImage", "The colour", width=SIZE, height=SIZE, color=0xF078A0).out
    nothing = flow.add("SolidMask", "Nothing is known (black)", value=0.0, width=SIZE, height=SIZE).out
    pixel = flow.add("SolidMask", "The pixel (white)", value=1.0, width=1, height=1).out
    mask = flow.add("MaskComposite", "Where it is", destination=nothing, source=pixel, x=12, y=14, operation="add").out
    evidence = flow.add("GMFlowHint", image=colour, mask=mask).out
    hinted = flow.add("GMFlowApplyEvidence", model=model, evidence=evidence).out
    vae = pixels(flow)
    row = None
    for title, name, used in (("Without the hint", "without", model), ("With it", "with", hinted)):
        beside = dict(right_of=hint, pos=(None, 0), gap=80) if row is None else dict(below=row)
        row = flow.group(title, across=True, color=GREEN if row is None else PURPLE, **beside)
        sampled = flow.add("GMFlowKSampler", size=(300, 400), model=used, positive=positive, negative=negative,
                           latent_image=latent, seed=1, guidance=0.4)
        images = enlarge(flow, sampled["latent"], vae)
        flow.add("SaveImage", title, size=(700, 370), images=images, filename_prefix=f"gmflow/hint/{name}")


def choose_a_hypothesis(flow: Flow) -> None:
    flow.note("""
# Look at the choices, take another one

Before the first step the model has decided neither on a ground nor on a body: **GMFlow Inspector** shows its \
hypotheses, each with a number.

**GMFlow Choose** takes one of them by its number and asks for its colour; the same noise then becomes such a critter.

### Try
- **hypothesis**: the other numbers of the panel. One of the ground changes the ground.
- **where** everywhere: the whole picture in its colour.
- **strength**: 1 asks, 5 insists.
- **seed** and **labels** in all nodes that have them.
""", size=(340, 380))
    group, model, positive, negative, latent = start(flow, "critter", 1)
    vae = pixels(flow)
    column = dict(positive=positive, negative=negative, latent_image=latent, seed=2, steps=8, guidance=0.4)
    first = flow.group("As the model likes", right_of=group, color=GREEN)
    sampled = flow.add("GMFlowKSampler", size=(300, 400), model=model, **column)
    flow.add("SaveImage", "As the model likes", size=(300, 370), images=enlarge(flow, sampled["latent"], vae),
             filename_prefix="gmflow/choose/first")
    look = flow.group("The choices at step 0", right_of=first, color=PURPLE)
    flow.add("GMFlowInspector", "Hypotheses at step 0", size=(620, 830), trace=sampled["trace"], step=0,
             view="components")
    ask = flow.group("Take another one", right_of=look, color=BROWN)
    chosen = flow.add("GMFlowChoose", trace=sampled["trace"], step=0, hypothesis=CHOSEN).out
    other = flow.add("GMFlowApplyEvidence", model=model, evidence=chosen).out
    again = flow.add("GMFlowKSampler", size=(300, 400), model=other, **column)
    flow.group("The chosen one", right_of=ask, color=GREEN)
    flow.add("SaveImage", "The chosen one", size=(300, 370), images=enlarge(flow, again["latent"], vae),
             filename_prefix="gmflow/choose/chosen")


def colourise_and_enlarge(flow: Flow) -> None:
    flow.note("""
# From grey, and from 6 x 6 pixels

**1**: ten pictures, which we take for real ones.

**2, colourise**: of each only its brightness is told. Many colours are equally bright; the mixture takes one of them \
instead of their mean.

**3, enlarge**: of each only a picture of 6 x 6 pixels is told.

For both, **propagate** off is enough: every pixel has evidence of its own.

### Try
- Your own picture: *Load Image* and *ImageScale* to 24 x 24 (grey) or to 6 x 6.
- Both kinds together: **previous**.
- **labels** of the second model: what if a mood is to be a critter?
""", size=(340, 420))
    group, model, positive, negative, latent = start(flow, TEN, 10)
    vae = pixels(flow)
    common = dict(positive=positive, negative=negative, latent_image=latent, guidance=0.4)
    first = flow.group("1  Pictures", right_of=group, color=GREEN)
    sampled = flow.add("GMFlowKSampler", size=(300, 400), model=model, seed=3, **common)
    truth = flow.add("VAEDecode", size=(240, 60), samples=sampled["latent"], vae=vae).out
    small = flow.add("ImageScale", "6 x 6 pixels", under=True, image=truth, upscale_method="area", width=6, height=6,
                     crop="disabled").out
    large = flow.add("ImageScaleBy", "Enlarge the pixels", size=(240, 90), under=True, image=truth,
                     upscale_method="nearest-exact", scale_by=8.0).out
    flow.add("SaveImage", "Pictures", size=(560, 330), images=large, filename_prefix="gmflow/colourise/1_pictures")
    grey = flow.add("GMFlowHint", "Only their brightness", image=truth, kind="brightness").out
    tiny = flow.add("GMFlowSmallPicture", image=small).out
    row = None
    for title, name, evidence in (("2  Colourised", "2_colourised", grey), ("3  Enlarged", "3_enlarged", tiny)):
        beside = dict(right_of=first, pos=(None, 0), gap=80) if row is None else dict(below=row)
        row = flow.group(title, across=True, color=PURPLE, **beside)
        used = flow.add("GMFlowApplyEvidence", model=model, evidence=evidence, propagate=False).out
        found = flow.add("GMFlowKSampler", size=(300, 400), model=used, seed=8, **common)
        images = enlarge(flow, found["latent"], vae)
        flow.add("SaveImage", title[3:], size=(560, 330), images=images, filename_prefix=f"gmflow/colourise/{name}")


def imagenet_gmdit(flow: Flow) -> None:
    repo, vae_repo = ("https://huggingface.co/Lakonik/gmflow_imagenet_k8_ema",
                      "https://huggingface.co/stabilityai/sd-vae-ft-mse-original")
    weights, vae_file = "diffusion_pytorch_model.bf16.safetensors", "vae-ft-mse-840000-ema-pruned.safetensors"
    name = "gmflow_imagenet_k8_ema.safetensors"
    flow.note(f"""
# ImageNet, 256 x 256

The published GM-DiT (676 million parameters, 8 components, 1000 classes). It is not part of this pack; \
two files are needed:

| file | folder |
| --- | --- |
| [{name}]({repo}/resolve/main/transformer/{weights}) | models/diffusion_models |
| [{vae_file}]({vae_repo}/resolve/main/{vae_file}) | models/vae |

The first is called *{weights}* there: **rename** it to *{name}*.

### Try
- **class_name**: click and type. For several classes at once use **GMFlow Class Conditioning**: *207, tabby cat*.
- **steps** 32 for the best quality, 4 for speed.
- **guidance** 0.45 is the published default.
- **solver** GM-SDE: its spectral sampling needs the repository's *spectrum_net* too. \
Download the [whole repository]({repo}) and make one file of it: *python -m gmflow_core convert FOLDER {name}*.
""", size=(440, 460))
    group = flow.group("Model and class", pos=(480, 0))
    model = flow.add("GMFlowLoader", size=(400, 114), model_name=name, models=[
        {"name": name, "url": f"{repo}/resolve/main/transformer/{weights}", "directory": "diffusion_models"},
    ]).out
    classes = flow.add("GMFlowImageNetClass", size=(400, 90), class_name="207 golden retriever")
    latent = flow.add("GMFlowEmptyLatent", size=(400, 90), model=model, batch_size=2).out
    vae = flow.add("VAELoader", "VAE of Stable Diffusion 1", size=(400, 70), vae_name=vae_file, models=[
        {"name": vae_file, "url": f"{vae_repo}/resolve/main/{vae_file}", "directory": "vae"},
    ]).out
    group = flow.group("Sample", right_of=group, color=GREEN)
    sampled = flow.add("GMFlowKSampler", size=(300, 400), model=model, positive=classes["positive"],
                       negative=classes["negative"], latent_image=latent, seed=42, steps=8, guidance=0.45)
    flow.group("Decode and save", right_of=group, across=True, color=PURPLE)
    images = flow.add("VAEDecode", samples=sampled["latent"], vae=vae, size=(220, 60)).out
    flow.add("SaveImage", size=(560, 400), images=images, filename_prefix="gmflow/imagenet")


WORKFLOWS = [
    quickstart, guidance_sweep, advanced_custom_sampling, core_sampler_compat, inpaint_and_img2img,
    inspect_components, paint_a_hint, choose_a_hypothesis, colourise_and_enlarge, imagenet_gmdit,
    *text_to_image.WORKFLOWS,
]


def make(info: dict) -> list[Flow]:
    """All workflows, by the node definitions ``info``."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packs = {"": {"cnr_id": project["name"], "ver": project["version"]},
             "core": {"cnr_id": "comfy-core", "ver": "0.3.64"}}
    flows = []
    for describe in WORKFLOWS:
        flows.append(Flow(describe.__name__, info, packs))
        describe(flows[-1])
    return flows


def dump(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def written(flows: list[Flow]) -> dict[Path, str]:
    """Every file that belongs to the workflows, with its text."""
    return {HERE / f"{flow.name}.json": dump(flow.ui()) for flow in flows} | {
        HERE / "api" / f"{flow.name}.json": dump(flow.api()) for flow in flows
    }


def fetch(url: str) -> dict:
    with urllib.request.urlopen(f"{url.rstrip('/')}/object_info", timeout=60) as answer:
        return json.load(answer)


def reduced(info: dict, flows: list[Flow]) -> dict:
    """The definitions of the nodes in use, without prose; long lists of names hold the names in use."""
    used, kept = [node for flow in flows for node in flow.nodes], {}
    for name in sorted({node.class_type for node in used}):
        definition = {key: info[name][key] for key in (
            "input", "input_order", "output", "output_is_list", "output_name", "name", "display_name", "output_node")}
        definition["input"] = {
            section: {key: spec if isinstance(spec, str)
                      else [spec[0], *({k: v for k, v in f.items() if k != "tooltip"} for f in spec[1:])]
                      for key, spec in inputs.items()}
            for section, inputs in definition["input"].items()
        }
        for key, (spec, _) in inputs_of(definition).items():
            if (name, key) in LISTED:
                names = sorted({node.widgets[key] for node in used if node.class_type == name})
                if isinstance(spec[0], list):
                    spec[0] = names
                else:
                    spec[1]["options"] = names
        kept[name] = definition
    return kept


def differences(info: dict, other: dict) -> list[str]:
    """What ``other`` defines differently from the snapshot ``info``, as far as it changes a workflow's file."""
    found = []
    for name, ours in info.items():
        theirs = other.get(name)
        if theirs is None:
            found.append(f"{name}: not there")
            continue
        for key in ("output", "output_name"):
            if ours[key] != theirs[key][:len(ours[key])]:  # outputs added at the end disturb no link
                found.append(f"{name}: {key} {ours[key]} / {theirs[key]}")
        a, b = inputs_of(ours), inputs_of(theirs)
        if list(a) != list(b):
            found.append(f"{name}: inputs {list(a)} / {list(b)}")
        for key in a.keys() & b.keys():
            (mine, _), (other_spec, _) = a[key], b[key]
            own, others = options(mine), options(other_spec)
            if (own is None) != (others is None) or (own is None and mine[0] != other_spec[0]):
                found.append(f"{name}.{key}: {mine[0]} / {other_spec[0]}")
            elif own and (name, key) not in LISTED and (missing := set(own) - set(others)):
                found.append(f"{name}.{key}: lacks {sorted(missing)}")
            for hint in ("min", "max", "default", "control_after_generate"):
                if (name, key) not in LISTED and fields(mine).get(hint) != fields(other_spec).get(hint):
                    found.append(f"{name}.{key}: {hint} {fields(mine).get(hint)} / {fields(other_spec).get(hint)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflows.build", description="Make the example workflows.")
    parser.add_argument("--snapshot", metavar="URL", help="renew tests/data/object_info.json from this ComfyUI")
    parser.add_argument("--compare", metavar="URL", help="only say what this ComfyUI defines differently")
    arguments = parser.parse_args()
    if arguments.compare:
        found = differences(json.loads(SNAPSHOT.read_text(encoding="utf-8")), fetch(arguments.compare))
        print("\n".join(found) or "no difference")
        return bool(found)
    if arguments.snapshot:
        info = fetch(arguments.snapshot)
        # One definition a line: a change is seen at a glance.
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in reduced(info, make(info)).items())
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for path, text in written(make(json.loads(SNAPSHOT.read_text(encoding="utf-8")))).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
