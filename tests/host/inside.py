"""Runs inside ComfyUI's Python, with the checkout first on the path: ``inside.py PACK TASK [ComfyUI options]``.

Prints one JSON object. The pack is loaded as ComfyUI loads it, as a package of another name; its folder is
never on the path.
"""

import asyncio
import importlib.util
import json
import sys
import time

ROOT, TASK = sys.argv[1:3]
sys.argv = ["main.py", "--cpu", *sys.argv[3:]]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
# As main.py does first: nodes.py puts comfy/, which has a utils.py, before it.
import comfy.samplers  # noqa: E402
import comfy_api.latest  # noqa: E402,F401
import torch  # noqa: E402
import utils.extra_config  # noqa: E402,F401
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import nodes as core  # noqa: E402

importlib.import_module("server")  # slow, and loaded before any pack; after the host's utils, as in main.py

BUNDLED = f"{ROOT}/models/gmdit_digits.safetensors"


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def load_pack() -> dict:
    """The pack's node classes by id, and what loading them took."""
    before = set(sys.modules)
    start = time.process_time()
    with CountOps() as ops:
        spec = importlib.util.spec_from_file_location("a-pack", f"{ROOT}/__init__.py",
                                                      submodule_search_locations=[ROOT])
        module = sys.modules["a-pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        extension = asyncio.run(module.comfy_entrypoint())
        classes = asyncio.run(extension.get_node_list())
        schemas = [cls.GET_SCHEMA() for cls in classes]
    seconds = time.process_time() - start
    loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
                    - {"a-pack"})
    return {
        "nodes": dict(zip((s.node_id for s in schemas), classes, strict=True)), "seconds": seconds,
        "operations": ops.names, "modules": loaded, "on_path": ROOT in sys.path,
        "core_nodes": sys.modules["nodes"] is core,
    }


def tiny_sd3():
    """A MODEL of another kind: Stable Diffusion 3's network, of one small block."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD3({
        "in_channels": 16, "depth": 1, "patch_size": 2, "adm_in_channels": 8, "pos_embed_max_size": 8,
        "num_patches": 64,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 64}},
    })
    config.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(config.get_model({}), torch.device("cpu"), torch.device("cpu"))


def message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:  # the test wants to know which
        return f"{type(error).__name__}: {error}"
    return "no error"


def foreign_model(nodes: dict) -> dict:
    """What GM nodes say to a MODEL that is none of theirs."""
    model = tiny_sd3()
    conditioning = [[torch.zeros(1, 1, 8), {"pooled_output": torch.zeros(1, 8)}]]
    latent, sigmas = torch.zeros(1, 16, 8, 8), torch.tensor([1.0, 0.5, 0.0])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    said = {}
    for name, arguments in {
        "GMFlowEmptyLatent": dict(batch_size=1), "GMFlowClassConditioning": dict(labels="1"),
        "GMFlowScheduler": dict(steps=1, shift=1.0, denoise=1.0),
        "GMFlowGuider": dict(positive=conditioning, guidance=0.1, orthogonal=1.0, start_percent=0.0, end_percent=1.0,
                             method="probabilistic", cfg_scale=4.0),
        "GMFlowKSampler": dict(positive=conditioning, latent_image={"samples": latent}, seed=0, steps=1,
                               solver="GM-ODE", guidance=0.1, substeps=0, denoise=1.0, order=2,
                               orthogonal=1.0, shift=1.0),
    }.items():
        said[name] = message(nodes[name].execute, model=model, **arguments)
    for name in ("ODE", "SDE"):
        node = nodes[f"SamplerGMFlow{name}"]
        sampler = node.execute(**{i.id: i.default for i in node.GET_SCHEMA().inputs})[0]
        said[f"SamplerGMFlow{name}"] = message(
            guider.sample, torch.randn_like(latent), latent, sampler, sigmas, disable_pbar=True, seed=0
        )
    euler = comfy.samplers.sampler_object("euler")
    said["a core sampler"] = message(guider.sample, torch.randn_like(latent), latent, euler, sigmas,
                                     disable_pbar=True, seed=0)
    said["GMFlowInspector"] = message(
        nodes["GMFlowInspector"].execute, trace=[1],
        **{i.id: getattr(i, "default", None) for i in nodes["GMFlowInspector"].GET_SCHEMA().inputs
           if i.id not in ("trace", "vae")}
    )
    return said


class Painter:
    """Ten digits by GMFlow KSampler and by the core's."""

    def __init__(self, nodes: dict):
        self.nodes = nodes
        self.model = nodes["GMFlowLoader"].execute("gmdit_digits.safetensors")[0]
        self.positive, self.negative = nodes["GMFlowClassConditioning"].execute(self.model, "0-9").args
        self.latent = nodes["GMFlowEmptyLatent"].execute(self.model, 10)[0]
        nodes["GMFlowKSampler"].hidden = type("Hidden", (), {"prompt": {}, "unique_id": "1"})()

    def gm(self, model=None, **inputs):
        defaults = {i.id: i.default for i in self.nodes["GMFlowKSampler"].GET_SCHEMA().inputs
                    if getattr(i, "default", None) is not None}
        inputs = defaults | {"guidance": 0.3} | inputs
        return self.nodes["GMFlowKSampler"].execute(
            model=model or self.model, positive=self.positive, latent_image=self.latent, **inputs
        )[0]["samples"]

    def core(self, model=None):
        return core.common_ksampler(model or self.model, 0, 3, 1.5, "euler", "simple", self.positive, self.negative,
                                    self.latent)[0]["samples"]


