"""Small files that ask for gigabytes, files that are something else, and text that no terminal should see:
one line each.

Every file is made here. What it costs to refuse is measured in a child process.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from child import output_of
from safetensors.torch import load_file, save_file
from test_checkpoint import BF16, SMALL, TINY, TRAINING, WEIGHTS, change, metadata, refused, rewrite, saved, small, tiny

from gmflow_core import GMDiT, GMDiTConfig, GMMLPConfig, load_checkpoint
from gmflow_core.checkpoint import read_state
from gmflow_core.describe import format_info, identify
from gmflow_core.files import CheckpointError, read_json, shown
from gmflow_core.model import LatentSpace

pytestmark = pytest.mark.slow

__all__ = ["saved", "small", "tiny"]  # fixtures
MB = 1 << 20
DENOISING = "diffusion_ema.denoising."


@pytest.fixture
def training() -> dict:
    """The content of a training file of the authors."""
    return torch.load(TRAINING, weights_only=True)


# ---- tensors larger than their file ------------------------------------------------------------

# Reads a good file, then those named as arguments: one line for each with its error, and at last what that cost.
READ = """
from gmflow_core.checkpoint import CheckpointError, load_checkpoint, read_state
load_checkpoint(sys.argv[1])
before = peak()
for path in sys.argv[2:]:
    for call in (read_state, load_checkpoint):
        try:
            call(path)
            print("read")
        except CheckpointError as error:
            print(error)
print(peak() - before)
"""


def repack(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """The archive of torch.save again, with other compression or other records (by the end of their name)."""
    with zipfile.ZipFile(path) as archive:
        records = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            new = (value for end, value in changed.items() if name.endswith(end.replace("_", ".")))
            archive.writestr(name, next(new, content))


BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (4 * 10**9).to_bytes(5, "little") + b"\x85R."


def costly_files(folder: Path, training: dict):
    """Paths of small files that ask for gigabytes, each with words of the right answer."""
    state = training["state_dict"]
    for i, (name, value) in enumerate((
        # 1.3 GB, ten million classes
        ("emb.class_embedder.embedding_table.weight", torch.zeros(1, 32).expand(10**7, 32)),
        ("pos_embed.pos_embed", torch.zeros(1).expand(1, 4_000_000, 32)),
        ("proj_out_1.weight", torch.zeros(1).as_strided((64, 10**7), (0, 0))),
    )):
        path = folder / f"view{i}.pth"
        torch.save(training | {"state_dict": state | {DENOISING + name: value}}, path)
        yield path, name, "are stored", "fill the memory"
    path = folder / "bytearray.pth"
    torch.save({"state_dict": {}}, path)
    repack(path, data_pkl=BYTEARRAY)
    yield path, "builtins.bytearray", "nothing was run"
    path = folder / "old-bytearray.pth"
    path.write_bytes(BYTEARRAY)
    yield path, "builtins.bytearray", "nothing was run"
    path = folder / "deflated.pth"
    torch.save({"state_dict": {DENOISING + "a": torch.zeros(50 * MB)}}, path)
    repack(path, zipfile.ZIP_DEFLATED)
    yield path, "is compressed"
    path = folder / "old-storage.pth"  # 2^31 numbers instead of ten
    torch.save({"a": torch.zeros(10)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x0a", b"J\xff\xff\xff\x7f"))
    yield path, path.name


def test_small_files_cost_nothing(tmp_path, training):
    """Refused in one line each, by a process that needs no more than it needs for a good file."""
    files = list(costly_files(tmp_path, training))
    assert all(path.stat().st_size < MB // 2 for path, *_ in files)
    *lines, cost = output_of(READ, SMALL, *(path for path, *_ in files)).splitlines()
    assert len(lines) == 2 * len(files)
    for i, (path, *words) in enumerate(files):
        for line in lines[2 * i : 2 * i + 2]:
            assert path.name in line and all(word in line for word in words), line
    assert int(cost) < 50 * MB, f"{int(cost) / MB:.0f} MB"


def test_tensors_that_share_one_storage(tmp_path, training):
    storage = torch.zeros(32 * 1000)
    many = {DENOISING + f"extra{i}": storage.view(32, 1000) for i in range(100)}
    torch.save(training | {"state_dict": training["state_dict"] | many}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "its weights claim 12,.* bytes, the file has", heads=2)


def test_records_that_overlap(tmp_path):
    """Two names for one record of the archive: the storages together are larger than the file."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"a": torch.zeros(100_000), "b": torch.ones(100_000)}}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (next(i for i in archive.infolist() if i.filename.endswith(f"data/{n}")) for n in (0, 1))
    # The second record is cut out, and its entry in the directory points to the first.
    directory = content.index(b"PK\x01\x02")
    entry = content.index(second.filename.encode(), directory) - 46
    patched = bytearray(content)
    patched[entry + 42 : entry + 46] = struct.pack("<I", first.header_offset)
    path.write_bytes(patched)
    refused(path, "a.pth")  # torch's reader or the bound: one line in any case


