"""A custom node pack of the tests' own: what other people's packs wrap around samplers, guiders and networks.

Each node does one thing that a well-known pack does, as plainly as possible.
"""

from itertools import pairwise

import comfy.samplers
import torch

STRENGTH = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})
COUNTS = {"attention": 0}


class Wrapper:
    """A node that takes one thing, wraps it and passes it on."""

    KIND, FUNCTION, CATEGORY = "MODEL", "wrap", "tests"

    def __init_subclass__(cls):
        cls.RETURN_TYPES = (cls.KIND,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {cls.KIND.lower(): (cls.KIND,), "strength": STRENGTH}}


class SamplerWrapper(Wrapper):
    """A sampler that gives another one a changed model, as Detail Daemon and Lying Sigma do."""

    KIND = "SAMPLER"

    def wrap(self, sampler, strength):
        def sample(model, x, sigmas, **kwargs):
            def changed(x, sigma, **rest):
                return self.call(model, x, sigma, strength, **rest)

            changed.inner_model, changed.sigmas = model.inner_model, sigmas
            return sampler.sampler_function(changed, x, sigmas, **kwargs, **sampler.extra_options)

        return (comfy.samplers.KSAMPLER(sample, {}, sampler.inpaint_options),)


class TestOtherSigma(SamplerWrapper):
    """The network sees another sigma."""

    def call(self, model, x, sigma, strength, **rest):
        return model(x, sigma * (1 - 0.1 * strength), **rest)


class TestOtherAnswer(SamplerWrapper):
    """The sampler sees another answer."""

    def call(self, model, x, sigma, strength, **rest):
        return model(x, sigma, **rest) + 0.1 * strength


class TestWritesToX(SamplerWrapper):
    """Asks twice a step and leaves another x in the sampler's hands, as LanPaint does."""

    def call(self, model, x, sigma, strength, **rest):
        model(x, sigma, **rest)
        x.mul_(1 + 0.1 * strength)
        return model(x, sigma, **rest)


class TestAsksAgain(Wrapper):
    """A post-CFG function that evaluates the network once more, perturbed, under the same id, as PAG and its kin do."""

    def wrap(self, model, strength):
        def post(args):
            (other,) = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"] + 0.5, args["sigma"], args["model_options"].copy()
            )
            return args["denoised"] + 0.1 * strength * (args["cond_denoised"] - other)

        model = model.clone()
        model.set_model_sampler_post_cfg_function(post)
        return (model,)


class TestMomentum(Wrapper):
    """State kept in model_options from step to step, as Momentum Guidance does."""

    def wrap(self, model, strength):
        def post(args):
            kept = args["model_options"].setdefault("test_momentum", {})
            before = kept.get("mean", args["denoised"])
            kept["mean"] = args["denoised"]
            return args["denoised"] + strength * (args["denoised"] - before)

        model = model.clone()
        model.set_model_sampler_post_cfg_function(post)
        return (model,)


class TestScale(Wrapper):
    """A CFG function that says what scale it was given."""

    def wrap(self, model, strength):
        def post(args):
            return args["denoised"] + 0.1 * strength * args["cond_scale"]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(post)
        return (model,)


class TestReplacesCFG(Wrapper):
    """A CFG function of its own."""

    def wrap(self, model, strength):
        def cfg(args):
            return args["uncond"] + strength * args["cond_scale"] * (args["cond"] - args["uncond"])

        model = model.clone()
        model.set_model_sampler_cfg_function(cfg)
        return (model,)


class TestOtherNetwork(Wrapper):
    """A wrapper of the network's call that changes its answer."""

    def wrap(self, model, strength):
        def call(apply_model, args):
            return apply_model(args["input"], args["timestep"], **args["c"]) + 0.1 * strength

        model = model.clone()
        model.set_model_unet_function_wrapper(call)
        return (model,)


class TestTiles(Wrapper):
    """The network sees quarters of the image, one after another, as MultiDiffusion does."""

    def wrap(self, model, strength):
        def call(apply_model, args):
            rows = []
            for row in args["input"].chunk(2, dim=2):
                rows.append(
                    torch.cat([apply_model(part, args["timestep"], **args["c"]) for part in row.chunk(2, dim=3)], dim=3)
                )
            return torch.cat(rows, dim=2)

        model = model.clone()
        model.set_model_unet_function_wrapper(call)
        return (model,)


class TestAttention(Wrapper):
    """An attention override, as packs of faster attention install one."""

    def wrap(self, model, strength):
        def attention(original, *args, **kwargs):
            COUNTS["attention"] += 1
            return original(*args, **kwargs) * (1 + 0.1 * strength)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = attention
        return (model,)


class TestCompile(Wrapper):
    """The core's TorchCompileModel with a backend that does not compile."""

    def wrap(self, model, strength):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return (model,)


class TestSplit(Wrapper):
    """A sampler that runs another one step by step, as two-sampler nodes do."""

    KIND = "SAMPLER"

    def wrap(self, sampler, strength):
        def sample(model, x, sigmas, **kwargs):
            for pair in pairwise(sigmas):
                x = sampler.sampler_function(model, x, torch.stack(pair), **kwargs, **sampler.extra_options)
            return x

        return (comfy.samplers.KSAMPLER(sample, {}, sampler.inpaint_options),)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (
        TestOtherSigma, TestOtherAnswer, TestWritesToX, TestAsksAgain, TestMomentum, TestScale, TestReplacesCFG,
        TestOtherNetwork, TestTiles, TestAttention, TestCompile, TestSplit,
    )
}