def sample(nodes: dict) -> dict:
    """Paint with this process's options: dtypes and values."""
    painter = Painter(nodes)
    out, model = painter.gm(), painter.model.model
    return {
        "weights": str(model.diffusion_model.transformer_blocks[0].attn1.to_q.weight.dtype), "latent": str(out.dtype),
        "pixels": out.flatten().tolist(),
    }


def parity(nodes: dict) -> dict[str, float]:
    """Largest difference of GMFlow KSampler from gmflow_core's own solver over the very same network."""
    gmflow = sys.modules["a-pack.gmflow_core"]
    painter = Painter(nodes)
    labels = torch.arange(10)

    class Plain(torch.nn.Module):
        """The host's network without its wrappers, as gmflow_core calls one."""

        def __init__(self, network):
            super().__init__()
            self.network, self.config, self.mixture = network, network.config, network.mixture

        def forward(self, x, sigma, labels):
            return gmflow.GMDiT.forward(self.network, x, sigma, labels)

    found = {}
    with torch.inference_mode():
        for order, guidance in ((1, 0.0), (1, 0.45), (2, 0.0), (2, 0.45)):
            hosted = painter.gm(order=order, guidance=guidance, steps=8, seed=5)
            x = torch.randn(hosted.shape, generator=torch.manual_seed(5))
            denoiser = gmflow.GMDenoiser(Plain(painter.model.model.diffusion_model), labels, guidance, tilt="limited")
            direct = gmflow.sample_gm_ode(denoiser, x, gmflow.flow_sigmas(8), order=order, substeps=16,
                                          second_order=gmflow.SecondOrder(tilt="limited"))
            found[f"order {order}, guidance {guidance}"] = (hosted - direct).abs().max().item()
    return found


def compiled(nodes: dict) -> list[float]:
    """Largest mean differences that compiling makes, with and without a GM sampler, in turns."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    painter = Painter(nodes)
    model = painter.model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    with torch.inference_mode():
        plain = [painter.gm(steps=3), painter.core()]
        return [(paint(model) - expected).abs().mean().item() for paint, expected in (
            (lambda m: painter.gm(m, steps=3), plain[0]), (painter.core, plain[1]),
            (lambda m: painter.gm(m, steps=3), plain[0]),
        )]


def vaes(nodes: dict) -> dict:
    """What the inspector makes of VAEs (of random weights), for an RGB model and for one of four-channel latents."""
    import comfy.sd
    import comfy.taesd.taesd

    def tae(channels: int):
        return comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict())

    host, core_sd = sys.modules["a-pack.nodes.host"], comfy.sd
    torch.manual_seed(0)
    decoders = {"none": None, "pixels": core_sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}), "taesd": tae(4),
                "sixteen": tae(16)}
    video = tae(4)
    video.latent_dim = 3  # what VAEs of video are told by
    decoders["video"] = video
    inspector, sampler = nodes["GMFlowInspector"], nodes["GMFlowKSampler"]
    sampler.hidden = type("Hidden", (), {"prompt": {}, "unique_id": "1"})()
    widgets = {i.id: i.default for i in sampler.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    widgets["steps"] = 2
    found = {}
    for name, path in (("rgb", BUNDLED), ("latents", f"{ROOT}/tests/data/ckpt_small")):
        model = host.load_model(path)
        positive = nodes["GMFlowClassConditioning"].execute(model, "1")[0]
        latent = nodes["GMFlowEmptyLatent"].execute(model, 1)[0]
        trace = sampler.execute(model=model, positive=positive, latent_image=latent, **widgets)[1]
        for kind, vae in decoders.items():
            try:
                panel = inspector.execute(trace, 0, 0, "components", "aligned", 8, vae=vae)[0]
                found[f"{name} {kind}"] = f"{len(panel.unique())} values, finite {bool(panel.isfinite().all())}"
            except Exception as error:
                found[f"{name} {kind}"] = f"{type(error).__name__}: {error}"
    return found


pack = load_pack()
answer = {name: pack[name] for name in ("seconds", "operations", "modules", "on_path", "core_nodes")}
if TASK == "foreign":
    answer["said"] = foreign_model(pack["nodes"])
if TASK == "vaes":
    answer["found"] = vaes(pack["nodes"])
if TASK == "sample":
    answer["sample"] = sample(pack["nodes"])
if TASK == "parity":
    answer["parity"] = parity(pack["nodes"])
if TASK == "compile":
    answer["differences"] = compiled(pack["nodes"])
print("\n" + json.dumps(answer))