@pytest.mark.parametrize("value, words", [
    (torch.zeros(2, 2).to_sparse(), "tensors that are not plain .*_rebuild_sparse_tensor"),
    (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
     "tensors that are not plain .*_rebuild_nested_tensor"),
    (torch.empty(10**12, device="meta"), "tensors that are not plain .*_rebuild_meta_tensor"),
    (torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "tensors that are not plain .*_rebuild_qtensor"),
])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain(tmp_path, training, value, words):
    torch.save(training | {"state_dict": training["state_dict"] | {DENOISING + "extra": value}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words, "nothing was run", heads=2)


# ---- pickles and archives ----------------------------------------------------------------------

def test_a_pickle_of_many_steps(tmp_path, monkeypatch):
    from gmflow_core import pickles

    path = tmp_path / "a.pth"
    torch.save({"state_dict": {f"a{i}": i for i in range(1000)}}, path)
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    refused(path, "over 1,000 steps")
    monkeypatch.setattr(pickles, "MAX_PICKLE", 1000)
    refused(path, "at most 1,000 are read")


def test_plain_values_are_read(tmp_path, training):
    """What torch.save writes for ordinary things is no code: numbers, bytes, sizes, dtypes, parameters, sets."""
    extra = {"size": torch.Size([1]), "dtype": torch.bfloat16, "device": torch.device("cpu"), "bytes": b"\xff\0",
             "set": {1}, "c": 1j, "parameter": torch.nn.Parameter(torch.zeros(2)),
             "half": torch.zeros(2, dtype=torch.bfloat16),
             "optimizer": torch.optim.AdamW([torch.zeros(2)]).state_dict()}
    for new in (True, False):
        if new:  # which the old format never could
            extra["fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        else:
            del extra["fp8"]
        torch.save(training | extra, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        assert load_checkpoint(tmp_path / "a.pth", heads=2).config.num_classes == 10


# ---- numbers in the metadata -------------------------------------------------------------------

@pytest.mark.parametrize("edit, words", [
    (change("model", "sample_size", to=2**20), "274877906944 tokens, at most 65536"),
    (change("model", "sample_size", to=514), "66049 tokens, at most 65536"),
    (change("model", "sample_size", to=2**63), "tokens, at most 65536"),
    (change("model", "sample_size", to=10**400), "sample_size|tokens"),
    (change("model", "num_layers", to=20_000), "20000 layers, the file .* tensors"),
    (change("spectrum", "layers", to=[1] * 200_000), "200001 layers, the file 6 tensors"),
    (change("spectrum", "layers", to=[10**400]), "no network can be built|SpectrumConfig"),
    (change("model", "constant_logstd", to="abc"), "constant_logstd must be null or a number"),
    (change("model", "constant_logstd", to=float("nan")), "constant_logstd must be null or a number"),
    (change("model", "constant_logstd", to=10**400), "constant_logstd must be null or a number"),
    (change("model", "constant_logstd", to=True), "constant_logstd must be null or a number"),
    (change("model", "constant_logstd", to=-1000), r"constant_logstd .* \[-20, 20\]"),
    (change("latent_space", "scale", to=10**400), "scale must be a finite number"),
    (change("latent_space", "scale", to=float("nan")), "scale must be a finite number"),
    (change("latent_space", "scale", to=1e-50), "scale must not be 0"),
    (change("latent_space", "shift", to=1e30), "shift must be a finite number"),
])
def test_numbers_out_of_bounds(saved, edit, words):
    header = metadata(saved)
    edit(header)
    start = time.process_time()
    refused(rewrite(saved, header), words)
    refused(saved, words, call=identify)
    assert time.process_time() - start < 5


def test_65536_tokens_are_allowed():
    assert GMDiTConfig(sample_size=512).sample_size == 512
    with pytest.raises(ValueError, match="tokens"):
        GMDiTConfig(sample_size=514)
    for value in ("abc", float("inf"), 21):
        with pytest.raises(ValueError, match="constant_logstd"):
            GMMLPConfig(constant_logstd=value)


def test_equal_blocks_are_built_once():
    from gmflow_core.checkpoint import expected_shapes

    start = time.process_time()
    shapes = expected_shapes(GMDiTConfig(num_layers=20_000))
    assert time.process_time() - start < 2 and len(shapes) == 20_000 * 14 + 15
    few = GMDiT(TINY, device="meta").state_dict()
    assert expected_shapes(TINY) == {name: tuple(value.shape) for name, value in few.items()}


def test_a_config_of_gigabytes(small):
    path = small / "transformer" / "config.json"
    with open(path, "r+b") as file:
        file.truncate(2 << 30)  # a hole: nothing is written
    start = time.process_time()
    with pytest.raises(CheckpointError, match="config.json: has 2,147,483,648 bytes, at most"):
        load_checkpoint(small)
    assert time.process_time() - start < 1


def test_json_with_a_byte_order_mark(small):
    path = small / "transformer" / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_checkpoint(small).config.num_heads == 2


def test_a_header_of_90_megabytes(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"__metadata__":{"a":"' + b"x" * (90 * MB) + b'"}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, "header has 94,.* bytes, at most 33,554,432")


# ---- what is no file ---------------------------------------------------------------------------

def test_pipes_and_devices_are_not_opened(tmp_path, small):
    """A FIFO would wait for ever, /dev/zero never ends."""
    pipe = tmp_path / "a.safetensors"
    os.mkfifo(pipe)
    refused(pipe, "a device or pipe")
    os.mkfifo(tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "a device or pipe")
    refused(Path("/dev/zero"), "a device or pipe")
    config = small / "transformer" / "config.json"
    config.unlink()
    os.mkfifo(config)
    refused(small, "without transformer/config.json")
    with pytest.raises(CheckpointError, match="a device or pipe"):
        read_json(config)
    weights = small / "transformer" / WEIGHTS
    weights.unlink()
    os.mkfifo(weights)
    config.unlink()
    shutil.copy(SMALL / "transformer" / "config.json", config)
    assert load_checkpoint(small, dtype=None).model.proj_out_1.bias.dtype == torch.bfloat16  # the other variant


def test_paths_that_no_system_has(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened|no such file|name too long"):
        load_checkpoint(tmp_path / ("a" * 300))
    with pytest.raises(CheckpointError, match="a"):
        load_checkpoint("a\0b")


def test_a_path_that_is_no_utf8(tmp_path, saved, training):
    """Neither safetensors nor torch map such a file."""
    folder = tmp_path / os.fsdecode(b"odd-\xff")
    folder.mkdir()
    shutil.copy(saved, folder / "a.safetensors")
    assert load_checkpoint(folder / "a.safetensors").config == TINY
    torch.save(training, folder / "a.pth")
    assert load_checkpoint(folder / "a.pth", heads=2).config.num_classes == 10
    (folder / "a.safetensors").write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"odd-\\udcff/a.safetensors: truncated or damaged"):
        load_checkpoint(folder / "a.safetensors")


# ---- text from files ---------------------------------------------------------------------------

def test_shown():
    assert shown("plain Ærø") == "plain Ærø"
    assert shown("\x1b[31m\n\t\ud800\u202e") == r"\x1b[31m\n\t\ud800\u202e"
    assert len(shown("a" * 10**7)) <= 140 and "10,000,000 characters" in shown("a" * 10**7)
    assert len(str(CheckpointError("a" * 10**7))) < 2100


def terminal_safe(text: str) -> bool:
    return len(text) < 2500 and all(c.isprintable() for c in text)


def test_names_are_shortened_and_escaped(tmp_path, saved):
    long, colour = "x" * 10**7, "\x1b]0;title\x07\x1b[2J"
    path = tmp_path / "a.safetensors"
    for names in ([long], [colour], [long, colour]):
        save_file({name: torch.zeros(1) for name in names}, path)
        assert terminal_safe(refused(path, "first keys are"))
    state = load_file(saved)
    assert terminal_safe(refused(rewrite(saved, state=state | {colour: torch.zeros(1)}), r"unexpected: \\x1b"))
    torch.save({"state_dict": {DENOISING + "\ud800\n": torch.zeros(1)}}, tmp_path / "a.pth")
    assert terminal_safe(refused(tmp_path / "a.pth", r"\\ud800\\n"))


@pytest.mark.parametrize("edit", [
    change("architecture", to="\x1b[2J" * 10**6), change("format", to="\x1b" * 10**6),
    change("model", to="\x1b" * 10**6), change("model", "\x1b" * 10**6, to=1),
    change("latent_space", "kind", to="\x1b" * 10**6), change("model", "num_heads", to="\x1b" * 10**6),
])
def test_metadata_is_shortened_and_escaped(saved, edit):
    header = metadata(saved)
    edit(header)
    assert terminal_safe(refused(rewrite(saved, header)))


def test_info_is_escaped(saved):
    header = metadata(saved)
    header["class_names"] = ["\x1b[2J", "b\nc", "d" * 10**6]
    header["training"] = {"\x1b[31m": "\x1b[2J" * 10**6}
    text = format_info(identify(rewrite(saved, header)))
    assert "\x1b" not in text and len(text) < 5000 and r"\x1b[2J" in text


# ---- everything is one line --------------------------------------------------------------------

def test_whatever_a_reader_raises_is_one_line(saved, monkeypatch):
    from gmflow_core import checkpoint

    for error in (MemoryError(), RecursionError("deep"), RuntimeError("a\nb"), KeyError("x"),
                  PermissionError(13, "no")):
        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(checkpoint, "read_safetensors", fail)
        refused(saved, type(error).__name__)
        refused(saved, type(error).__name__, call=read_state)


# ---- foreign weights, named for what they are --------------------------------------------------

def split(state: dict, folder: Path, stem: str, parts: int = 3) -> Path:
    """Weights in several files with their index, as large models are published; the index's path."""
    names = sorted(state)
    files = {f"{stem}-{i + 1:05d}-of-{parts:05d}.safetensors": names[i::parts] for i in range(parts)}
    for file, chosen in files.items():
        save_file({name: state[name] for name in chosen}, folder / file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, chosen in files.items() for name in chosen}}))
    return index


