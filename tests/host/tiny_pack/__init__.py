"""Test-only nodes: pi-Flow's tiny random models where ComfyUI's loaders and text encoders need the real ones."""

import torch

from . import tiny


class TinyBase:
    """In the place of Load Diffusion Model."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (tiny.NAMES,), "dtype": (["float32", "bfloat16", "float8_e4m3fn"],)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "tests"

    def load(self, name, dtype="float32"):
        return (tiny.base(name, getattr(torch, dtype)),)


class TinyText:
    """In the place of CLIP Text Encode: one row of the stored conditionings."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (tiny.NAMES,), "row": ("INT", {"default": 0, "min": 0, "max": 1})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "tests"

    def encode(self, name, row=0):
        return (tiny.conditioning(name, row),)


class TinyVAE:
    """In the place of Load VAE: random weights, of the kind of VAE that this model has."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (tiny.NAMES,)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "get", "tests"

    def get(self, name):
        return (tiny.vae(name),)


class TinyEncoder:
    """In the place of Load VAE: ComfyUI's own VAE, a TAESD of random weights, in the layout of a base's latents;
    or one that fails as in half precision."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"layout": (["SD", "NaN", *tiny.NAMES],)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "get", "tests"

    def get(self, layout):
        return (tiny.encoder(layout),)


class TinyNoise:
    """In the place of RandomNoise: the stored noise."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (tiny.NAMES,)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("NOISE",), "get", "tests"

    def get(self, name):
        return (StoredNoise(name),)


class StoredNoise:
    seed = 0

    def __init__(self, name):
        self.name = name

    def generate_noise(self, latent):
        return tiny.io(self.name)["sample_noise"].reshape(latent["samples"].shape)


class TinyRecord:
    """A SAMPLER that also saves x at every step and at the end, in the network's own scale."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler": ("SAMPLER",), "path": ("STRING", {"default": ""})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "wrap", "tests"

    def wrap(self, sampler, path):
        import comfy.samplers
        from safetensors.torch import save_file

        inner = sampler.sampler_function

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **kwargs):
            seen = []

            def record(state):
                seen.append(state["x"].clone())
                if callback is not None:
                    callback(state)

            result = inner(model, x, sigmas, extra_args=extra_args, callback=record, disable=disable, **kwargs)
            save_file({"x_src": torch.stack(seen), "sigmas": sigmas.cpu(), "final": result}, path)
            return result

        return (comfy.samplers.KSAMPLER(sample, sampler.extra_options, sampler.inpaint_options),)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TinyBase, TinyText, TinyVAE, TinyEncoder,
                                                       TinyNoise, TinyRecord)}

tiny.write_files()
