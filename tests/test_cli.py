"""``python -m gmflow_core`` in-process: files, determinism, and one line for every bad argument."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from oracle import ExactPrior
from PIL import Image
from safetensors.torch import load_file

from gmflow_core import (
    GMMLP,
    GMDenoiser,
    GMDiT,
    GMDiTConfig,
    GMMLPConfig,
    SpectrumConfig,
    SpectrumMLP,
    demo,
    flow_sigmas,
    load_checkpoint,
    sample_gm_ode,
    sample_gm_sde,
    save_checkpoint,
)
from gmflow_core.__main__ import BUNDLED, main
from gmflow_core.inspection.charts import PALETTE
from gmflow_core.labels import LabelError, parse_labels
from gmflow_core.model import LatentSpace
from gmflow_core.noise import ImageNoise
from gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    config = GMDiTConfig(num_classes=4, num_gaussians=3, in_channels=3, sample_size=8, patch_size=4,
                         num_layers=1, num_heads=1, head_dim=16, logstd_width=8)
    model, spectrum = GMDiT(config), SpectrumMLP(SpectrumConfig((3, 8, 8), (8, 4)))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, model, spectrum, class_names=["cat", "dog", "tabby cat", "owl"])
    return path


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "2d.safetensors"
    save_checkpoint(path, GMMLP(GMMLPConfig(num_gaussians=3, width=16, num_layers=1)), latent_space=LatentSpace("2d"))
    return path


def run(capsys, *args) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_sample_writes_what_was_asked_for(checkpoint, tmp_path, capsys, solver):
    code, out, err = run(capsys, "sample", checkpoint, "--labels", "0,2-3, dog,0", "--solver", solver, "--steps", 2,
                         "--images", "--latents", "--out", tmp_path)
    assert code == 0 and "5 samples" in out and "100%" in err
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["0000-class0.png", "0001-class2.png", "0002-class3.png", "0003-class1.png", "0004-class0.png",
                     "grid.png", "samples.safetensors"]
    latents = load_file(tmp_path / "samples.safetensors")
    assert latents["samples"].shape == (5, 3, 8, 8) and latents["labels"].tolist() == [0, 2, 3, 1, 0]
    with Image.open(tmp_path / "0000-class0.png") as image:
        assert image.size == (8, 8)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size[0] > 5 * 8


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_the_same_seed_gives_the_same_image_in_any_batch(checkpoint, tmp_path, capsys, solver):
    def latents(labels, name, *extra):
        code, _, err = run(capsys, "sample", checkpoint, "--labels", labels, "--solver", solver, "--steps", 3,
                           "--latents", "--out", tmp_path / name, *extra)
        assert code == 0, err
        return load_file(tmp_path / name / "samples.safetensors")["samples"]

    whole = latents("0-3,0", "whole")
    torch.testing.assert_close(latents("0-3,0", "pairs", "--batch-size", 2), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(latents("0", "alone"), whole[:1], rtol=0, atol=2e-5)
    assert (whole[0] - whole[4]).abs().max() > 0.1  # the same label at another place is another image
    assert (latents("0", "seed", "--seed", 1) - whole[:1]).abs().max() > 0.1


@pytest.mark.parametrize("words, shift, substeps", [
    ((), 2.5, 7), (("--shift", "1"), 1.0, 7), (("--substeps", "4"), 2.5, 4),
])
def test_a_checkpoint_is_sampled_as_it_says(checkpoint, tmp_path, capsys, words, shift, substeps):
    """With its own time shift, of the grid and of substeps, and its share of substeps, unless others are asked for."""
    loaded = load_checkpoint(checkpoint)
    path = tmp_path / "shifted.safetensors"
    save_checkpoint(path, loaded.model, loaded.spectrum, time_shift=2.5, total_substeps=20)
    assert run(capsys, "sample", path, "--labels", "0,3", "--steps", 3, "--guidance", 0, "--order", 1, "--latents",
               "--out", tmp_path, *words)[0] == 0
    with torch.no_grad():
        x = ImageNoise(0, range(2), (3, 8, 8), "cpu")()
        expected = sample_gm_ode(GMDenoiser(loaded.model, torch.tensor([0, 3])), x, flow_sigmas(3, shift), order=1,
                                 substeps=substeps, shift=shift)
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["samples"], expected)


def test_noise_streams_are_standard_and_independent():
    noise = ImageNoise(5, range(64), (3, 16, 16), "cpu")
    a, b = noise().flatten(1), noise().flatten(1)
    everything = torch.cat([a, b, ImageNoise(6, range(64), (3, 16, 16), "cpu")().flatten(1)])
    assert abs(everything.mean()) < 0.01 and abs(everything.std() - 1) < 0.01
    correlation = torch.corrcoef(everything) - torch.eye(len(everything))
    assert correlation.abs().max() < 0.2  # 768 numbers each: 5.5 standard errors


@pytest.mark.parametrize("spectral", [False, True])
def test_a_run_cut_between_steps_goes_on_as_one(spectral):
    """GM-SDE of order 1, one step at a time with a new noise of the same seed:
    the unsplit run, and no draw comes twice."""
    prior, sigmas = ExactPrior.example(channels=3, dtype=torch.float32), flow_sigmas(5)
    spectrum, draws = None, []
    if spectral:
        spectrum = lambda gaussian: torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4).expand(4, -1, -1, -1)  # noqa: E731

    def solve(x, sigmas, keep=False):
        noise = ImageNoise(11, range(4), (3, 4, 4), "cpu")

        def sampler(*step):
            drawn = noise(*step)
            if keep:
                draws.append(drawn)
            return drawn

        return sample_gm_sde(prior.denoiser, x, sigmas, order=1, spectrum=spectrum, noise_sampler=sampler)

    start = ImageNoise(11, range(4), (3, 4, 4), "cpu")()
    whole, x = solve(start, sigmas), start
    for i in range(5):
        x = solve(x, sigmas[i : i + 2] + 2e-7 * (i % 2), keep=True)
    torch.testing.assert_close(x, whole, atol=1e-4, rtol=0)
    drawn = torch.cat([start.flatten(), *(d.flatten() for d in draws)]).reshape(-1, 48)  # 11 draws of 4 images
    assert len(draws) == 10 and (torch.cdist(drawn, drawn) + 9 * torch.eye(len(drawn))).min() > 3


def test_step_noise_does_not_depend_on_the_batch():
    both, alone = ImageNoise(3, [4, 9], (2, 2), "cpu"), ImageNoise(3, [9], (2, 2), "cpu")
    for step in ((), (0.5, 0.25), (0.5, 0.25), (0.25, 0.0)):
        assert torch.equal(both(*step)[1:], alone(*step))


def test_two_dimensional_models_take_a_count(points, tmp_path, capsys):
    code, out, _ = run(capsys, "sample", points, "--count", 100, "--steps", 1, "--substeps", 4, "--latents",
                       "--out", tmp_path)
    assert code == 0 and load_file(tmp_path / "samples.safetensors")["samples"].shape == (100, 2)


def test_labels():
    assert parse_labels("0, 2-4,1", 10, None) == [0, 2, 3, 4, 1]
    assert parse_labels("Tabby Cat,3", 4, ("cat", "dog", "tabby cat", "owl")) == [2, 3]
    assert parse_labels("tench, Tinca tinca", 2, ("cat", "tench, Tinca tinca")) == [1]  # a name may hold commas
    assert parse_labels("cat\nowl", 3, ("cat", "dog", "owl")) == [0, 2]
    for text, message in (
        ("4-2", "runs backwards"), ("10", "knows 0 to 9"), (" , ", "no label given"), ("kat", r"did you mean cat\?"),
        ("9" * 5000, r"'9+\.\.\. \(5,000 characters\)' is no class"), ("ca\x07" * 50, r"'ca\\x07ca"),
        ("0-9," * 200_000, "more than 1000000 labels"),
    ):
        with pytest.raises(LabelError, match=message):
            parse_labels(text, 10, ("cat", *"bcdefghij"))


NUMBERED = ("1", "10", "2")  # folders 1, 2, 10 in the order of their names


@pytest.mark.parametrize("text, classes", [
    ("0", [0]), ("#1", [1]), ('"1"', [0]), ('"10", #0', [1, 0]), ("10", [1]), ("0-2", [0, 1, 2]), ("#1-2", [1, 2]),
    ("#1-#2", [1, 2]),
    ('"2"\n"10"', [2, 1]), ("2", [2]),  # name and index of one class
])
def test_classes_that_are_called_numbers(text, classes):
    assert parse_labels(text, 3, NUMBERED) == classes


def test_a_number_that_means_two_classes_is_refused():
    with pytest.raises(LabelError,
                       match="'1' is the name of class 0 and index 1: write \"1\" for the name, #1 for the other"):
        parse_labels("1", 3, NUMBERED)
    with pytest.raises(LabelError, match="'1' is the name of class 0"):
        parse_labels("0-2, 1", 3, NUMBERED)
    with pytest.raises(LabelError, match="'1-2' is the name of class 0 and indices 1 to 2: .* #1-#2"):
        parse_labels("1-2", 3, ("1-2", "b", "c"))
    assert parse_labels("'a', b", 2, ("'a'", "b")) == [0, 1] and parse_labels('"a, b", c', 2, ("c", "a, b")) == [1, 0]
    digits = tuple(map(str, range(10)))
    assert parse_labels("0, 7, 2-3", 10, digits) == [0, 7, 2, 3]  # every number is its own index: nothing to ask


@pytest.mark.parametrize("text", ["\x1b[2J" * 10**5, "9" * 10**5, " " * 10**6 + "x", "\n" * 10**6 + "x", '"' * 10**5])
def test_labels_of_any_length_are_one_short_line(text):
    with pytest.raises(LabelError) as caught:
        parse_labels(text, 10, ("cat",))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


BAD = [
    (["--labels", "9"], "past the last class; this model knows 0 to 3"),
    (["--labels", "cow"], "'cow' is no class of this model"),
    (["--labels", ""], "no label given"),
    ([], "give either --labels"),
    (["--labels", "0", "--count", "1"], "give either --labels"),
    (["--labels", "0", "--guidance", "1"], "'1' is not a number in [0, 1)"),
    (["--labels", "0", "--guidance", "nan"], "'nan' is not a number in [0, 1)"),
    (["--labels", "0", "--steps", "0"], "'0' is not a whole number in [1, 10000]"),
    (["--labels", "0", "--steps", "2.5"], "'2.5' is not a whole number"),
    (["--labels", "0", "--order", "3"], "'3' is not a whole number in [1, 2]"),
    (["--labels", "0", "--substeps", "0"], "--substeps"),
    (["--labels", "0", "--solver", "euler"], "invalid choice: 'euler'"),
    (["--labels", "0", "--device", "warp"], "--device warp"),
    (["--labels", "0", "--seed", "-1"], "--seed"),
]


@pytest.mark.parametrize("extra, message", BAD)
def test_bad_arguments_of_sample(checkpoint, tmp_path, capsys, extra, message):
    code, out, err = run(capsys, "sample", checkpoint, "--out", tmp_path / "out", *extra)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, message", [
    (["sample", "nowhere.safetensors", "--labels", "0"], "nowhere.safetensors"),
    (["info", "nowhere.safetensors"], "nowhere.safetensors"),
    (["convert", "nowhere.safetensors", "x.safetensors"], "nowhere.safetensors"),
    (["convert", "nowhere.safetensors", "x.pth"], "must end in .safetensors"),
    (["paint"], "invalid choice: 'paint'"),
    ([], "required: COMMAND"),
    (["info"], "required: checkpoint"),
])
def test_bad_commands(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *args)
    assert code == 2 and message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    code, _, err = run(capsys, "sample", checkpoint, "--labels", "0", "--out", tmp_path / "taken")
    assert code == 2 and "taken" in err and err.count("\n") == 1


def test_info_and_convert(checkpoint, tmp_path, capsys):
    code, out, _ = run(capsys, "info", checkpoint)
    assert code == 0 and "K = 3" in out and "tabby cat" in out
    copy = tmp_path / "copy.safetensors"
    assert run(capsys, "convert", checkpoint, copy)[0] == 0
    for name, value in load_file(checkpoint).items():
        assert torch.equal(load_file(copy)[name], value)


def test_help_and_exit_codes_of_the_real_command(tmp_path):
    shown = subprocess.run([sys.executable, "-m", "gmflow_core", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "demo" in shown.stdout
    bad = subprocess.run([sys.executable, "-m", "gmflow_core", "sample"], capture_output=True, text=True)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and bad.stderr.count("\n") == 1


def test_inspect_draws_moves_counts_and_saves(checkpoint, tmp_path, capsys):
    """One picture, an animation over the steps, numbers, tensors: by the ending of --out."""
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.json", "a.safetensors"):
        code, out, err = run(capsys, "inspect", checkpoint, "--labels", "0,2", "--image", 1, "--steps", 3, "--view",
                             "components", "--pixel", 2, 5, "--out", tmp_path / "x" / name)
        assert code == 0 and name in out, err
    frames = Image.open(tmp_path / "x" / "a.gif"), Image.open(tmp_path / "x" / "a.webp")
    assert [frame.n_frames for frame in frames] == [3, 3] and frames[0].size == frames[1].size
    exact = Image.open(tmp_path / "x" / "a.png").convert("RGB")
    swatches = {PALETTE[k] for k in range(3)}
    assert swatches <= {colour for _, colour in exact.getcolors(1 << 24)}
    assert swatches <= {colour for _, colour in frames[0].convert("RGB").getcolors(1 << 24)}  # though a GIF has 256
    numbers = json.loads((tmp_path / "x" / "a.json").read_text())
    assert numbers["image"] == 1 and len(numbers["steps"]) == 3 and len(numbers["hypotheses"]) == 3
    assert all((step["pixel"]["x"], step["pixel"]["y"], len(step["pixel"]["means"])) == (2, 5, 3)
               for step in numbers["steps"])
    assert load_file(tmp_path / "x" / "a.safetensors")["step_002.guided.means"].shape == (2, 3, 3, 8, 8)


@pytest.mark.parametrize("arguments, words", [
    (["--step", 2], "step: got 2; this trace has steps 0 to 1 (-1 is the last)"),
    (["--image", 1], "image: got 1; this trace holds images 0 to 0"),
    (["--view", "aura"], "--view aura: must be one of components"),
    (["--arrange", "random"], "--arrange random: must be one of aligned, ranked, raw"),
    (["--view", "pixel", "--pixel", 0, 8], "pixel_y: got 8; this latent is 8 x 8"),
    (["--pixel", 8, 0, "--out", "y/a.json"], "pixel_x: got 8; this latent is 8 x 8"),
    (["--out", "x.bmp"], "--out x.bmp: must end in"),
])
def test_inspect_refuses_in_one_line(checkpoint, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "inspect", checkpoint, "--labels", 0, "--steps", 2, "--out",
                         tmp_path / "y" / "a.png", *arguments)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_demo_draws_its_pictures(tmp_path, capsys):
    code, out, _ = run(capsys, "demo", "--out", tmp_path)
    assert code == 0 and BUNDLED.exists()
    for name in ("solvers.png", "guidance.png", "beliefs.png"):
        assert str(tmp_path / name) in out
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300


@pytest.mark.parametrize("solver, solve", [("gm-ode", sample_gm_ode), ("gm-sde", sample_gm_sde)])
def test_the_solver_that_is_asked_for_paints(checkpoint, tmp_path, capsys, solver, solve):
    run(capsys, "sample", checkpoint, "--labels", "0,1", "--steps", 2, "--order", 1, "--solver", solver,
        "--guidance", 0, "--seed", 5, "--latents", "--out", tmp_path)
    loaded, noise = load_checkpoint(checkpoint), ImageNoise(5, range(2), (3, 8, 8), "cpu")
    options = dict(substeps=64) if solve is sample_gm_ode else dict(spectrum=loaded.spectrum, noise_sampler=noise)
    expected = solve(GMDenoiser(loaded.model, torch.tensor([0, 1])), noise(), flow_sigmas(2), order=1, **options)
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["samples"], expected, atol=1e-5, rtol=0)


def test_the_demo_s_rows_are_guided_as_their_titles_say(monkeypatch):
    """Samples that are as bright as they are guided: each row of the sheet shows its own scale."""
    monkeypatch.setattr(demo, "sample_images", lambda checkpoint, labels, options, guidance=0.3, **more: torch.full(
        (len(labels), 3, 24, 24), guidance))
    monkeypatch.setattr(demo, "sheet", lambda cells, titles, *rest: list(zip(cells, titles, strict=True)))
    checkpoint = SimpleNamespace(class_names=("cat", "dog"), time_shift=1.0, total_substeps=128)
    for (picture,), title in demo.draw_guidance(checkpoint, 0):
        scale = float(title.removeprefix("guidance "))
        assert picture.crop((4, 4, 8, 8)).getextrema()[0][0] == pytest.approx(127.5 * (scale + 1), abs=1)


def test_the_demo_paints_as_the_command_line_does(monkeypatch):
    found = []
    monkeypatch.setattr(demo, "sample_images", lambda checkpoint, labels, options, **more: found.append(
        (options.second_order.tilt, more["guidance_tilt"], options.shift, options.total_substeps))
        or torch.zeros(len(labels), 3, 24, 24))
    demo.draw_solvers(SimpleNamespace(class_names=("cat", "dog"), time_shift=2.5, total_substeps=24), 0)
    assert set(found) == {(SECOND_ORDER_TILT, GUIDANCE_TILT, 2.5, 24)}