def test_weights_in_parts(small):
    folder, stem = small / "transformer", "diffusion_pytorch_model"
    state = load_file(folder / WEIGHTS)
    for name in (WEIGHTS, BF16):
        (folder / name).unlink()
    index = split(state, folder, stem)
    for path in (small, folder, index, folder / f"{stem}-00002-of-00003.safetensors"):
        model = load_checkpoint(path).model.state_dict()
        assert all(torch.equal(model[name], value) for name, value in state.items())
    content = json.loads(index.read_text())
    for bad, words in (("../a.safetensors", "no file beside it"), ("/etc/passwd", "no file beside it"),
                       ("none", "no such file"), (3, "no object")):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"x": bad}}))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(small)
    part = folder / f"{stem}-00001-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"x": part.name}}))
    with pytest.raises(CheckpointError, match="1 of its tensors are in no part, the first is x"):
        load_checkpoint(small)
    index.unlink()
    refused(part, "one of several parts", "index.json beside it")


def test_a_run_folder(tmp_path, saved):
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.pt").touch()
    refused(run, "a training run without checkpoint.safetensors")
    shutil.copy(saved, run / "checkpoint.safetensors")
    assert load_checkpoint(run).path == run / "checkpoint.safetensors"


def test_a_hub_cache_folder(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "refs").mkdir(parents=True)
    for revision in ("aaa", "bbb"):
        shutil.copytree(SMALL, cache / "snapshots" / revision)
    refused(cache, "snapshots aaa, bbb")
    (cache / "refs" / "main").write_text("bbb\n")
    assert load_checkpoint(cache).path == cache / "snapshots" / "bbb"
    for file in (cache / "snapshots" / "bbb" / "transformer").glob("*.safetensors"):
        file.unlink()
    (cache / "blobs").mkdir()
    (cache / "blobs" / "0123.incomplete").touch()
    with pytest.raises(CheckpointError, match="a download into it is not finished"):
        load_checkpoint(cache)


