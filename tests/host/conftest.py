"""Tests of the nodes in a real ComfyUI: one server for each checkout, shared by the whole run.

COMFYUI_PATH names the checkouts (several as in PATH); without it comfy-cli's ``~/comfy/ComfyUI`` is used.
A checkout's own ``.venv`` or ``venv`` runs it, else the Python of the tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import DATA, NAMES, WEIGHTS, Tiny
from hosting import MISSING, ROOT, Graph, Host, Node, checkouts, version

CHECKOUTS = checkouts()


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: version(path) if path else "no ComfyUI")
def host(request, tmp_path_factory):
    """A running server with the pack in it."""
    if request.param is None:
        pytest.skip(MISSING)
    host = Host(request.param, tmp_path_factory.mktemp("comfyui"), packs=(Path(__file__).parent / "tiny_pack",))
    host.start()
    yield host
    host.stop()


def assert_same(found, expected) -> None:
    """Equal up to rounding: where two components weigh the same, a pixel amplifies it,
    so a few in a hundred may differ more."""
    difference = (found - expected).abs()
    assert difference.mean() < 1e-4 and (difference > 1e-4).float().mean() < 0.02, (difference.mean(), difference.max())


class Digits:
    """The bundled digits in a graph, their classes and an empty latent."""

    def __init__(self, host: Host, labels: str = "0-9", batch: int = 10, **loader):
        self.graph: Graph = host.graph()
        self.host, self.batch = host, batch
        self.model: Node = self.graph.add("GMFlowLoader", **dict(model_name="gmdit_digits.safetensors") | loader)
        self.classes: Node = self.graph.add("GMFlowClassConditioning", model=self.model, labels=labels)
        self.positive, self.negative = self.classes.out(0), self.classes.out(1)
        self.empty: Node = self.graph.add("GMFlowEmptyLatent", model=self.model, batch_size=batch)

    def add(self, class_type: str, **inputs) -> Node:
        return self.graph.add(class_type, **inputs)

    def gm(self, **inputs) -> Node:
        """GMFlowKSampler."""
        return self.add("GMFlowKSampler",
                        **dict(model=self.model, positive=self.positive, latent_image=self.empty) | inputs)

    def core(self, **inputs) -> Node:
        """The core's KSampler."""
        return self.add("KSampler", **dict(
            model=self.model, positive=self.positive, negative=self.negative, latent_image=self.empty, cfg=1.5, steps=8,
            sampler_name="euler", scheduler="simple", seed=0,
        ) | inputs)

    def custom(self, sampler, guider=None, sigmas=None, node: str = "GMFlowSamplerCustom", seed: int = 0,
               steps: int = 8, **inputs) -> Node:
        """A custom sampling graph; GMFlow's guider and scheduler where none is given."""
        guider = guider or self.add("GMFlowGuider", model=self.model, positive=self.positive)
        sigmas = sigmas or self.add("GMFlowScheduler", model=self.model, steps=steps)
        noise = inputs.pop("noise", None) or self.add("RandomNoise", noise_seed=seed)
        return self.add(node, **dict(noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                                     latent_image=self.empty) | inputs)

    def latents(self, *links):
        return self.host.latents(self.graph, *links)


@pytest.fixture
def digits(host):
    """``digits(labels="0-9", batch=10)``: the start of a graph."""
    return lambda *args, **kwargs: Digits(host, *args, **kwargs)


# ---- text-to-image adapters --------------------------------------------------------------------


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: version(path) if path else "no ComfyUI")
def tiny(request, tmp_path_factory):
    """A server with the tiny models' loaders beside the pack, and the adapters among the LoRAs.

    MKL's elementary functions differ by machine in the last bit, which sinusoids of a few thousand make 1e-5 of:
    the compatible ones are those that the recorded outputs were made with. Packs of other people that lie beside the
    repository are there too.
    """
    if request.param is None:
        pytest.skip(MISSING)
    base = tmp_path_factory.mktemp("comfyui_tiny")
    beside = [ROOT.parent / name for name in ("LanPaint", "ComfyUI-Detail-Daemon")]
    packs = (Path(__file__).parent / "tiny_pack", *(pack for pack in beside if pack.is_dir()))
    host = Host(request.param, base, packs=packs, MKL_CBWR="COMPATIBLE")
    for name in NAMES:
        (base / "models" / "loras" / f"{name}.safetensors").symlink_to(DATA / name / "adapter" / WEIGHTS)
    host.start()
    yield host
    host.stop()


@pytest.fixture
def model(tiny):
    """``model(name)``: the start of a graph with a tiny model and its adapter."""
    return lambda name, **kwargs: Tiny(tiny, name, **kwargs)


# ---- judges and reports ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def recognised():
    """How many images (N,3,16,16) in [-1, 1] show the digit asked for, to a classifier of real digits."""
    from train.data.digits import Digits as Real
    from train.evaluate.digits_metrics import grey8, train_svm

    svm = train_svm(Real.load())

    def judge(images: torch.Tensor, labels=range(10)) -> int:
        assert images.isfinite().all()
        return sum(int(a) == int(b) for a, b in zip(svm.predict(grey8(images).numpy()), labels, strict=True))

    return judge


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the end of its server's log."""
    outcome = yield
    report, given = outcome.get_result(), getattr(item, "funcargs", {})
    host = given.get("host") or given.get("tiny")
    if report.failed and host is not None:
        report.sections.append((f"ComfyUI {host.version}", host.log()[-3000:]))


def pytest_terminal_summary(terminalreporter):
    if not CHECKOUTS and any(MISSING in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(MISSING, yellow=True)
