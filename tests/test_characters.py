"""The characters: licences, the same pictures everywhere, resuming, and what a checkpoint remembers of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmflow_core import load_checkpoint
from train.config import PRESETS, override
from train.data.images import ImageFolder
from train.trainer import CHECKPOINT, Trainer

pytest.importorskip("dicebear")
pytest.importorskip("resvg_py")
characters = pytest.importorskip("train.characters")

FIRST = Path(__file__).parent / "data" / "characters.png"  # picture 0 of every class at 24 x 24, in a row


def test_every_style_is_in_the_public_domain_by_its_own_word():
    for entry in characters.about(24, 1, 0)["styles"]:
        assert entry["license"] == "CC0 1.0" and entry["creator"] and entry["source"].startswith("https://")
    assert len(characters.STYLES) == 16 and list(characters.STYLES) == sorted(characters.STYLES)


def test_a_style_of_another_licence_is_refused_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(characters.STYLES, "peep", "adventurer")
    assert characters.main(["--out", str(tmp_path / "out"), "--pictures", "1"]) == 2
    assert "style adventurer: its licence is 'CC BY 4.0'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_pictures_are_the_recorded_ones():
    """Another version of a package may draw other pictures; then the versions in pyproject.toml are wrong."""
    drawn = [characters.paint(name, 0).resize((24, 24), Image.Resampling.BOX) for name in characters.STYLES]
    row = np.concatenate(drawn, axis=1)
    assert np.abs(row.astype(int) - np.asarray(Image.open(FIRST)).astype(int)).max() <= 2


def test_pictures_differ_by_number_seed_and_class():
    drawn = [characters.paint(*which).tobytes() for which in (("mood", 0), ("mood", 1), ("mood", 0, 1), ("clay", 0))]
    assert len(set(drawn)) == 4 and drawn[0] == characters.paint("mood", 0).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("characters") / "set"
    assert characters.main(["--out", str(out), "--size", "24", "--pictures", "2", "--workers", "1"]) == 0
    return out


def test_a_picture_is_the_mean_of_five_by_five_pixels(folder):
    for name in ("peep", "waves"):
        drawn = np.asarray(characters.paint(name, 1)).astype(float)
        mean = drawn.reshape(24, 5, 24, 5, 3).mean((1, 3))
        assert np.abs(np.asarray(Image.open(folder / name / "00001.png")) - mean).max() <= 1  # rounded once an axis


def test_it_goes_on_where_it_stopped_and_keeps_what_is_there(folder):
    kept, lost = folder / "clay" / "00000.png", folder / "clay" / "00001.png"
    before, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert characters.main(["--out", str(folder), "--pictures", "2", "--workers", "1"]) == 0
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == when


@pytest.mark.parametrize("arguments, message", [
    (["--size", "30", "--pictures", "2"], "size 24 there, 30 asked for"),
    (["--pictures", "3"], "pictures 2 there, 3 asked for"),
])
def test_another_set_is_refused(folder, capsys, arguments, message):
    assert characters.main(["--out", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_other_things_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert characters.main(["--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_preset_reads_them_and_the_checkpoint_names_their_sources(folder, tmp_path):
    config = override(PRESETS["characters"], [f"data_path={folder}", "model.num_layers=1", "batch_size=4"])
    trainer = Trainer(config, tmp_path, torch.device("cpu"))
    trainer.train_step()
    trainer.save()
    checkpoint = load_checkpoint(tmp_path / CHECKPOINT)
    assert checkpoint.class_names == tuple(characters.STYLES) and checkpoint.config.num_gaussians == 8
    assert checkpoint.training["sources"] == json.loads((folder / "sources.json").read_text())
    assert "| clay | clay |" in (folder / "CREDITS.md").read_text()


def test_sources_that_are_no_json_object_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    assert ImageFolder.load(tmp_path, 3, 8).sources is None
    for text in ("{", "[]"):
        (tmp_path / "sources.json").write_text(text)
        with pytest.raises(ValueError, match="sources.json: "):
            ImageFolder.load(tmp_path, 3, 8)