def test_half_a_download(saved):
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    refused(saved, f"{len(content) // 2:,} of {len(content):,} bytes are there, half a download")


def test_our_own_state_and_dit_training_files(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"config": {}, "nets": {}, "ema": {}, "optimizer": {}}, path)
    refused(path, "the state from which a training run goes on; .*checkpoint.safetensors")
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}, "opt": {}}, path)
    refused(path, "DiT or SiT, .* --init-from")


@pytest.mark.parametrize("name", ["scaled_fp8", "a.scale_weight", "a.weight_scale", "a.comfy_quant"])
def test_scaled_fp8(tmp_path, name):
    save_file({"pos_embed.proj.weight": torch.zeros(2, 2, 1, 1).to(torch.float8_e4m3fn), name: torch.ones(1)},
              tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "fp8 with scales of their own")


def test_torch_gives_no_advice(tmp_path, training):
    path = tmp_path / "a.pth"
    content = io.BytesIO()
    torch.save(training, content)
    for cut in (100, 1000, 50_000, -30):
        path.write_bytes(content.getvalue()[:cut])
        assert "weights_only" not in refused(path)
    path.write_bytes(pickle.dumps({1: {2}}, protocol=4))
    assert "weights_only" not in refused(path)


def test_what_nothing_tells_is_said(tmp_path, caplog):
    path = tmp_path / WEIGHTS
    shutil.copy(SMALL / "transformer" / WEIGHTS, path)
    info = identify(path, heads=2)
    assert info["config"]["sample_size"] == 32 and info["assumed"].startswith("an image size of 32 assumed")
    assert "image size of 32 assumed" in caplog.text and "image size of 32" in format_info(info)
    caplog.clear()
    shutil.copy(SMALL / "transformer" / "config.json", tmp_path)
    assert identify(path)["assumed"] is None and not caplog.records


