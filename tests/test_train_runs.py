"""Runs that end or begin in odd ways, and what people expect of a trainer:
settings, snapshots, averages, held-out data."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_train import CPU, TINY, equal_states, run
from test_train_robust import full, lines

import gmflow_core
from gmflow_core import GMDiTConfig, SpectrumConfig, load_checkpoint
from train import __main__ as command
from train.config import _RANGES, PRESETS, TrainConfig, changes, override
from train.folder import begin_again, check_export, locked
from train.holdout import split
from train.report import read_log
from train.runlog import append_line, read_lines
from train.settings import comments, read_settings, settings_help
from train.stop import SIGNALS, StopRequest
from train.team import launched
from train.trainer import CHECKPOINT, LOG, STATE, Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests" / "data" / "run_0_1_0"
OLD_CONFIG = replace(
    PRESETS["digits"], model=GMDiTConfig(num_classes=10, num_gaussians=2, in_channels=3, sample_size=16, patch_size=8,
                                         num_layers=1, num_heads=1, head_dim=8, logstd_width=4),
    spectrum=SpectrumConfig((3, 16, 16), (4, 2)), steps=4, batch_size=4, warmup=2, precision="float32", log_every=1,
    sample_every=6, save_every=3, tensorboard=False,
)


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of a run of version 0.1.0, stopped after two steps."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in (STATE, LOG):
        (folder / name).write_bytes((OLD / name).read_bytes())
    return folder


def main(monkeypatch, *arguments) -> int:
    small = ["train", "--threads", "1", "--device", "cpu"]
    if "--preset" not in arguments:
        small += ["--preset", "digits"]
    for setting in ("batch_size=2", "model.num_layers=1", "steps=2", "save_every=1", "warmup=0", "precision=float32",
                    "tensorboard=false"):
        small += ["--set", setting]
    monkeypatch.setattr(sys, "argv", small + [str(a) for a in arguments])
    return command.main()


# ---- bounds ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, words", [
    ("clip_norm=-1", "clip_norm must be >= 0"), ("transition_weight=-1", "transition_weight must be > 0"),
    ("transition_weight=0", "transition_weight must be > 0"), ("ema_decay=1", r"ema_decay must be in \[0, 1\), got 1"),
    ("betas=[0.9]", "betas must be two numbers"), ("betas=[0.9, 1.0]", r"betas must be in \[0, 1\), got 1"),
    ("betas=[0.9, NaN]", "betas must be in"), ("lr=NaN", "lr must be > 0, got nan"),
    ("lr=Infinity", "lr must be > 0, got inf"),
    ("sampling_shift=0", "sampling_shift must be in"), ("total_substeps=0", "total_substeps must be in"),
    ("weight_decay=NaN", "weight_decay"), ("time_std=0", "time_std must be > 0"), ("time_shift=-1", "time_shift"),
    ("seed=-1", "seed must be in"), ("holdout=1", "holdout must be in"), ("keep=-1", "keep must be >= 0"),
    ("ema_decays=[1]", "ema_decays must be in"),
    ("ema_decays=[0.999]", "each once"), ("ema_decays=[0.9, 0.9]", "each once"),
    ("model.constant_logstd=NaN", "constant_logstd"), ("data_path=x", "data digits needs no folder and would ignore x"),
])
def test_settings_out_of_bounds(setting, words):
    with pytest.raises(ValueError, match=words):
        override(PRESETS["digits"], [setting])


def test_every_number_has_bounds_and_nan_is_out_of_all():
    numbers = {f.name for f in fields(TrainConfig) if f.type in ("int", "float")}
    assert numbers == set(_RANGES)
    for name in numbers:
        with pytest.raises(ValueError, match=name):
            replace(TINY, **{name: float("nan")})


def test_a_clip_norm_of_zero_is_off():
    free, huge = (Trainer(replace(TINY, clip_norm=0.0, clip_from=0), None, CPU),
                  Trainer(replace(TINY, clip_norm=1e30, clip_from=0), None, CPU))
    before = {name: value.clone() for name, value in free.nets.state_dict().items()}
    free.train_step(), huge.train_step()
    assert equal_states(free, huge)
    assert not all(torch.equal(value, before[name]) for name, value in free.nets.state_dict().items())


@pytest.mark.parametrize("threads", ["-3", "0", "100000"])
def test_threads_have_bounds(monkeypatch, capsys, threads):
    assert main(monkeypatch, "--threads", threads) == 2
    assert "--threads" in capsys.readouterr().err


# ---- going on ----------------------------------------------------------------------------------

def test_a_run_of_0_1_0_goes_on(old, tmp_path, capsys):
    """Its third step is the one that 0.1.0 itself makes: these numbers are its."""
    assert "mean_weight" not in torch.load(old / STATE, weights_only=True)["config"]
    trainer = Trainer(OLD_CONFIG, old, CPU)
    assert (trainer.step, trainer.images) == (2, 8)
    numbers = trainer.train_step()
    assert numbers["loss"] == pytest.approx(2.5912954807281494, abs=1e-5)
    assert numbers["grad_norm"] == pytest.approx(4.471419811248779, rel=1e-4)
    trainer.save()
    again = Trainer(OLD_CONFIG, old, CPU)
    assert (again.step, again.images) == (3, 12) and equal_states(trainer, again)


def test_what_a_file_lacks_counts_as_the_default():
    whole, first = TINY.to_dict(whole=True), TINY.to_dict()
    assert changes(first, whole) == ([], []) == changes(whole, first)
    for name in ("mean_weight", "holdout", "flip", "seed", "clip_from"):  # whichever field: the rule is general
        lacks = {k: v for k, v in whole.items() if k != name}
        default = {f.name: f.default for f in fields(TrainConfig)}[name]
        assert changes(lacks, whole | {name: default}) == ([], [])
    lacks = whole | {"model": {k: v for k, v in whole["model"].items() if k != "constant_logstd"}}
    assert changes(lacks, whole) == ([], [])


def test_lr_batch_size_and_warmup_may_change_and_it_is_said(old, capsys):
    trainer = Trainer(replace(OLD_CONFIG, lr=0.5, batch_size=6, warmup=0), old, CPU)
    said = capsys.readouterr().err
    assert "lr: 0.001 there, 0.5 asked for" in said and "batch_size: 4 there, 6" in said
    assert "warmup: 2 there, 0" in said
    numbers = trainer.train_step()
    assert trainer.images == 8 + 6
    assert numbers["lr"] == pytest.approx(0.5 * 0.5 * (1 + torch.tensor(torch.pi / 2).cos().item()))
    with pytest.raises(ValueError, match="another configuration .label_dropout"):
        Trainer(replace(OLD_CONFIG, label_dropout=0.5, lr=0.5), old, CPU)


def test_a_cut_line_of_the_log_does_not_end_the_run(old, capsys, monkeypatch):
    log = old / LOG
    text = log.read_text()
    log.write_text(text[:-30] + text)  # a line cut by a full disk, and others behind it in the same line
    assert [line["step"] for line in read_log(old)] == [1, 2]
    assert "1 damaged lines are left out, the first is line 2" in capsys.readouterr().err
    trainer = Trainer(OLD_CONFIG, old, CPU)
    trainer.log(trainer.train_step())
    assert [line["step"] for line in lines(old)] == [1, 2, 3]


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    code = ("import resource, sys; from pathlib import Path; from train.runlog import append_line; "
            "path = Path(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (30, -1))\n"
            "try: append_line(path, 'x' * 100)\n"
            "except OSError as error: print(error)")
    path = tmp_path / LOG
    append_line(path, '{"step": 1}')
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr
    assert path.read_text() == '{"step": 1}\n'
    append_line(path, '{"step": 2}')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_what_a_run_can_do_without_does_not_end_it(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("of any kind")

    monkeypatch.setattr(command, "write_report", fail)
    monkeypatch.setattr(command, "save_samples", fail)
    assert main(monkeypatch, "--out", tmp_path) == 0
    said = capsys.readouterr().err
    assert "the report failed: of any kind" in said and "samples failed: of any kind; training goes on" in said
    assert load_checkpoint(tmp_path).training["step"] == 2


def test_a_finished_run_may_say_later_how_it_is_best_sampled(tmp_path, monkeypatch):
    """Its checkpoint is written anew, with the same weights; and a run's sample pictures are drawn so."""
    assert main(monkeypatch, "--out", tmp_path) == 0
    before, drawn = load_checkpoint(tmp_path), []
    monkeypatch.setattr(command, "save_samples", lambda *args, options, **rest: drawn.append(options))
    assert main(monkeypatch, "--out", tmp_path, "--set", "sampling_shift=3", "--set", "total_substeps=16") == 0
    after = load_checkpoint(tmp_path)
    assert (before.time_shift, before.total_substeps, after.time_shift, after.total_substeps) == (1, 128, 3, 16)
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    again = "--overwrite", "--set", "sampling_shift=3", "--set", "total_substeps=16"
    assert main(monkeypatch, "--out", tmp_path, *again) == 0
    assert {(options.shift, options.total_substeps) for options in drawn} == {(3.0, 16)}


