"""Evaluation by several processes against one; sample sets that others read; when an FID means little."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import CPU, files, folder_of_images, quick, rows, run, save  # noqa: F401  fixtures

from gmflow_core import load_checkpoint
from train.evaluate import rows as evaluate_rows
from train.evaluate.__main__ import main
from train.evaluate.figures import markdown
from train.evaluate.image_metrics import quantise
from train.evaluate.reference import Reference, real_images
from train.evaluate.results import RESULTS
from train.evaluate.settings import SOLVERS, Setting, sample_images
from train.evaluate.sweep import REFERENCE, say_few
from train.team import Team

ROOT = Path(__file__).parent.parent

QUICK = """
import sys
import train.evaluate.features, train.evaluate.subject
train.evaluate.features.STEPS, train.evaluate.subject.NLL_SAMPLES = 2, 4
from train.evaluate.__main__ import main
sys.exit(main())
"""
BROKEN = """
import os, sys
import train.evaluate.sweep
if os.environ["RANK"] == "1":
    def opened(*_):
        raise ValueError("the second\\nprocess cannot")
    train.evaluate.sweep.opened = opened
from train.evaluate.__main__ import main
sys.exit(main())
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def common(model, out) -> list[str]:
    return [str(model), "--data", "digits", "--samples", "32", "--batch", "6", "--real-samples", "300", "--steps", "2",
            "--guidance", "0.3", "--device", "cpu", "--npz", "--out", str(out)]


# ---- several processes -------------------------------------------------------------------------

