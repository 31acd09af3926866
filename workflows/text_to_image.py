"""Workflows of text-to-image models with a mixture adapter. Their files are downloads: names, folders and addresses
are those of ComfyUI's own templates, and of the adapters' repositories."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Flow, Group, Output

HUB = "https://huggingface.co"
GREEN, PURPLE = "#4a7a4a", "#6d5a96"


@dataclass(frozen=True)
class File:
    """A file to download: its name, its folder below models/, its address."""

    name: str
    directory: str
    url: str

    @property
    def models(self) -> list[dict]:
        return [{"name": self.name, "url": self.url, "directory": self.directory}]


def adapter(repository: str, name: str) -> File:
    return File(f"{name}.safetensors", "loras",
                f"{HUB}/Lakonik/{repository}/resolve/main/{name}/diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Base:
    """A model and what it needs. ``encoders``: the loader of its text encoders, its files by input, its type."""

    title: str
    steps: int
    licence: str
    base: File
    adapter: File
    vae: File
    latent: str
    encoders: tuple[str, dict[str, File], str]

    @property
    def files(self) -> list[File]:
        return [self.base, self.adapter, *self.encoders[1].values(), self.vae]


FLUX1 = Base(
    "FLUX.1 dev", 4, "FLUX.1 [dev] Non-Commercial License, for the model and for the adapter",
    File("flux1-dev.safetensors", "diffusion_models", f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    adapter("pi-FLUX.1", "gmflux_k8_piid_4step"),
    File("ae.safetensors", "vae",
         f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"),
    "EmptySD3LatentImage",
    ("DualCLIPLoader", {
        "clip_name1": File("clip_l.safetensors", "text_encoders",
                           f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"),
        "clip_name2": File("t5xxl_fp16.safetensors", "text_encoders",
                           f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors"),
    }, "flux"),
)
QWEN_FILES = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
QWEN = Base(
    "Qwen-Image", 4, "the model's is Apache-2.0; see the adapter's own card",
    File("qwen_image_fp8_e4m3fn.safetensors", "diffusion_models",
         f"{QWEN_FILES}/diffusion_models/qwen_image_fp8_e4m3fn.safetensors"),
    adapter("pi-Qwen-Image", "gmqwen_k8_piid_4step"),
    File("qwen_image_vae.safetensors", "vae", f"{QWEN_FILES}/vae/qwen_image_vae.safetensors"),
    "EmptySD3LatentImage",
    ("CLIPLoader", {"clip_name": File("qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders",
                                      f"{QWEN_FILES}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")},
     "qwen_image"),
)
FLUX2_FILES = f"{HUB}/Comfy-Org/flux2-dev/resolve/main/split_files"
FLUX2 = Base(
    "FLUX.2 dev", 8, "FLUX [dev] Non-Commercial License, for the model and for the adapter",
    File("flux2_dev_fp8mixed.safetensors", "diffusion_models",
         f"{FLUX2_FILES}/diffusion_models/flux2_dev_fp8mixed.safetensors"),
    adapter("pi-FLUX.2", "gmflux2_k8_piid_4step"),
    File("flux2-vae.safetensors", "vae", f"{FLUX2_FILES}/vae/flux2-vae.safetensors"),
    "EmptyFlux2LatentImage",
    ("CLIPLoader", {"clip_name": File("mistral_3_small_flux2_fp8.safetensors", "text_encoders",
                                      f"{FLUX2_FILES}/text_encoders/mistral_3_small_flux2_fp8.safetensors")}, "flux2"),
)
LISTED = {("UNETLoader", "unet_name"), ("GMFlowApplyAdapter", "adapter_name"), ("DualCLIPLoader", "clip_name1"),
          ("DualCLIPLoader", "clip_name2"), ("CLIPLoader", "clip_name")}


def note(base: Base, title: str, text: str) -> str:
    rows = "\n".join(f"| [{file.name}]({file.url}) | models/{file.directory} |" for file in base.files)
    return f"""
# {title}

{text}

| file | folder |
| --- | --- |
{rows}

The adapter is called *diffusion_pytorch_model.safetensors* there: **rename** it as above.

