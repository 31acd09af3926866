"""Runs inside ComfyUI's Python: what a MODEL with an adapter does to the MODEL it came from, and the other way round.

``inside_adapter.py PACK NAME [TASK ...]``; prints one JSON object: what each task found, or its traceback under
"error". The pack is loaded as inside.py loads it.
"""

import asyncio
import copy
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

ROOT, NAME, *CHOSEN = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
# As main.py does first: nodes.py puts comfy/, which has a utils.py, before it.
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_api.latest  # noqa: E402,F401
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import utils.extra_config  # noqa: E402,F401
from einops import rearrange  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes as core  # noqa: E402

sys.path.append(str(Path(__file__).parent / "tiny_pack"))
import tiny  # noqa: E402

IO = tiny.io(NAME)
ADAPTER = tiny.DATA / NAME / "adapter" / tiny.WEIGHTS
HEAD = "proj_out" if NAME == "gmqwen_tiny" else "final_layer.linear"
MODULATION = "norm_out.linear" if NAME == "gmqwen_tiny" else "final_layer.adaLN_modulation.1"
# The adapter's LoRA is here too.
BOTH = "transformer_blocks.0.img_mlp.net.2" if NAME == "gmqwen_tiny" else "double_blocks.0.img_mlp.2"
LOG = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(LOG))


