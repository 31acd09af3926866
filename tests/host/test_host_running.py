"""How it runs: progress, previews, cancelling, traces that cost nothing, memory and overhead."""

import json
import os
import posixpath
import re
import statistics
import time
import urllib.parse
from pathlib import Path

import pytest
import torch
from hosting import Listener
from safetensors.torch import load_file
from test_host_basics import BUNDLED

from gmflow_core import GMDenoiser, flow_sigmas, load_checkpoint, sample_gm_ode
from gmflow_core.schedule import default_substeps


@pytest.fixture
def listener(host):
    listener = Listener(host)
    yield listener
    listener.close()


def watch(host, listener, graph) -> tuple[list[dict], list[bytes]]:
    """Progress messages and preview pictures of a prompt that succeeds."""
    prompt_id = host.queue(graph, listener.client_id)["prompt_id"]
    messages, binary = listener.until_done(prompt_id)
    result = host.wait(prompt_id)
    assert result.ok, result.error
    return [m["data"] for m in messages if m["type"] == "progress"], binary


@pytest.mark.parametrize("how", ["GM-ODE", "GM-SDE", "gm guider, euler", "core"])
def test_progress_and_previews(host, digits, listener, how):
    """One step forward for every network step, each with a picture."""
    g = digits(batch=2, labels="3")
    seed = next(host.counter)
    if how.startswith("GM"):
        link = g.gm(solver=how, steps=5, seed=seed)
    elif how == "core":
        link = g.core(steps=5, seed=seed)
    else:
        link = g.custom(g.add("KSamplerSelect", sampler_name="euler"), steps=5, seed=seed)
    host.save(g.graph, link)
    progress, previews = watch(host, listener, g.graph)
    assert [p["value"] for p in progress] == [1, 2, 3, 4, 5] and {p["max"] for p in progress} == {5}
    assert {p["node"] for p in progress} == {link[0]}
    assert len(previews) >= 4
    assert all(b"JFIF" in p[:64] or b"PNG" in p[:128] or b"\xff\xd8" in p[:400] for p in previews)


def test_a_trace_is_recorded_only_where_it_is_wanted(host, digits, listener):
    """An inspector that is connected later samples again; one that is there from the start does not."""
    def build(inspector: bool, seed: int):
        g = digits(batch=2, labels="3")
        link = g.gm(steps=3, seed=seed)
        host.save(g.graph, link)
        return g, link, g.add("GMFlowInspector", trace=link.out(1)) if inspector else None

    seed = next(host.counter)
    g, sampler, _ = build(False, seed)
    progress, _ = watch(host, listener, g.graph)
    assert {p["node"] for p in progress} == {sampler[0]}
    g, sampler, inspector = build(True, seed)
    progress, _ = watch(host, listener, g.graph)
    assert {p["node"] for p in progress} == {inspector[0]} and len(progress) == 3
    g, sampler, inspector = build(True, seed + 10_000)
    progress, _ = watch(host, listener, g.graph)
    assert {p["node"] for p in progress} == {sampler[0]} and len(progress) == 3


@pytest.mark.parametrize("solver", ["ODE", "SDE"])
def test_the_inspector(host, digits, solver):
    """Every view of the first, a middle and the last step; statistics as JSON for every step."""
    g = digits(batch=2, labels="3,8")
    trace = g.custom(g.add(f"SamplerGMFlow{solver}"), steps=3).out(2) if solver == "SDE" else g.gm(steps=3).out(1)
    views = host.info["GMFlowInspector"]["input"]["required"]["view"][1]["options"]
    panels = [
        g.add("GMFlowInspector", trace=trace, view=view, step=step, image=1, order=order)
        for view in views for step, order in ((0, "aligned"), (1, "ranked"), (-1, "raw"))
    ]
    text = g.add("PreviewAny", source=panels[0].out(1))
    pixel = g.add("PreviewAny", source=g.add("GMFlowInspector", trace=trace, view="pixel", pixel_x=3, pixel_y=9).out(1))
    result = host.done(g.graph)
    assert all(len(result.images(panel)) == 1 for panel in panels)
    mixture = json.loads(result.outputs[pixel[0]]["text"][0])["steps"][2]["pixel"]
    assert (mixture["x"], mixture["y"]) == (3, 9) and len(mixture["means"]) == 8
    assert sum(mixture["weights"]) == pytest.approx(1, abs=1e-4)
    figures = json.loads(result.outputs[text[0]]["text"][0])
    assert [step["step"] for step in figures["steps"]] == [0, 1, 2] and figures["image"] == 1