Licence: {base.licence}.
"""


def start(flow: Flow, base: Base, prompt: str) -> tuple[Group, Output, Output, Output, Output]:
    """Model with its adapter, text, empty latent and VAE."""
    group = flow.group("Model and adapter", pos=(540, 0))
    model = flow.add("UNETLoader", size=(340, 90), unet_name=base.base.name, weight_dtype="default",
                     models=base.base.models).out
    model = flow.add("GMFlowApplyAdapter", size=(340, 130), model=model, adapter_name=base.adapter.name,
                     models=base.adapter.models).out
    loader, files, kind = base.encoders
    names = {name: file.name for name, file in files.items()}
    clip = flow.add(loader, size=(340, 130), type=kind, device="default", **names,
                    models=[entry for file in files.values() for entry in file.models]).out
    vae = flow.add("VAELoader", size=(340, 60), vae_name=base.vae.name, models=base.vae.models).out
    group = flow.group("Text and size", right_of=group)
    text = flow.add("CLIPTextEncode", size=(340, 160), clip=clip, text=prompt).out
    latent = flow.add(base.latent, size=(340, 110), width=1024, height=1024, batch_size=1).out
    return group, model, text, latent, vae


def paint(flow: Flow, base: Base, title: str) -> None:
    """The plain workflow of a base."""
    flow.note(note(base, title, f"{base.title} in {base.steps} steps, as a Gaussian mixture. None of its files comes "
                                "with this pack.") + f"""
### Try
- **steps** {'4 to 8; 0 takes what the adapter recommends' if base is not FLUX1
            else '4. At 8 steps use the file gmflux_k8_piid_8step, and no other'}.
- A **LoRA** before or after the adapter: *Load LoRA (Model only)*.
- A **negative** text with **guidance** 0.2: probabilistic guidance, at twice the time.
- **GMFlow Inspector** on the trace: what the model is undecided about.
""", size=(500, 560))
    group, model, text, latent, vae = start(flow, base, "a red fox in the snow, a small wooden sign says GMFlow")
    group = flow.group("Sample", right_of=group, color=GREEN)
    sampled = flow.add("GMFlowKSampler", size=(300, 380), model=model, positive=text, latent_image=latent, seed=42,
                       steps=base.steps, guidance=0.0, order=1)
    flow.group("Decode and save", right_of=group, across=True, color=PURPLE)
    images = flow.add("VAEDecode", samples=sampled["latent"], vae=vae, size=(220, 60)).out
    flow.add("SaveImage", size=(480, 480), images=images, filename_prefix="gmflow/text")


def text_to_image_flux1(flow: Flow) -> None:
    paint(flow, FLUX1, "FLUX.1 in four steps")


def text_to_image_qwen(flow: Flow) -> None:
    paint(flow, QWEN, "Qwen-Image in four steps")


def text_to_image_flux2(flow: Flow) -> None:
    paint(flow, FLUX2, "FLUX.2 in eight steps")


def what_flux_is_undecided_about(flow: Flow) -> None:
    flow.note(note(FLUX1, "What FLUX is undecided about", "After its first step the model has seen nothing but noise. "
                   "Its mixture says between what it hesitates, and where.") + """
### Try
- **step** of the inspectors: 0 is the first; by the last one nothing is left to decide.
- **view** *weights*, *entropy*, *timeline*, *sheet*.
- Another **text**: the vaguer it is, the more is undecided.
- Without a **vae** the inspector paints in rough colours, and is much faster.
""", size=(500, 600))
    group, model, text, latent, vae = start(flow, FLUX1, "an animal on a chair")
    group = flow.group("Sample", right_of=group, color=GREEN)
    sampled = flow.add("GMFlowKSampler", size=(300, 380), model=model, positive=text, latent_image=latent, seed=42,
                       steps=4, guidance=0.0, order=1)
    flow.group("Look inside", right_of=group, across=True, color=PURPLE)
    for view, step in (("components", 0), ("entropy", 0)):
        panel = flow.add("GMFlowInspector", size=(420, 560), trace=sampled["trace"], vae=vae, view=view, step=step)
        flow.add("SaveImage", size=(420, 420), images=panel["panel"], filename_prefix=f"gmflow/undecided_{view}")


WORKFLOWS = [text_to_image_flux1, text_to_image_qwen, text_to_image_flux2, what_flux_is_undecided_about]
