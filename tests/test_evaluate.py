"""The evaluation from end to end with tiny networks: what is measured, resumed, refused and drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from packages import importable
from PIL import Image

from gmflow_core import (
    GMMLP,
    GMDenoiser,
    GMDiT,
    GMDiTConfig,
    GMMLPConfig,
    SecondOrder,
    SpectrumConfig,
    SpectrumMLP,
    flow_sigmas,
    load_checkpoint,
    sample_gm_ode,
    sample_gm_sde,
    save_checkpoint,
)
from gmflow_core.guidance import TILTS
from gmflow_core.model import LatentSpace
from gmflow_core.noise import ImageNoise
from train.evaluate import rows as evaluate_rows, sweep as evaluate_sweep
from train.evaluate.__main__ import main, parse
from train.evaluate.baselines import has_diffusers
from train.evaluate.figures import curves, markdown
from train.evaluate.image_metrics import moments, quantise, saturation
from train.evaluate.reference import DigitImages, load_reference, measure_reference, real_images, save_reference
from train.evaluate.results import RESULTS
from train.evaluate.settings import SOLVERS, Setting, sample_images, solve
from train.evaluate.subject import classes_in_data, digest, likelihood, old_digest, open_subject
from train.evaluate.sweep import CLASSIFIER, REFERENCE, settings
from train.folder import locked
from train.vae import Decoder, load_vae

CPU = torch.device("cpu")
each_solver = pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if s == "euler" or s.startswith("gm") or has_diffusers()]
)


def save(path, k=2, classes=10, channels=3, size=16, vanilla=False, space=None, names=None):
    torch.manual_seed(k)
    config = GMDiTConfig(num_classes=classes, num_gaussians=k, in_channels=channels, sample_size=size, patch_size=4,
                         num_layers=1, num_heads=2, head_dim=8, logstd_width=8,
                         constant_logstd=0.0 if vanilla else None)
    model, spectrum = GMDiT(config), SpectrumMLP(SpectrumConfig((channels, size, size), (8, 4)))
    for net in (model, spectrum):
        net.init_weights()
    for p in model.parameters():  # the zeros of a new network would hide what labels and guidance do
        p.data += 0.1 * torch.randn_like(p)
    names = names or tuple(str(i) for i in range(classes))
    save_checkpoint(path, model.eval(), None if vanilla else spectrum.eval(), class_names=names, latent_space=space,
                    training={"step": 7})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"gm": save(folder / "gm.safetensors"), "k3": save(folder / "k3.safetensors", 3),
            "vanilla": save(folder / "plain.safetensors", 1, vanilla=True)}


@pytest.fixture
def quick(monkeypatch):
    """A feature network of two steps, few real images."""
    monkeypatch.setattr("train.evaluate.features.STEPS", 2)
    monkeypatch.setattr("train.evaluate.subject.NLL_SAMPLES", 4)


def run(*arguments) -> int:
    return main([str(a) for a in (*arguments, "--samples", 12, "--batch", 6, "--real-samples", 50, "--device", "cpu")])


def rows(out) -> list[dict]:
    return json.loads((out / RESULTS).read_text())["rows"]


# ---- sampling ----------------------------------------------------------------------------------

def test_settings_are_the_cores_own_solvers(files):
    """Each solver of a setting is a call of the core with the same noise; both tilts are limited by default."""
    checkpoint, labels = load_checkpoint(files["gm"]), torch.arange(4)
    noise = ImageNoise(3, range(4), (3, 16, 16), CPU)
    x = noise()

    def images(solver, **options):
        return sample_images(checkpoint, Setting(solver, 3, 0.4, **options), labels, 3)

    with torch.no_grad():
        published, limited = (GMDenoiser(checkpoint.model, labels, 0.4, tilt=tilt) for tilt in TILTS)
        want = sample_gm_ode(published, x, flow_sigmas(3), substeps=43)
        assert torch.equal(images("gm-ode2", tilt="published", guidance_tilt="published"), want)
        want = sample_gm_ode(limited, x, flow_sigmas(3), substeps=43, second_order=SecondOrder(tilt="limited"))
        assert torch.equal(images("gm-ode2"), want)
        assert not torch.equal(images("gm-ode2", substeps=1), want)
        want = sample_gm_ode(limited, x, flow_sigmas(3, 2.5), substeps=43, shift=2.5,
                             second_order=SecondOrder(tilt="limited"))
        assert torch.equal(images("gm-ode2", shift=2.5), want)
        want = sample_gm_sde(limited, x, flow_sigmas(3), order=1, spectrum=checkpoint.spectrum, noise_sampler=noise)
        assert torch.equal(images("gm-sde1"), want)
        assert not torch.equal(images("gm-sde1", spectral=False), want)


@pytest.mark.parametrize("change", [
    dict(orthogonal=0.0), dict(reanchored=False), dict(corrections=1), dict(substeps=1), dict(tilt="published"),
    dict(guidance_tilt="published"), dict(method="cfg", guidance=2.0), dict(shift=2.0),
])
def test_every_switch_changes_the_samples(files, change):
    checkpoint, labels = load_checkpoint(files["gm"]), torch.arange(3)
    plain = dict(solver="gm-ode2", steps=3, guidance=0.4)
    a, b = (sample_images(checkpoint, Setting(**s), labels, 1) for s in (plain, plain | change))
    assert a.isfinite().all() and b.isfinite().all() and not torch.allclose(a, b, atol=1e-4)


@each_solver
def test_every_solver_reads_the_guided_posterior(files, solver):
    """Baselines too: they step with the mean of the guided mixture."""
    checkpoint, labels = load_checkpoint(files["gm"]), torch.arange(2)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = [solve(Setting(solver, 3, w), GMDenoiser(checkpoint.model, labels, w), x,
                     generator=torch.Generator().manual_seed(0)) for w in (0, 0, 0.4)]
    assert out[0].isfinite().all() and torch.equal(out[0], out[1]) and not torch.allclose(out[0], out[2], atol=1e-4)


@each_solver
def test_every_solver_takes_the_time_shift(files, solver):
    """The sigmas at which the network is asked, but for the schedulers' first, which is next to one."""
    asked, denoiser = [], GMDenoiser(load_checkpoint(files["gm"]).model, torch.arange(2))
    with torch.no_grad():
        solve(Setting(solver, 4, shift=2.5), lambda x, s: asked.append(float(s)) or denoiser(x, s),
              torch.randn(2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert asked[:4] == pytest.approx(flow_sigmas(4, 2.5)[:4].tolist(), abs=2e-3)


def test_the_time_shift_without_reanchoring(files):
    """In its one step there is nothing to re-anchor: it is GM-ODE, with substeps on the shifted grid."""
    denoiser, x = GMDenoiser(load_checkpoint(files["gm"]).model, torch.arange(2)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        still, usual, even = (solve(Setting("gm-ode2", 1, substeps=4, reanchored=again, shift=shift), denoiser, x)
                              for again, shift in ((False, 2.5), (True, 2.5), (False, 1.0)))
    assert torch.equal(still, usual) and not torch.allclose(still, even, atol=1e-4)


def test_a_tilt_of_what_is_not_done_makes_no_other_row():
    """A row of another default is the same row where nothing is tilted."""
    both = {"tilt", "guidance_tilt"}
    for solver, guidance, same in (("gm-ode1", 0.0, both), ("gm-ode2", 0.0, {"guidance_tilt"}), ("euler", 0.0, both),
                                   ("gm-ode1", 0.4, {"tilt"}), ("gm-sde2", 0.4, set())):
        setting = Setting(solver, 3, guidance)
        for name in ("tilt", "guidance_tilt"):
            other = setting.to_dict() | {name: "published"}
            assert (setting.wanted().items() <= other.items()) == (name in same)


@pytest.mark.parametrize("arguments, shift, substeps", [
    ((), 2.5, 3), (("--shift", "1"), 1.0, 3), (("--ablations",), 2.5, 3), (("--substeps", "0"), 2.5, 0),
    (("--substeps", "5"), 2.5, 5),
])
def test_a_checkpoint_is_evaluated_as_it_is_sampled(files, arguments, shift, substeps):
    """Every solver, ablations too, unless another time shift is asked for, and GM-ODE's substeps; titles say it."""
    subject = open_subject(files["gm"], None, CPU, "float32")
    subject = replace(subject, checkpoint=replace(subject.checkpoint, time_shift=2.5, total_substeps=24))
    words = ("x", "--data", "digits", "--steps", "8", "--solvers", "gm-ode2", "gm-sde2", "euler", "unipc", *arguments)
    found = settings(subject, parse(words))
    assert {s.shift for s in found} == {shift}
    assert all(("shift 2.5" in s.title) == (shift == 2.5) for s in found)
    taken = {s.substeps for s in found if s.solver == "gm-ode2"}
    assert taken == ({1, 3} if "--ablations" in arguments else {substeps})
    assert {s.substeps for s in found if s.solver != "gm-ode2"} == {0}


def test_rows_that_say_no_time_shift_are_of_the_uniform_grid(files, tmp_path, quick):
    words = (files["gm"], "--data", "digits", "--solvers", "gm-ode1", "--steps", 1, "--out", tmp_path)
    assert run(*words) == 0
    path = tmp_path / RESULTS
    content = json.loads(path.read_text())
    del content["rows"][0]["shift"]
    path.write_text(json.dumps(content))
    assert run(*words, "--shift", 1) == 0 and len(rows(tmp_path)) == 1
    assert run(*words, "--shift", 3) == 0 and [r.get("shift") for r in rows(tmp_path)] == [None, 3.0]


def test_impossible_settings():
    with pytest.raises(ValueError, match="solver must be one of gm-ode1, .*got 'heun'"):
        Setting("heun", 4)
    with pytest.raises(ValueError, match="only gm-ode2"):
        Setting("gm-sde2", 4, reanchored=False)


# ---- real images -------------------------------------------------------------------------------

def test_digits_come_in_every_ink():
    images = DigitImages()
    assert len(images) == 6 * 1797 == len(images.labels)
    pixels = images.pixels(torch.arange(6) * 1797)
    assert len({tuple(p.flatten(1).amax(1).tolist()) for p in pixels}) == 6
    assert (pixels.amax(1) == pixels[:1].amax(1)).all()


def folder_of_images(root, size=20, count=6):
    rng = np.random.default_rng(0)
    for name, red in (("ant", 200), ("bee", 20)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(0, 50, (size, size, 3), dtype=np.uint8)
            array[..., 0] += red
            Image.fromarray(array).save(root / name / f"{i}.png")
    return root


def mean_colour(pixels):
    return pixels.float().mean((2, 3)) + torch.tensor([0.0, 1.0, 2.0])


def test_a_reference_is_kept_and_read_back(tmp_path):
    images = real_images(str(folder_of_images(tmp_path / "bugs")), 16)
    reference = measure_reference(images, mean_colour, 100)
    pixels = images.pixels(torch.arange(12))
    assert pixels.shape == (12, 3, 16, 16)
    torch.testing.assert_close(reference.moments, moments(mean_colour(pixels)))
    assert reference.saturation == pytest.approx(saturation(pixels).mean().item()) and reference.count == 12
    assert sorted(reference.labels.tolist()) == [0] * 6 + [1] * 6 and reference.name == "bugs"
    save_reference(tmp_path / "r.safetensors", reference, "colours")
    again = load_reference(tmp_path / "r.safetensors", "colours")
    assert torch.equal(again.features, reference.features) and again.saturation == reference.saturation
    assert load_reference(tmp_path / "r.safetensors", "others") is None
    assert load_reference(tmp_path / "absent", "colours") is None
    assert measure_reference(images, mean_colour, 8).count == 8


def test_a_file_of_adm(tmp_path, rng):
    array = torch.randint(0, 256, (9, 8, 8, 3), generator=rng).to(torch.uint8)
    np.savez(tmp_path / "a.npz", arr_0=array.numpy())
    images = real_images(str(tmp_path / "a.npz"), 8)
    assert torch.equal(images.pixels(torch.tensor([3])), array[3:4].permute(0, 3, 1, 2))
    reference = measure_reference(images, mean_colour, 100)
    assert (reference.labels == -1).all()
    np.savez(tmp_path / "b.npz", arr_0=array.numpy(), mu=np.full(3, 5.0), sigma=np.eye(3))
    given = measure_reference(real_images(str(tmp_path / "b.npz"), 8), mean_colour, 100)
    assert given.mean.tolist() == [5, 5, 5] and torch.equal(given.cov, torch.eye(3, dtype=torch.float64))
    np.savez(tmp_path / "c.npz", arr_0=array.numpy(), mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="its mu has 7 features, the feature network 3"):
        measure_reference(real_images(str(tmp_path / "c.npz"), 8), mean_colour, 100)
    np.savez(tmp_path / "d.npz", images=array.numpy())
    with pytest.raises(ValueError, match=r"expected images arr_0 \(N,H,W,3\) uint8"):
        real_images(str(tmp_path / "d.npz"), 8)
    (tmp_path / "e.npz").write_text("no")
    with pytest.raises(ValueError, match="e.npz: cannot be read as .npz"):
        real_images(str(tmp_path / "e.npz"), 8)


# ---- figures -----------------------------------------------------------------------------------

def test_likelihood_is_that_of_the_mixture(files, monkeypatch):
    """Recomputed with torch.distributions from the network's own output."""
    monkeypatch.setattr("train.evaluate.subject.NLL_SAMPLES", 3)
    subject = open_subject(files["gm"], None, CPU, "float32")
    images = DigitImages()
    found = likelihood(subject, images, batch=3)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:3]
    x_0, labels, generator = (images.pixels(chosen).float() / 127.5 - 1, images.labels[chosen],
                              torch.Generator().manual_seed(0))
    means = []
    for j in range(16):
        s, noise = (j + 0.5) / 16, torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            packed = subject.checkpoint.model((1 - s) * x_0 + s * noise, torch.full((3,), s), labels)
            v = subject.checkpoint.model.mixture(packed)
        std = v.log_std.exp()[:, 0, 0, 0, 0].view(3, 1, 1, 1, 1)
        normal = torch.distributions.Independent(torch.distributions.Normal(v.means.permute(0, 3, 4, 1, 2), std), 1)
        weights = torch.distributions.Categorical(logits=v.log_weights[:, :, 0].permute(0, 2, 3, 1))
        log_prob = torch.distributions.MixtureSameFamily(weights, normal).log_prob((noise - x_0).permute(0, 2, 3, 1))
        means.append(-log_prob.mean().item())
    assert found["mean"] == pytest.approx(sum(means) / 16, rel=1e-4)
    assert found["quarters"] == pytest.approx([sum(means[4 * q : 4 * q + 4]) / 4 for q in range(4)], rel=1e-4)
    assert likelihood(open_subject(files["vanilla"], None, CPU, "float32"), images, 3) is None


# ---- the command -------------------------------------------------------------------------------

def test_a_sweep_is_resumed_and_added_to(files, tmp_path, quick, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(files["gm"], "--data", "digits", "--steps", 1, 2, "--guidance", 0, 0.3, 0.6, "--cfg", 2,
               "--out", out) == 0
    first = rows(out)
    assert len(first) == 2 * 2 * 4
    row = next(r for r in first if r["solver"] == "gm-ode2" and r["steps"] == 2 and r["guidance"] == 0.3)
    checkpoint, labels = load_checkpoint(files["gm"]), torch.arange(12) % 10
    setting = Setting("gm-ode2", 2, 0.3)
    x = sample_images(checkpoint, setting, labels, 0)
    assert row["saturation"] == pytest.approx(saturation(quantise(x)).mean().item(), rel=1e-4)
    assert {"fid", "precision", "recall", "overshoot", "accuracy", "on_palette", "one_ink",
            "images_per_second"} <= set(row)
    assert Image.open(out / row["picture"]).size == (2 + 5 * 50, 2 + 2 * 50)

    monkeypatch.setattr(evaluate_rows, "sample_images", lambda *_: pytest.fail("a finished row is sampled again"))
    assert run(files["gm"], "--data", "digits", "--steps", 1, 2, "--guidance", 0, 0.3, 0.6, "--cfg", 2,
               "--out", out) == 0
    assert rows(out) == first
    monkeypatch.setattr(evaluate_rows, "sample_images", sample_images)
    assert run(files["k3"], files["vanilla"], "--data", "digits", "--steps", 1, 2, "--out", out) == 0
    assert len(rows(out)) == len(first) + 4 + 2 and rows(out)[: len(first)] == first
    content = json.loads((out / RESULTS).read_text())
    assert ([(c["components"], c["vanilla"], c["steps"]) for c in content["checkpoints"].values()]
            == [(2, False, 7), (3, False, 7), (1, True, 7)])
    assert content["checkpoints"]["gm"]["nll"] and content["checkpoints"]["plain"]["nll"] is None
    for name in ("figure6.png", "figure7.png", "saturation.png", "compare.png"):
        assert min(Image.open(out / name).size) > 100
    table = (out / "table.md").read_text()
    assert table.count("\n| gm |") == 17 and "Euler (DDIM)" in table and table in capsys.readouterr().out

    assert run(files["gm"], "--data", "digits", "--out", out, "--seed", 4) == 2
    assert "compares with something else (seed: 0 there, 4 asked for); choose another --out" in capsys.readouterr().err
    other = save(tmp_path / "gm.safetensors", 4)
    assert run(other, "--data", "digits", "--out", out) == 2
    assert "another checkpoint of the name gm" in capsys.readouterr().err


def test_what_suits_a_checkpoint(files):
    gm, vanilla = (open_subject(files[k], None, CPU, "float32") for k in ("gm", "vanilla"))
    ask = lambda *more: parse(["x", "--data", "digits", "--steps", "4", "8", *more])  # noqa: E731
    assert [(s.solver, s.steps) for s in settings(gm, ask())] == [("gm-ode2", 4), ("gm-ode2", 8), ("gm-sde2", 4),
                                                                  ("gm-sde2", 8)]
    assert [s.solver for s in settings(vanilla, ask())] == ["euler", "euler"]
    both = ask("--solvers", "gm-ode1", "ddpm", "--guidance", "0", "0.3", "--cfg", "2", "--corrections", "1")
    assert {(s.solver, s.guidance, s.method, s.corrections) for s in settings(gm, both)} == {
        (s, w, m, c) for s, c in (("gm-ode1", 1), ("ddpm", 0))
        for w, m in ((0.0, "probabilistic"), (0.3, "probabilistic"), (2.0, "cfg"))}
    assert {(s.solver, s.guidance, s.method) for s in settings(vanilla, both)} == {("ddpm", 0.0, "probabilistic"),
                                                                                   ("ddpm", 2.0, "cfg")}
    found = settings(gm, parse(["x", "--data", "digits", "--solvers", "gm-ode1", "--steps", "4", "--guidance", "0.3",
                                "--ablations"]))
    assert [s.title for s in found] == ["GM-ODE 1", "GM-SDE 2", "GM-SDE 2, white noise", "SDE-DPM++ 2M", "GM-ODE 2",
                                        "GM-ODE 2, 1 substep", "GM-ODE 2, no re-anchoring",
                                        "GM-ODE 2, published tilt, published guidance",
                                        "GM-SDE 2, published tilt, published guidance", "GM-ODE 2, no projection"]


def test_a_folder_of_images_and_inception(tmp_path, quick, monkeypatch):
    """Features stand in for Inception's; accuracy is by neighbours, likelihood needs the same classes."""
    monkeypatch.setattr(evaluate_sweep, "inception", lambda weights, device: mean_colour)
    folder = folder_of_images(tmp_path / "bugs")
    same, other = (save(tmp_path / "same.safetensors", classes=2, names=("ant", "bee")),
                   save(tmp_path / "other.safetensors", 3, classes=2))
    assert run(same, other, "--data", folder, "--steps", 2, "--solvers", "gm-ode1", "--out", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / RESULTS).read_text())
    mine, strange = content["rows"]
    assert 0 <= mine["accuracy"] <= 1 and mine["fid"] > 0 and strange["fid"] > 0 and "accuracy" not in strange
    assert content["checkpoints"]["same"]["nll"]["mean"] and content["checkpoints"]["other"]["nll"] is None


def test_a_folder_of_small_pictures_and_a_classifier_of_them(tmp_path, quick, monkeypatch):
    """The classifier of the folder gives features and accuracy; the table says how well it reads;
    rows keep more samples."""
    monkeypatch.setattr("train.evaluate.features.STEPS", 60)
    folder = folder_of_images(tmp_path / "bugs", 16, 20)
    model, out = save(tmp_path / "gm.safetensors", classes=2, names=("ant", "bee")), tmp_path / "out"
    assert run(model, "--data", folder, "--features", "classifier", "--steps", 2, "--solvers", "gm-ode1", "--shown", 8,
               "--out", out) == 0
    content = json.loads((out / RESULTS).read_text())
    (row,) = content["rows"]
    assert content["features"] == "classifier" and content["classifier"]["held_out"] == 1 and 0 <= row["accuracy"] <= 1
    assert row["mottling"] > 5 and 5 < content["classifier"]["real_mottling"] < 30  # of a network not trained, of noise
    table = (out / "table.md").read_text()
    assert "a classifier's that reads 100.00% of held-out real images; the mottling of real" in table
    assert "| mottling |" in table
    assert Image.open(out / row["picture"]).size == (4 * 48 + 5 * 2, 2 * 48 + 3 * 2)
    assert run(model, "--data", folder, "--steps", 2, "--out", out) == 2  # features of another kind


def test_the_classifier_is_kept_with_the_figures_of_its_features(tmp_path, quick, monkeypatch):
    """The same command again neither learns nor measures; where the classifier is gone, both are done again:
    an older reference would be of other features."""
    folder, out = folder_of_images(tmp_path / "bugs", 16, 20), tmp_path / "out"
    model = save(tmp_path / "gm.safetensors", classes=2, names=("ant", "bee"))
    done, both = [], ["train_classifier", "measure_reference"]

    def spied(name, work):
        return lambda *given, **options: done.append(name) or work(*given, **options)

    for name in both:
        monkeypatch.setattr(evaluate_sweep, name, spied(name, getattr(evaluate_sweep, name)))
    for steps, wanted in ((1, both), (2, [])):
        assert run(model, "--data", folder, "--features", "classifier", "--solvers", "gm-ode1", "--steps", steps,
                   "--out", out) == 0
        assert done == wanted
        done.clear()
    (out / CLASSIFIER).write_bytes(b"half")
    assert run(model, "--data", folder, "--features", "classifier", "--solvers", "gm-ode1", "--steps", 3, "--out",
               out) == 0
    assert done == both and len(rows(out)) == 3


def tiny_vae(path, **options):
    kl = importable("diffusers", "AutoencoderKL")
    torch.manual_seed(0)
    kl(**(dict(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, scaling_factor=0.7) | options)).save_pretrained(path)
    return path


def test_latents_are_decoded(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_sweep, "inception", lambda weights, device: mean_colour)
    vae, folder = tiny_vae(tmp_path / "vae"), folder_of_images(tmp_path / "bugs")
    model = save(tmp_path / "latent.safetensors", classes=2, channels=4, size=8, space=LatentSpace("sd-vae", 0.7, 0.0),
                 names=("ant", "bee"))
    assert run(model, "--data", folder, "--steps", 2, "--out", tmp_path / "out") == 2
    assert "a model of latents (sd-vae); name their VAE with --vae" in capsys.readouterr().err
    assert run(model, "--data", folder, "--steps", 2, "--vae", vae, "--out", tmp_path / "out") == 0
    (row, _), content = rows(tmp_path / "out"), json.loads((tmp_path / "out" / RESULTS).read_text())
    assert row["fid"] > 0 and content["checkpoints"]["latent"]["nll"]["mean"]
    net = load_vae(str(vae), CPU)
    decode = Decoder(net, "vae", LatentSpace("sd-vae", 0.7, 0.0), 4)
    z = torch.randn(1, 4, 8, 8)
    assert decode.size(8) == 16 and torch.equal(decode(z), net.decode(z / 0.7).sample)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(decode.encode(image), 0.7 * net.encode(image).latent_dist.mean)
    with pytest.raises(ValueError, match="decodes 4 channels, the model makes 16"):
        Decoder(net, "vae", LatentSpace("sd-vae", 0.7), 16)
    with pytest.raises(ValueError, match="has the scale 0.7, the model's latents 0.18215"):
        Decoder(net, "vae", LatentSpace("sd-vae", 0.18215), 4)


@pytest.mark.parametrize("arguments, message", [
    (["--data", "digits", "--solvers", "heun"], "no solver heun; there are gm-ode1"),
    (["--data", "digits", "--guidance", "1.5"], r"probabilistic scales in \[0, 1\), got 1.5; CFG scales are --cfg"),
    (["--data", "digits", "--cfg", "0.5"], "--cfg must be >= 1, got 0.5"),
    (["--data", "digits", "--steps", "0"], "--steps must be >= 1, got 0"),
    (["--data", "digits", "--shown", "0"], "--shown must be >= 1, got 0"),
    (["--data", "digits", "--seed", "-1"], r"'-1' is not a whole number in \[0, 4294967295\]"),
    (["--data", "digits", "--features", "classifier"], "the digits have features of their own"),
])
def test_bad_arguments(files, arguments, message, capsys):
    import re

    with pytest.raises(SystemExit):
        main([str(files["gm"]), *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_bad_input(files, tmp_path, capsys, quick):
    mlp = GMMLP(GMMLPConfig(num_gaussians=2, width=8, num_layers=2))
    save_checkpoint(tmp_path / "points.safetensors", mlp)
    folder = folder_of_images(tmp_path / "bugs")
    wide = save(tmp_path / "wide.safetensors", size=32)
    for arguments, message in (
        ((tmp_path / "points.safetensors", "--data", "digits"), "a model of 2D points"),
        ((tmp_path / "absent.safetensors", "--data", "digits"), "absent.safetensors"),
        ((wide, "--data", "digits"), "--data digits are 16x16 pictures, the model makes 32x32"),
        ((files["gm"], wide, "--data", folder), "wide makes 32 pixels, gm 16: evaluate them apart"),
        ((files["gm"], files["gm"], "--data", "digits"), "checkpoints need different names"),
        ((files["vanilla"], "--data", "digits", "--solvers", "gm-ode2"),
         "nothing to sample plain with: a vanilla model takes --solvers euler"),
        ((files["vanilla"], "--data", "digits", "--guidance", "0.3"), "and --guidance 0 or --cfg"),
        ((files["gm"], "--data", folder / "ant" / "0.png"), "is a file; the data must be a folder"),
        ((files["gm"], "--data", folder, "--inception", tmp_path / "no.pth"), "no.pth"),
    ):
        assert run(*arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RESULTS).write_text("[]")
    assert run(files["gm"], "--data", "digits", "--out", tmp_path / "broken") == 2
    assert "not results of this program" in capsys.readouterr().err
    assert (tmp_path / "broken" / RESULTS).read_text() == "[]"


# ---- the figures' lines ------------------------------------------------------------------------

def test_curves_begin_unguided_and_rise():
    def row(steps, guidance, method="probabilistic", **more):
        return {"checkpoint": "a", "precision": guidance, **Setting("gm-ode2", steps, guidance, method).to_dict(),
                **more}

    found = [row(8, 0.5), row(8, 0.0), row(8, 0.2), row(4, 0.0), row(4, 0.3), row(8, 3.0, "cfg"), row(8, 2.0, "cfg")]
    lines = curves({"rows": found, "checkpoints": {"a": {"vanilla": False}}})
    assert {name: [r["guidance"] for r in line] for name, line in lines.items()} == {
        "GMFlow, GM-ODE 2, probabilistic": [0.0, 0.2, 0.5], "GMFlow, GM-ODE 2, CFG": [0.0, 2.0, 3.0]}


def test_a_table_without_figures_is_still_one():
    results = {"rows": [], "checkpoints": {}, "samples": 5, "seed": 0, "real_images": 3, "reference": "x",
               "real_saturation": 0.5}
    assert "5 samples a row" in markdown(results)


# ---- by content and by name --------------------------------------------------------------------

def pictures(folder, seed, names=("a", "b"), count=8, size=16):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            base = rng.integers(0, 256, 3)
            noise = rng.integers(-20, 20, (size, size, 3))
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def mean_features(monkeypatch):
    """Features that need no download: the mean colour and its spread."""
    def features(weights, device):
        return lambda pixels: torch.cat([pixels.float().mean((2, 3)), pixels.float().std((2, 3))], 1)

    monkeypatch.setattr(evaluate_sweep, "inception", features)
    monkeypatch.setattr("train.evaluate.subject.NLL_SAMPLES", 4)


def test_statistics_are_those_of_the_data_and_not_of_its_folders_name(tmp_path, mean_features, capsys):
    """cats/train, then dogs/train, into one folder: the cats' FID would be repeated to the last digit."""
    model = save(tmp_path / "m.safetensors", classes=2, names=("a", "b"))
    cats, dogs = pictures(tmp_path / "cats" / "train", 0), pictures(tmp_path / "dogs" / "train", 1)
    assert run(model, "--data", cats, "--out", tmp_path / "out", "--steps", 1) == 0
    before = (tmp_path / "out" / REFERENCE).read_bytes()
    assert run(model, "--data", dogs, "--out", tmp_path / "out", "--steps", 2) == 2
    assert "compares with something else" in capsys.readouterr().err
    assert (tmp_path / "out" / REFERENCE).read_bytes() == before
    assert run(model, "--data", dogs, "--out", tmp_path / "dogs-out", "--steps", 1) == 0
    assert rows(tmp_path / "out")[0]["fid"] != rows(tmp_path / "dogs-out")[0]["fid"]
    moved = cats.rename(tmp_path / "elsewhere")  # the same data under another name
    assert run(model, "--data", moved, "--out", tmp_path / "out", "--steps", 2) in (0, 2)
    assert (tmp_path / "out" / REFERENCE).read_bytes() == before


def test_classes_are_compared_by_name(tmp_path, mean_features, capsys):
    """A model whose classes are the data's in another order: the same accuracy and likelihood as in the data's
    order."""
    data = pictures(tmp_path / "data", 0, names=("a", "b", "c"))
    images = real_images(str(data), 16)
    names = {"same": ("a", "b", "c"), "turned": ("c", "a", "b"), "other": ("a", "b", "x")}
    subjects = {}
    for kind, order in names.items():
        path = save(tmp_path / f"{kind}.safetensors", classes=3, names=order)
        subjects[kind] = open_subject(path, None, CPU, "float32")
    assert classes_in_data(subjects["same"], images).tolist() == [0, 1, 2]
    assert classes_in_data(subjects["turned"], images).tolist() == [2, 0, 1]
    assert classes_in_data(subjects["other"], images) is None and likelihood(subjects["other"], images, 4) is None
    assert "other has not the data's classes (a, b, x; in the data a, b, c)" in capsys.readouterr().err
    # The turned model's table holds the same rows in its own order: then all is equal.
    table = "emb.class_embedder.embedding_table.weight"
    turned, same = (subjects[kind].checkpoint.model.state_dict() for kind in ("turned", "same"))
    turned[table].copy_(same[table][[2, 0, 1, 3]])
    assert likelihood(subjects["turned"], images, 4) == likelihood(subjects["same"], images, 4)
    assert run(tmp_path / "other.safetensors", "--data", data, "--out", tmp_path / "out", "--steps", 1) == 0
    assert "accuracy" not in rows(tmp_path / "out")[0]


def test_a_model_without_names_is_taken_at_its_order(tmp_path, capsys):
    data = real_images(str(pictures(tmp_path / "data", 0)), 16)
    path = save(tmp_path / "m.safetensors", classes=2, names=("a", "b"))
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint.model, checkpoint.spectrum)
    assert classes_in_data(open_subject(path, None, CPU, "float32"), data).tolist() == [0, 1]
    assert "names no classes: they are taken to be the data's" in capsys.readouterr().err


def test_equal_checkpoints_of_other_bytes_are_one(tmp_path, files, quick):
    """Older files have their metadata in any order; results of older versions name a digest of the bytes."""
    content = files["gm"].read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    other = tmp_path / "gm.safetensors"
    other.write_bytes(content[:8] + text + content[8 + length :])
    assert other.read_bytes() != content and digest(other) == digest(files["gm"])
    assert digest(files["k3"]) != digest(files["gm"])
    assert run(files["gm"], "--data", "digits", "--out", tmp_path / "out", "--steps", 1) == 0
    assert run(other, "--data", "digits", "--out", tmp_path / "out", "--steps", 1, 2) == 0
    assert len(rows(tmp_path / "out")) == 4  # nothing twice
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    for part in (results["checkpoints"]["gm"], *results["rows"]):
        part["digest"] = old_digest(other)
    del results["reference_content"]
    (tmp_path / "out" / RESULTS).write_text(json.dumps(results))
    assert run(other, "--data", "digits", "--out", tmp_path / "out", "--steps", 1, 2) == 0
    assert len(rows(tmp_path / "out")) == 4 and rows(tmp_path / "out")[0]["digest"] == digest(other)


def test_a_grey_model(tmp_path, mean_features):
    data = pictures(tmp_path / "data", 0)
    model = save(tmp_path / "m.safetensors", classes=2, channels=1, names=("a", "b"))
    assert run(model, "--data", data, "--out", tmp_path / "out", "--steps", 1) == 0
    row = rows(tmp_path / "out")[0]
    assert row["saturation"] == 0 and row["fid"] > 0 and "accuracy" in row
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["checkpoints"]["m"]["nll"]["mean"] is not None


def test_two_evaluations_in_one_folder(tmp_path, files, capsys):
    with locked(tmp_path, "evaluates"):
        assert run(files["gm"], "--data", "digits", "--out", tmp_path) == 2
    assert "another process evaluates in this folder" in capsys.readouterr().err