def test_a_finished_checkpoint_without_a_state_is_not_replaced(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, "--out", tmp_path) == 0
    (tmp_path / STATE).unlink()
    content = (tmp_path / CHECKPOINT).read_bytes()
    assert main(monkeypatch, "--out", tmp_path) == 2
    assert f"holds {CHECKPOINT} but no {STATE} to go on from" in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == content
    assert main(monkeypatch, "--out", tmp_path, "--fresh") == 0
    assert (tmp_path / "earlier-1" / CHECKPOINT).read_bytes() == content and (tmp_path / STATE).exists()
    assert main(monkeypatch, "--out", tmp_path, "--overwrite", "--set", "seed=1") == 0
    assert not (tmp_path / "earlier-2").exists() and load_checkpoint(tmp_path).training["config"]["seed"] == 1


def test_begin_again_touches_nothing_of_others(tmp_path):
    for name in (STATE, "notes.txt", "checkpoint-0000010.safetensors", "samples-000010.png", "mine.safetensors"):
        (tmp_path / name).touch()
    begin_again(tmp_path, keep=False)
    assert sorted(os.listdir(tmp_path)) == ["mine.safetensors", "notes.txt"]


def test_a_log_of_a_run_that_never_saved_is_begun_anew(tmp_path):
    trainer = Trainer(TINY, tmp_path, CPU)
    run(trainer, 2)
    run(Trainer(TINY, tmp_path, CPU), 1)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys):
    with locked(tmp_path, "trains"):
        assert main(monkeypatch, "--out", tmp_path) == 2
        assert f"another process trains in this folder (process {os.getpid()})" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    assert main(monkeypatch, "--out", tmp_path) == 0
    assert ".lock" not in os.listdir(tmp_path)