# ---- fuzzers -----------------------------------------------------------------------------------

FUZZ = """
import random, time
from pathlib import Path
from gmflow_core.checkpoint import CheckpointError, load_checkpoint
source, path, count, keep = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dice, read, slowest = random.Random(0), 0, 0.0
for _ in range(count):
    data = bytearray(source)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        # Names and numbers are at the ends; weights are a dull place to change.
        end = dice.random() < 0.9
        ends = dice.randrange(keep), len(data) - 1 - dice.randrange(keep)
        at = dice.choice(ends) if end else dice.randrange(len(data))
        kind = dice.randrange(5)
        if kind == 0: data[at] ^= 1 << dice.randrange(8)
        elif kind == 1: data[at] = dice.choice(b"\\0\\xff09{}[],:\\x80.R")
        elif kind == 2: del data[at : at + dice.randrange(1, 40)]
        elif kind == 3: data[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
        else: data = data[: max(9, at)] if dice.random() < 0.2 else data
        if len(data) < keep + 1: break
    path.write_bytes(data)
    start = time.process_time()
    try:
        load_checkpoint(path, heads=2 if path.suffix == ".pth" else None)
        read += 1
    except CheckpointError as error:
        text = str(error)
        assert path.name in text and text.isprintable() and len(text) < 2100 and "weights_only" not in text, text
    slowest = max(slowest, time.process_time() - start)
print(read, round(slowest, 2), peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", [("safetensors", 1000), ("pth", 400), ("old", 400)])
def test_mutated_files(tmp_path, saved, training, kind, count):
    """Every mutant is read or refused in one line, within seconds, and no process needs a gigabyte."""
    source, path = saved, tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind != "safetensors":
        source = tmp_path / "source.pth"
        torch.save(training, source, _use_new_zipfile_serialization=kind == "pth")
    output = output_of(FUZZ, source, path, count, min(4000, source.stat().st_size // 3), timeout=600)
    read, slowest, peak = output.split()
    print(output)
    assert int(read) < count and float(slowest) < 5, output
    assert int(peak) < 1 << 30, f"{int(peak) / MB:.0f} MB"


def test_mutated_configs(small):
    """config.json of any kind: text, numbers, lists where a number belongs."""
    path = small / "transformer" / "config.json"
    values, dice = json.loads(path.read_text()), random.Random(0)
    odd = (None, True, -1, 0, 2**63, 10**400, 1.5, "2", [], {}, "\x1b" * 1000, [1] * 1000)
    for _ in range(300):
        changed = dict(values)
        for name in dice.sample(sorted(values), dice.randrange(1, 4)):
            changed[name] = dice.choice(odd)
        path.write_text(json.dumps(changed))
        try:
            load_checkpoint(small)
        except CheckpointError as error:
            assert str(error).isprintable() and small.name in str(error)


@pytest.mark.parametrize("value", [True, "1", float("nan"), 10**400])
def test_latent_space_numbers(value):
    with pytest.raises(ValueError, match="finite number"):
        LatentSpace("rgb", value)