def test_the_page_finds_a_pixels_components(host, digits, tmp_path):
    """The file that web/js/inspector.js reads, through /view as the page does, agrees with the statistics."""
    g = digits(batch=1, labels="3")
    trace = g.gm(steps=2).out(1)
    panel, other = (g.add("GMFlowInspector", trace=trace, step=1, max_components=n) for n in (4, 3))
    text = g.add("PreviewAny", source=panel.out(1))
    result = host.done(g.graph)
    (name,), (another,) = (result.outputs[node[0]]["gmflow_pixels"] for node in (panel, other))
    assert isinstance(name, str) and name != another  # an object would be listed as one more output
    path = tmp_path / "pixels.safetensors"
    path.write_bytes(host.get(f"/view?{urllib.parse.urlencode({'filename': name, 'type': 'temp', 'subfolder': ''})}"))
    tensors, step = load_file(path), json.loads(result.outputs[text[0]]["text"][0])["steps"][1]
    assert tensors["weights"].shape == (16, 16, 4) and tensors["rgb"].shape == (16, 16, 5, 3)
    assert tensors["weights"].float().mean((0, 1)).tolist() == pytest.approx(step["hypotheses"]["weights"], abs=1e-3)
    assert tensors["entropy"].float().mean().item() == pytest.approx(step["entropy_bits"]["mean"], abs=2e-3)


def test_the_page_gets_the_script(host):
    """It stands among the page's extensions, and asks for nothing that this version does not serve."""
    (script,) = (path for path in json.loads(host.get("/extensions")) if "gmflow-nodes" in path)
    text = host.get(script).decode()
    imported = re.findall(r'from "([^"]+)"', text)
    assert len(imported) == 2 and "registerExtension" in text
    for path in imported:
        assert b"export" in host.get(posixpath.normpath(posixpath.join(posixpath.dirname(script), path)))


def test_cancel(host, digits, listener):
    """Within a step or two, and the next prompt runs."""
    g = digits(batch=2, labels="3")
    host.save(g.graph, g.gm(steps=400, seed=next(host.counter)))
    prompt_id = host.queue(g.graph, listener.client_id)["prompt_id"]
    steps = 0
    while steps < 3:
        kind, payload = listener.frame()
        steps += kind == 1 and json.loads(payload)["type"] == "progress"
    host.post("/interrupt", {})
    messages, _ = listener.until_done(prompt_id)
    last = [m["data"]["value"] for m in messages if m["type"] == "progress"]
    assert host.wait(prompt_id).interrupted and (last or [3])[-1] < 60  # messages under way count too
    g = digits(batch=1, labels="3")
    assert g.latents(g.gm(steps=1, seed=next(host.counter))).isfinite().all()


def test_a_batch_of_many(digits, recognised):
    g = digits(labels=",".join(["0-9"] * 4), batch=40)
    assert recognised(g.latents(g.gm(guidance=0.3, steps=4)), [*range(10)] * 4) >= 36


def test_memory_stays_where_it_was(host, digits):
    """Twenty prompts, each with another seed, a trace and pictures."""
    def prompt():
        g = digits()
        solver, seed = ("GM-ODE", "GM-SDE")[next(host.counter) % 2], next(host.counter)
        link = g.gm(steps=2, solver=solver, seed=seed)
        g.add("GMFlowInspector", trace=link.out(1))
        image = g.add("VAEDecode", samples=link, vae=g.add("VAELoader", vae_name="pixel_space"))
        g.add("PreviewImage", images=image)
        host.done(g.graph)

    for _ in range(6):
        prompt()
    before = host.memory()
    for _ in range(20):
        prompt()
    grown = (host.memory() - before) / 2**20
    print(f"ComfyUI {host.version}: 20 prompts, {grown:+.1f} MiB on {before / 2**20:.0f}")
    assert grown < 60


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_overhead(host, digits, capsys):
    """A warm prompt of GMFlow KSampler against the same sampling called directly; CPU time, for machines are shared."""
    checkpoint, labels, steps = load_checkpoint(BUNDLED), torch.arange(10), 8
    x, runs = torch.randn(10, 3, 16, 16), 5
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        direct = []
        with torch.no_grad():
            for _ in range(runs + 1):
                start = time.process_time()
                sample_gm_ode(GMDenoiser(checkpoint.model, labels, 0.45), x, flow_sigmas(steps),
                              substeps=default_substeps(steps))
                direct.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    prompted, wall = [], []
    for _ in range(runs + 1):
        g = digits()
        host.save(g.graph, g.gm(steps=steps, seed=next(host.counter)))
        start = cpu_seconds(host.process.pid)
        prompt_id = host.queue(g.graph)["prompt_id"]
        time.sleep(1)  # asking for it costs the server time
        messages = host.wait(prompt_id).messages
        prompted.append(cpu_seconds(host.process.pid) - start)
        wall.append((messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000)
    a, b = statistics.median(prompted[1:]), statistics.median(direct[1:])
    with capsys.disabled():
        print(f"\nComfyUI {host.version}: "
              f"prompt {a * 1000:.0f} ms CPU ({statistics.median(wall[1:]) * 1000:.0f} ms wall), "
              f"direct {b * 1000:.0f} ms CPU; overhead {(a - b) * 1000:+.0f} ms")
    assert a < 2 * b + 0.5