def test_a_folder_whose_name_is_no_utf8(tmp_path, monkeypatch, capfd):
    folder = tmp_path / os.fsdecode(b"run-\xff")
    assert main(monkeypatch, "--out", folder, "--export", tmp_path / os.fsdecode(b"\xfe.safetensors")) == 0
    out, err = capfd.readouterr()
    assert "failed" not in err and r"\udcfe.safetensors" in out
    assert (folder / "report.html").exists() and load_checkpoint(folder).training["step"] == 2


@pytest.mark.parametrize("name, words", [("a.pth", "ends in .safetensors"), ("file/a.safetensors", "cannot be written"),
                                         ("", "ends in .safetensors")])
def test_a_bad_export_is_found_before_training(tmp_path, monkeypatch, capsys, name, words):
    (tmp_path / "file").touch()
    assert main(monkeypatch, "--out", tmp_path / "run", "--export", tmp_path / name) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
    check_export(tmp_path / "new" / "a.safetensors")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(tmp_path, monkeypatch, capsys, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(monkeypatch, "--device", device, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --device {device}: ") and err.count("\n") == 1


# ---- signals and kills -------------------------------------------------------------------------

def test_signals_of_this_system():
    assert {signal.SIGINT, signal.SIGTERM} <= set(SIGNALS)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_that_goes_away(tmp_path, hangups):
    """SIGHUP while stderr is a terminal that is closed: the run saves, although it can say nothing."""
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "--preset", "digits", "--out", str(tmp_path), "--threads", "1", "--set",
         "batch_size=2", "--set", "model.num_layers=1", "--set", "log_every=1", "--set", "tensorboard=false"],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )
    os.close(slave)
    os.set_blocking(master, False)
    begin = time.monotonic()
    while not (tmp_path / LOG).exists() and time.monotonic() - begin < 120:
        try:
            os.read(master, 10_000)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert load_checkpoint(tmp_path).training["step"] >= 1


KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_train import CPU, TINY
from dataclasses import replace
from train.folder import locked
from train.trainer import Trainer
folder = Path(sys.argv[1])
with locked(folder, "trains"):
    trainer = Trainer(replace(TINY, steps=10**6, lr_decay="constant"), folder, CPU)
    print(trainer.step, flush=True)
    while True:
        trainer.log(trainer.train_step())
        trainer.save()
"""


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """A run that is killed twenty times goes on every time, and at the end nothing of the kills is left."""
    step = -1
    for i in range(20):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        now = int(process.stdout.readline())
        assert now >= step
        step = now
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1 + 0.02 * i)
        process.kill()
        process.wait()
    with locked(tmp_path, "trains"):
        trainer = Trainer(replace(TINY, steps=10**6, lr_decay="constant"), tmp_path, CPU)
        steps = [line["step"] for line in lines(tmp_path)]
        assert trainer.step >= step > 0 and steps == sorted(set(steps)) and steps[-1] <= trainer.step
    assert {path.name for path in tmp_path.iterdir()} == {STATE, CHECKPOINT, LOG}


def test_a_world_size_alone_makes_no_team(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 0, 1) and "WORLD_SIZE=4 is set without RANK" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert launched() == (2, 0, 4)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="are no numbers"):
        launched()


# ---- what people expect ------------------------------------------------------------------------

def test_numbered_snapshots(tmp_path):
    config = replace(TINY, keep=2)
    trainer, contents = Trainer(config, tmp_path, CPU), {}
    for step in range(1, 5):
        trainer.train_step()
        trainer.save()
        contents[step] = (tmp_path / CHECKPOINT).read_bytes()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-0000003.safetensors", "checkpoint-0000004.safetensors"]
    assert (tmp_path / kept[0]).read_bytes() == contents[3]
    assert load_checkpoint(tmp_path / kept[0]).training["step"] == 3


def test_several_averages(tmp_path, capsys):
    config = replace(TINY, ema_decays=(0.0, 0.5), ema_decay=0.9)
    trainer = Trainer(config, tmp_path, CPU)
    run(trainer, 3)
    trainer.save()
    last = load_checkpoint(tmp_path / "checkpoint-ema-0.safetensors").model.state_dict()
    # No memory.
    assert all(torch.equal(value, last[name]) for name, value in trainer.nets["model"].state_dict().items())
    assert load_checkpoint(tmp_path / "checkpoint-ema-0.5.safetensors").training["ema_decay"] == 0.5
    again = Trainer(config, tmp_path, CPU)
    for decay, ema in trainer.averages.items():
        assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), again.averages[decay].parameters(), strict=True))
    Trainer(replace(config, ema_decays=(0.7,)), tmp_path, CPU)
    assert "no average of decay 0.7 so far" in capsys.readouterr().err


def test_held_out_data_is_never_trained_on(tmp_path):
    trainer = Trainer(replace(TINY, holdout=0.25), tmp_path, CPU)
    whole, held = trainer.data.whole, trainer.held_out
    assert len(trainer.data) + len(held) == len(whole) and len(held) == round(0.25 * len(whole))
    assert not set(trainer.data.indices.tolist()) & set(held.indices.tolist())
    drawn = trainer.data.choose(5000, torch.Generator().manual_seed(0))[:, 0]
    assert not set(drawn.tolist()) & set(held.indices.tolist()) and len(set(drawn.tolist())) > 1000
    first = trainer.held_out_figures()
    assert first == trainer.held_out_figures() and set(first) == {"holdout_loss", "holdout_nll"}


def test_the_held_out_likelihood_is_the_mixtures(tmp_path):
    """Of a network of one component, zero mean and log_std, by hand: C/2 log 2 pi + |u|^2 / 2."""
    config = replace(TINY, holdout=0.25, model=replace(TINY.model, num_gaussians=1), spectrum=None)
    trainer = Trainer(config, None, CPU)
    for net in (trainer.nets, trainer.ema):
        for p in net.parameters():
            p.data.zero_()
    found = trainer.held_out_figures()
    from train.step import step_inputs

    inputs = step_inputs(replace(config, batch_size=256, label_dropout=0.0), trainer.held_out, 0)
    u = inputs.noises[0] - inputs.x_0
    expected = 1.5 * torch.log(torch.tensor(2 * torch.pi)) + u.square().sum(1).mean() / 2
    assert found["holdout_nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_holdout_is_logged(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, "--out", tmp_path, "--holdout", "0.1") == 0
    assert {"holdout_loss", "holdout_nll"} <= lines(tmp_path)[-1].keys()
    with pytest.raises(ValueError, match="nothing can be held out"):
        Trainer(replace(PRESETS["checkerboard"], holdout=0.1), None, CPU)
    with pytest.raises(ValueError, match="each side needs one"):
        split(trainer_data(), replace(TINY, holdout=0.0001))


def trainer_data():
    return Trainer(TINY, None, CPU).data


def test_settings_from_files(tmp_path):
    text = {"steps": 7, "model": {"num_layers": 2}, "betas": [0.8, 0.9], "lr_decay": "constant", "spectrum": None,
            "data_path": None}
    (tmp_path / "a.json").write_text(json.dumps(text), encoding="utf-8-sig")
    config = override(PRESETS["digits"], read_settings(tmp_path / "a.json"))
    assert (config.steps, config.model.num_layers, config.betas, config.lr_decay) == (7, 2, (0.8, 0.9), "constant")
    assert config.spectrum is None
    yaml = pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(text))
    assert override(PRESETS["digits"], read_settings(tmp_path / "a.yaml")) == config
    for name, content, words in (("b.json", "{", "not JSON"), ("b.json", "[1]", "holds a list"),
                                 ("b.yaml", "a: [", "while parsing|expected")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            read_settings(tmp_path / name)


def test_the_command_line_goes_before_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text('{"steps": 1, "seed": 3}')
    assert main(monkeypatch, "--out", tmp_path / "run", "--settings", tmp_path / "a.json") == 0
    config = load_checkpoint(tmp_path / "run").training["config"]
    assert (config["steps"], config["seed"]) == (2, 3)
    assert main(monkeypatch, "--settings", tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err


def test_every_setting_has_help(capsys, monkeypatch):
    text = settings_help()
    assert all(f.name in text for config in (TrainConfig, GMDiTConfig, SpectrumConfig) for f in fields(config))
    notes = comments(TrainConfig)
    assert notes["clip_norm"].startswith("of each network's gradient; 0 leaves")
    assert "steps = 200000" in text and "model.num_gaussians = 8" in text
    wordless = {f.name for f in fields(TrainConfig)} - notes.keys()
    assert not wordless, f"settings without a word: {wordless}"


@pytest.mark.parametrize("option, words", [
    ("--version", gmflow_core.__version__), ("--list-presets", "digits-vanilla"),
    ("--help-settings", "spectral_weight = 1.0"),
])
def test_what_the_command_tells(monkeypatch, capsys, option, words):
    monkeypatch.setattr(sys, "argv", ["train", option])
    assert command.main() == 0 and words in capsys.readouterr().out


def test_the_version_is_the_packages():
    assert f'version = "{gmflow_core.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_a_preset_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train"])
    assert command.main() == 2 and "--list-presets" in capsys.readouterr().err


def test_digits_ignore_no_folder(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, "--data", tmp_path, "--out", tmp_path / "run") == 2
    assert "data digits needs no folder and would ignore" in capsys.readouterr().err


def test_a_full_disk_in_the_log_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.runlog.append_line", full)
    assert main(monkeypatch, "--out", tmp_path, "--set", "log_every=1") == 0
    assert "the log failed: [Errno 28]" in capsys.readouterr().err and load_checkpoint(tmp_path).training["step"] == 2


@pytest.mark.parametrize("name", [STATE, LOG])
def test_pipes_in_a_run_are_not_opened(tmp_path, old, name):
    (old / name).unlink()
    os.mkfifo(old / name)
    with pytest.raises(ValueError, match=f"{name}: is a device or pipe"):
        Trainer(OLD_CONFIG, old, CPU)


def test_pipes_as_settings(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "a.json")
    assert main(monkeypatch, "--settings", tmp_path / "a.json") == 2
    assert "a.json: is a device or pipe" in capsys.readouterr().err