@pytest.fixture
def one_thread():
    """As torchrun's processes have: sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(files, quick, one_thread, tmp_path, capsys):  # noqa: F811
    """Six batches, the last of two samples: three rounds of two. The same images, so the same figures."""
    script = tmp_path / "quick.py"
    script.write_text(QUICK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, str(script), *common(files["gm"], tmp_path / "two")], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main(common(files["gm"], tmp_path / "one")) == 0
    for output, errors in ((done.stdout, done.stderr), capsys.readouterr()):  # the first alone speaks
        assert output.count("32 samples a row") == 1
        assert errors.count("FID means little here: 32 samples are fewer than the 64 features") == 1
    two, one = (json.loads((tmp_path / name / RESULTS).read_text()) for name in ("two", "one"))
    assert len(two["rows"]) == len(one["rows"]) == 2
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        for key in ours.keys() - {"seconds", "images_per_second"}:
            number = isinstance(theirs[key], float)
            assert ours[key] == (pytest.approx(theirs[key], rel=1e-5, abs=1e-9) if number else theirs[key]), key
        a, b = (np.load(tmp_path / name / ours["npz"]) for name in ("two", "one"))
        assert all(np.array_equal(a[key], b[key]) for key in ("arr_0", "arr_1"))
    assert {key: two[key] for key in two.keys() - {"rows", "checkpoints"}} == \
        {key: one[key] for key in one.keys() - {"rows", "checkpoints"}}
    assert two["checkpoints"]["gm"]["nll"] == one["checkpoints"]["gm"]["nll"]
    names = [{p.name for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("two", "one")]
    assert names[0] == names[1] and REFERENCE in names[0]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_line(files, tmp_path):  # noqa: F811
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = [
        subprocess.Popen(
            [sys.executable, str(script), *common(files["gm"], tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port},
        ) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in team]
    assert said == [("", "error: the second process cannot (process 1 of 2)\n"), ("", "")]
    assert [process.returncode for process in team] == [2, 2]
    assert not (tmp_path / "out").exists()


def test_evidence_is_of_one_process(files, monkeypatch, capsys):  # noqa: F811
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main([str(files["gm"]), "--evidence", "half"]) == 2
    assert "--evidence is evaluated by one process" in capsys.readouterr().err


def test_a_team_of_one_does_all_itself():
    team = Team(CPU)
    assert team.together(max, 2, 3) == team.share(max, 2, 3) == team.at_first(max, 2, 3) == 3
    assert list(team.in_turn("abc", lambda i: 2 * i)) == [0, 2, 4]
    with pytest.raises(KeyError):
        team.together({}.__getitem__, "absent")


def test_what_others_of_a_team_say_is_not_heard(capsys):
    other, first = Team(CPU, 1, 2), Team(CPU, 0, 2)
    for team in (first, other):
        with team.quiet():
            print("said by", team.rank)
            print("written by", team.rank, file=sys.stderr)
    assert capsys.readouterr() == ("said by 0\n", "written by 0\n")
    for fault, code in ((KeyboardInterrupt(), 130), (RuntimeError("Connection closed by peer"), 2)):
        with pytest.raises(SystemExit) as end, other.quiet():
            raise fault
        assert end.value.code == code
        with pytest.raises(type(fault)), first.quiet():
            raise fault


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.startswith("gm") or s == "euler"] + ["ddpm", "sa"])
def test_an_image_is_the_same_in_any_batch(files, solver):  # noqa: F811
    if solver in ("ddpm", "sa"):
        pytest.importorskip("diffusers")
    checkpoint, setting, labels = load_checkpoint(files["gm"]), Setting(solver, 3, 0.3), torch.arange(7)
    whole = sample_images(checkpoint, setting, labels, 5)
    parts = [sample_images(checkpoint, setting, part, 5, first) for part, first in
             ((labels[:1], 0), (labels[1:5], 1), (labels[5:], 5))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=5e-4)  # kernels differ with the batch's size
    assert not torch.allclose(whole[0], sample_images(checkpoint, setting, labels[:1], 6)[0], atol=1e-2)


# ---- sample sets -------------------------------------------------------------------------------

def test_sample_sets_are_adms(files, quick, tmp_path, monkeypatch):  # noqa: F811
    """As numpy reads them: pixels as an image file would hold them, labels; as real images of this command."""
    out = tmp_path / "out"
    arguments = [files["gm"], "--data", "digits", "--steps", 2, "--solvers", "gm-ode1", "gm-sde1", "--out", out]
    assert run(*arguments, "--npz") == 0
    checkpoint, labels = load_checkpoint(files["gm"]), torch.arange(12) % 10
    for row in rows(out):
        with np.load(out / row["npz"]) as file:
            assert file.files == ["arr_0", "arr_1"]
            pixels, read = file["arr_0"], file["arr_1"]
        batches = [sample_images(checkpoint, Setting(row["solver"], 2), labels[i : i + 6], 0, i) for i in (0, 6)]
        want = quantise(torch.cat(batches))
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, want.permute(0, 2, 3, 1))
        assert read.dtype == np.int64 and np.array_equal(read, labels)
        again = real_images(str(out / row["npz"]), 16)
        assert torch.equal(again.pixels(torch.arange(12)), want)
    before = (out / RESULTS).read_text()
    (out / rows(out)[0]["npz"]).unlink()
    drawn = []
    monkeypatch.setattr(evaluate_rows, "sample_images", lambda *a: drawn.append(a[1].solver) or sample_images(*a))
    assert run(*arguments, "--npz") == 0 and run(*arguments, "--npz") == 0
    assert drawn == ["gm-ode1"] * 2  # two batches of the one that was gone
    assert (out / RESULTS).read_text() == before and (out / rows(out)[0]["npz"]).is_file()


def test_a_row_without_its_sample_set_gets_it_later(files, quick, tmp_path):  # noqa: F811
    arguments = [files["gm"], "--data", "digits", "--steps", 1, "--solvers", "gm-ode1", "--out", tmp_path]
    assert run(*arguments) == 0
    (first,) = rows(tmp_path)
    assert "npz" not in first and not list(tmp_path.rglob("*.npz"))
    assert run(*arguments, "--npz") == 0
    (row,) = rows(tmp_path)
    assert row == first | {"npz": first["picture"].replace(".png", ".npz")} and (tmp_path / row["npz"]).is_file()


def test_a_model_of_one_class_has_no_labels(tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.sweep.inception", lambda *_: lambda pixels: pixels.float().mean((2, 3)))
    monkeypatch.setattr("train.evaluate.subject.NLL_SAMPLES", 4)
    model = save(tmp_path / "m.safetensors", classes=1, names=("all",))
    assert run(model, "--data", folder_of_images(tmp_path / "bugs"), "--steps", 1, "--solvers", "gm-ode1", "--npz",
               "--out", tmp_path / "out") == 0
    assert np.load(tmp_path / "out" / rows(tmp_path / "out")[0]["npz"]).files == ["arr_0"]


def test_a_sample_set_is_whole_or_not_there(tmp_path, monkeypatch):
    """A full disk leaves the old set and no remains."""
    path = tmp_path / "samples" / "a.npz"
    evaluate_rows.save_set(path, np.zeros((2, 4, 4, 3), np.uint8), None)
    before = path.read_bytes()

    def full(file, *_):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="a.npz could not be written"):
        evaluate_rows.save_set(path, np.ones((2, 4, 4, 3), np.uint8), None)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.npz"]


# ---- few samples, older results ----------------------------------------------------------------

def reference_of(count: int, features: int) -> Reference:
    nothing = torch.zeros(0)
    return Reference("x", count, torch.zeros(features), nothing, nothing, nothing, nothing, 0.0)


@pytest.mark.parametrize("samples, count, features, known, said", [
    (1000, 5000, 2048, False, "1,000 samples are fewer than the 2,048 features, so that covariances are of deficient "
                              "rank; take 2,048 or more"),
    (5000, 1000, 2048, False, "1,000 real images are fewer"), (10, 20, 64, False, "10 samples and 20 real images are"),
    (5000, 1000, 2048, True, None), (2048, 2048, 2048, False, None), (1000, 1000, 64, False, None),
])
def test_where_a_covariance_has_no_full_rank_a_word_is_said(capsys, samples, count, features, known, said):
    say_few(samples, reference_of(count, features), known)
    told = capsys.readouterr().err
    assert told.count("\n") == (said is not None) and (said or "") in told


@pytest.mark.parametrize("samples, told", [(1000, True), (2047, True), (2048, False)])
def test_a_table_of_few_samples_says_what_its_fid_compares_with(samples, told):
    results = {"rows": [], "checkpoints": {}, "samples": samples, "seed": 0, "real_images": 3, "reference": "x",
               "real_saturation": 0.5}
    assert (f"with {samples} it compares with that of as many only" in markdown(results)) == told


def test_results_of_other_noise_are_not_added_to(files, quick, tmp_path, capsys):  # noqa: F811
    """Earlier versions drew the noise by batch: their rows are of other images."""
    arguments = [files["gm"], "--data", "digits", "--steps", 1, "--solvers", "gm-ode1", "--out", tmp_path]
    assert run(*arguments) == 0
    content = json.loads((tmp_path / RESULTS).read_text())
    assert content.pop("noise") == "by image"
    (tmp_path / RESULTS).write_text(json.dumps(content))
    assert run(*arguments) == 2
    assert "noise: by batch there, by image asked for); choose another --out" in capsys.readouterr().err