def load_pack():
    spec = importlib.util.spec_from_file_location("a-pack", f"{ROOT}/__init__.py", submodule_search_locations=[ROOT])
    module = sys.modules["a-pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())


load_pack()
host, host_adapter, capture = (import_module(f"a-pack.nodes.{name}") for name in ("host", "host_adapter", "capture"))
unpack = import_module("a-pack.gmflow_core.model").unpack_mixture


def adapted(model, strength=1.0):
    return host_adapter.apply_adapter(model, str(ADAPTER), strength)


def latent(t):
    return t.unsqueeze(2) if NAME == "gmqwen_tiny" else t


class Ask(comfy.samplers.CFGGuider):
    """A guider that only asks the network, once, at its own x and sigma: (denoised, packed mixture or None)."""

    def ask(self, x, sigma):
        self.answer = None

        def sampler(model, noise, sigmas, extra_args=None, callback=None, disable=None):
            options, timestep = extra_args["model_options"], sigma.expand(len(x))
            info = self.model_patcher.get_attachment("gmflow")
            found = capture.Capture(x if info is None else info.enter(x), timestep)
            with capture.capturing(options, found):
                denoised = self(x, timestep, model_options=options)
            packed = [found.packed.get(cond["uuid"]) for cond in self.conds["positive"]]
            self.answer = denoised.clone(), None if packed[0] is None else packed[0].clone()
            return noise

        zeros = torch.zeros_like(x)
        self.sample(zeros, zeros, comfy.samplers.KSAMPLER(sampler), torch.tensor([float(sigma.flatten()[0]), 0.0]),
                    disable_pbar=True)
        return self.answer


def ask(model, x=None, sigma=None, row=0, cfg=1.0, negative=None, **extras):
    """The mean velocity in the base's latent, and the packed mixture, of one row."""
    x = latent(IO["x"][row : row + 1]) if x is None else x
    sigma = IO["sigma"][row : row + 1] if sigma is None else sigma
    positive = tiny.conditioning(NAME, row)
    positive[0][1].update(extras)
    guider = Ask(model)
    guider.set_conds(positive, tiny.conditioning(NAME, row) if negative is None else negative)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        denoised, packed = guider.ask(x, sigma)
    return (x - denoised) / sigma.reshape(-1, *[1] * (x.ndim - 1)), packed


def difference(a, b) -> float:
    return (a.float().reshape(b.shape) - b).abs().max().item()


def against_authors(packed, rows=(0, 1)) -> dict:
    mixture = unpack(packed, 8)
    names = {"means": "means", "log_weights": "logweights", "log_std": "logstds"}
    return {ours: difference(getattr(mixture, ours), torch.cat([IO[theirs][r : r + 1] for r in rows]))
            for ours, theirs in names.items()}


def mixtures() -> dict:
    """Both stored rows, against the authors' network."""
    model = adapted(tiny.base(NAME))
    return {str(row): against_authors(ask(model, row=row)[1], (row,)) for row in (0, 1)}


def alternating() -> dict:
    """A, base, B three times, then unloaded: everything as at first, bit for bit; also the base's own tensors."""
    base = tiny.base(NAME)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    plain = ask(base)[0]
    models = {"A": adapted(base), "base": base, "B": adapted(base, 0.5)}
    first = {name: ask(model) for name, model in models.items()}
    same = [torch.equal(first["base"][0], plain), not torch.equal(first["A"][0], first["B"][0])]
    for _ in range(3):
        for name, model in models.items():
            velocity, packed = ask(model)
            same.append(torch.equal(velocity, first[name][0])
                        and (packed is None or torch.equal(packed, first[name][1])))
    comfy.model_management.unload_all_models()
    after = base.model.state_dict()
    same += [before.keys() == after.keys(), all(torch.equal(before[key], after[key]) for key in before),
             torch.equal(ask(base)[0], plain)]
    return {"same": same, "captured": first["base"][1] is None and first["A"][1] is not None}


def user_lora(modules, seed=0) -> dict:
    """A LoRA in ComfyUI's names for layers of the base."""
    generator = torch.Generator().manual_seed(seed)
    weights = tiny.state_dict(NAME)
    found = {}
    for module in modules:
        rows, columns = weights[f"{module}.weight"].shape
        found[f"diffusion_model.{module}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
        found[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.1
    return found


def with_lora(model, lora):
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def merged(lora):
    """The tiny base with a LoRA baked into its weights."""
    weights, original = tiny.state_dict(NAME), tiny.state_dict
    for key in {key.split(".lora_")[0] for key in lora}:
        name = key.removeprefix("diffusion_model.") + ".weight"
        weights[name] = weights[name] + lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
    tiny.state_dict = lambda name: weights
    model = tiny.base(NAME)
    tiny.state_dict = original
    return model


def loras() -> dict:
    """A user's LoRA on a layer that the adapter changes too: after it, before it, merged;
    and on the replaced layers."""
    lora = user_lora([BOTH])
    base = tiny.base(NAME)
    after, before, baked = with_lora(adapted(base), lora), adapted(with_lora(base, lora)), adapted(merged(lora))
    asked = {name: ask(model)[1]
             for name, model in {"after": after, "before": before, "merged": baked, "none": adapted(base)}.items()}
    found = {name: difference(asked[name], asked["merged"]) for name in ("after", "before", "none")}

    lora, plain, ignored = user_lora([HEAD, MODULATION]), ask(base)[0], []
    for build in (lambda: with_lora(adapted(base), lora), lambda: adapted(with_lora(base, lora))):
        LOG.truncate(0)
        model = build()
        ignored.append(torch.equal(ask(model)[1], asked["none"]))
        ignored.append(LOG.getvalue().count("is ignored: the adapter replaces these layers"))
        # The plain model takes the LoRA also right after the adapter has run, and is itself again without it.
        ignored.append(difference(ask(with_lora(base, lora))[0], ask(merged(lora))[0]))
        ignored.append(torch.equal(ask(base)[0], plain))
    return found | {"ignored": ignored}


def hooks() -> dict:
    """A LoRA as a conditioning's hook, on a shared and on the replaced layers, as the very first run:
    the weight patch."""
    import comfy.hooks

    lora = user_lora([BOTH, HEAD, MODULATION])
    model = adapted(tiny.base(NAME))
    group = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    hooked = ask(model, hooks=group)[1]
    return {"difference": difference(hooked, ask(with_lora(model, lora))[1]),
            "without": difference(hooked, ask(model)[1])}


def dtypes() -> dict:
    """Rms relative difference from float32 of the mean, with the adapter and of the plain base."""
    found = {}
    exact = {"adapter": ask(adapted(tiny.base(NAME)))[0], "plain": ask(tiny.base(NAME))[0]}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        base = tiny.base(NAME, dtype)
        for name, model in (("plain", base), ("adapter", adapted(base))):
            velocity = ask(model)[0].float()
            found[f"{name} {dtype}"] = ((velocity - exact[name]).square().mean()
                                        / exact[name].square().mean()).sqrt().item()
    return found


def gguf() -> dict:
    """A Q8_0 base through ComfyUI-GGUF: rms relative difference from float32, with the adapter,
    with a LoRA too, and plain."""
    import gguf as format_
    import numpy as np

    pack = Path(os.environ["GGUF_PACK"])
    spec = importlib.util.spec_from_file_location(
        "gguf_pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    module = sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        writer = format_.GGUFWriter(str(path), "flux")
        kinds = format_.GGMLQuantizationType
        for key, value in tiny.state_dict(NAME).items():
            kind = kinds.Q8_0 if value.ndim == 2 and value.shape[1] % 32 == 0 else kinds.F32
            writer.add_tensor(key, format_.quants.quantize(value.numpy().astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        import folder_paths

        folder_paths.add_model_folder_path("unet_gguf", folder)
        folder_paths.add_model_folder_path("unet", folder)
        folder_paths.add_model_folder_path("diffusion_models", folder)
        with tiny.own_sizes(NAME):
            base = module.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("base.gguf")[0]
        lora = user_lora([BOTH])
        exact = tiny.base(NAME)
        pairs = {
            "plain": (base, exact), "adapter": (adapted(base), adapted(exact)),
            "lora after": (with_lora(adapted(base), lora), with_lora(adapted(exact), lora)),
            "lora before": (adapted(with_lora(base, lora)), adapted(with_lora(exact, lora))),
        }
        found = {"class": type(base).__name__}
        for name, (narrow, wide) in pairs.items():
            got, expected = ask(narrow)[0].float(), ask(wide)[0]
            found[name] = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    return found


def compiled() -> dict:
    """TorchCompileModel's wrapper, eager backend: the same, mean and mixture."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    plain = adapted(tiny.base(NAME))
    expected = ask(plain)
    model = plain.clone()
    set_torch_compile_wrapper(model, backend="eager")
    got = [ask(model) for _ in range(2)]
    again = ask(plain)
    return {"same": [torch.equal(a, b) for pair in (*got, again) for a, b in zip(pair, expected, strict=True)]}


def guidance() -> dict:
    """CFG 3 with a negative: one call of the guider, the positive chunk's mixture as alone."""
    model = adapted(tiny.base(NAME))
    velocity, packed = ask(model, cfg=3.0, negative=tiny.conditioning(NAME, 1))
    alone, expected = ask(model)
    return {"mixture": difference(packed, expected), "moved": difference(velocity, alone)}


def shapes() -> dict:
    """denoised = x - s mean for odd sizes, batches, reference latents, low memory."""
    model, generator = adapted(tiny.base(NAME)), torch.Generator().manual_seed(0)
    own = model.get_attachment("gmflow")
    channels, found = IO["x"].shape[1], {}

    def check(name, x, model=model, **extras):
        velocity, packed = ask(model, x=latent(x), sigma=torch.full((len(x),), 0.6), **extras)
        mean = unpack(packed, own.components).mean()
        found[name] = difference(own.leave(mean), velocity)

    random = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    check("odd", random(1, channels, 7, 5))
    check("batch", random(3, channels, 4, 6))
    check("reference", random(1, channels, 4, 6), reference_latents=[latent(random(1, channels, 6, 4))])
    if NAME == "gmqwen_tiny":
        check("time zero", random(1, channels, 4, 6), reference_latents=[latent(random(1, channels, 6, 4))],
              reference_latents_method="index_timestep_zero")
    return found


def references() -> dict:
    """Reference latents: the mixture is the heads' of the image's own tokens, in the plain model's hidden state.

    The adapter here has the base's own last modulation and no LoRA, so that the plain model sees the same; ``tokens``
    are those of its hidden state beyond the image's.
    """
    base, generator, found = tiny.base(NAME), torch.Generator().manual_seed(0), {}
    state = load_file(ADAPTER)
    own = comfy.utils.get_attr(base.model.diffusion_model, MODULATION).weight.data
    state["norm_out.linear.weight"] = own if NAME == "gmqwen_tiny" else torch.cat(own.chunk(2)[::-1])
    if "norm_out.linear.bias" in state:
        bias = comfy.utils.get_attr(base.model.diffusion_model, MODULATION).bias.data
        state["norm_out.linear.bias"] = bias if NAME == "gmqwen_tiny" else torch.cat(bias.chunk(2)[::-1])
    with tempfile.TemporaryDirectory() as folder:
        save_file({key: value.contiguous() for key, value in state.items()}, Path(folder) / "own.safetensors")
        model = host_adapter.apply_adapter(base, str(Path(folder) / "own.safetensors"), 0.0)
    seen = []
    comfy.utils.get_attr(base.model.diffusion_model, HEAD).register_forward_hook(
        lambda layer, inputs, output: seen.append(inputs[0].clone()))
    x = latent(torch.randn(1, IO["x"].shape[1], 4, 6, generator=generator))
    others = [latent(torch.randn(1, IO["x"].shape[1], *size, generator=generator)) for size in ((6, 4), (3, 5))]
    h, w = (4, 6) if NAME == "gmflux2_tiny" else (2, 3)
    for method in (None, *(("index_timestep_zero",) if NAME == "gmqwen_tiny" else ())):
        extras = {"reference_latents": others} | ({"reference_latents_method": method} if method else {})
        extras |= {"guidance": 4.0} if NAME == "gmflux2_tiny" else {}  # the adapter's own, which is not the core's
        ask(base, x=x, sigma=torch.tensor([0.6]), **extras)
        packed = ask(model, x=x, sigma=torch.tensor([0.6]), **extras)[1]
        hidden, mixture = seen[-1][:, : h * w].float(), unpack(packed, 8)
        means = F.linear(hidden, state["proj_out_means.weight"], state["proj_out_means.bias"])
        logits = F.linear(hidden, state["proj_out_logweights.weight"], state["proj_out_logweights.bias"])
        tokens = {"h": h, "w": w, "k": 8, "p": 2, "q": 2}
        means = rearrange(means, "b (h w) (k c p q) -> b k c (h p) (w q)", **tokens)
        logits = rearrange(logits, "b (h w) (k p q) -> b k 1 (h p) (w q)", **tokens)
        found[str(method)] = {
            "means": difference(mixture.means, means), "tokens": seen[-1].shape[1] - h * w,
            "log_weights": difference(mixture.log_weights, logits.log_softmax(1)),
        }
    return found


def saved() -> dict:
    """A saved MODEL, loaded again, with the adapter at strength 0: the same mixture. One line when it is saved."""
    LOG.truncate(0)
    model = adapted(tiny.base(NAME))
    expected, known = ask(model)[1], tiny.state_dict
    with_lora(model, user_lora([BOTH]))  # asks for the names of all weights
    early = LOG.getvalue().count("not the adapter's heads")
    LOG.truncate(0)
    with tempfile.TemporaryDirectory() as folder:
        comfy.sd.save_checkpoint(f"{folder}/saved.safetensors", model)
        lines = LOG.getvalue().count("not the adapter's heads")
        kept = {key.removeprefix("model.diffusion_model."): value
                for key, value in load_file(f"{folder}/saved.safetensors").items()}
    tiny.state_dict = lambda name: kept
    again = tiny.base(NAME)
    tiny.state_dict = known
    return {"lines": [early, lines], "difference": difference(ask(adapted(again, 0.0))[1], expected),
            "keys": kept.keys() == known(NAME).keys(), "unasked": difference(ask(adapted(again))[1], expected)}


def registered() -> dict:
    """The stand-ins own no tensor, and one that is set by name lands in the base."""
    model = adapted(tiny.base(NAME))
    stand_ins = [model.get_model_object(name)
                 for name in (f"diffusion_model.{HEAD}", f"diffusion_model.{MODULATION}", "model_sampling")]
    own = sum(len([*part.parameters(), *part.buffers()]) for part in stand_ins)
    value, table = torch.nn.Parameter(torch.zeros(1), requires_grad=False), torch.ones(2)
    stand_ins[0].weight = value
    stand_ins[2].register_buffer("sigmas", table)
    base = model.model
    return {"own": own, "layer": comfy.utils.get_attr(base.diffusion_model, HEAD).weight is value,
            "table": base.model_sampling.sigmas is table and stand_ins[2].sigmas is not table}


def decoding() -> dict:
    """x_0 in the mixture's space through a VAE, against the core's node on the core's latent; other models' VAEs."""
    model = adapted(tiny.base(NAME))
    own, vae = model.get_attachment("gmflow"), tiny.vae(NAME)
    size = (8, 12) if NAME == "gmflux2_tiny" else (4, 6)
    x = torch.randn(2, own.family.channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = host.decoder(model, vae)(x)
        pictures = core.VAEDecode().decode(vae, {"samples": model.model.process_latent_out(own.leave(x))})[0]
    others = {name: message(host.decoder, model, tiny.vae(name)) for name in tiny.NAMES if name != NAME}
    return {"difference": difference(got, 2 * pictures.movedim(-1, 1) - 1), "spread": got.std().item(),
            "others": others}


def low_memory() -> dict:
    """Weights that stay where they are and are cast as they are used: the same mixture."""
    model = adapted(tiny.base(NAME))
    full = ask(model)[1]
    comfy.model_management.unload_all_models()
    original = comfy.model_management.load_models_gpu
    model.load(torch.device("cpu"), lowvram_model_memory=1000)
    comfy.model_management.load_models_gpu = lambda *args, **kwargs: None
    try:
        model.patch_model(load_weights=False)
        low = ask(model)[1]
        lowered = model.model.model_lowvram
    finally:
        comfy.model_management.load_models_gpu = original
    return {"difference": difference(low, full), "lowered": lowered}


def unreachable() -> dict:
    """What is said to models without the layers, or of another kind, and that they stay as they were."""
    found = {}
    for module, name in (("nunchaku.models.transformer", "NunchakuFluxTransformer"), ("comfy_tensorrt", "TrTUnet"),
                         ("somewhere", "Other")):
        model = tiny.base(NAME)
        model.model.diffusion_model = type(name, (torch.nn.Module,), {"__module__": module})()
        found[name] = message(adapted, model)
    model = tiny.base(NAME)
    model.model.latent_format = copy.copy(model.model.latent_format)
    model.model.latent_format.latent_dimensions = 5 - model.model.latent_format.latent_dimensions
    found["axes"] = message(adapted, model)
    return found


def message(function, *args) -> str:
    try:
        function(*args)
    except Exception as error:  # the test wants to know which
        return f"{type(error).__name__}: {error}"
    return "no error"


def answer(task) -> dict:
    try:
        return task()
    except Exception:  # the other tasks go on, and its test shows the traceback
        return {"error": traceback.format_exc()}


# Hooks first, as the very first run.
TASKS = (hooks, mixtures, alternating, loras, dtypes, compiled, guidance, shapes, unreachable, references,
         saved, registered, decoding, low_memory)
if os.environ.get("GGUF_PACK") and NAME == "gmflux_tiny":
    TASKS += (gguf,)
assert core
print(json.dumps({task.__name__: answer(task) for task in TASKS if not CHOSEN or task.__name__ in CHOSEN}))
