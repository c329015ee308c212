"""Precomputed folders: what is written is read, and what does not fit is refused."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel.finetune.data.manifest import FORMAT_VERSION, MANIFEST
from dit_accel.finetune.data.model_identity import model_identity
from dit_accel.finetune.data.store import open_store
from dit_accel.finetune.data.writer import store_writer

from .fakes import FakeModel

SETTINGS = {"made_from": "files", "fps": 16, "buckets": ["5x16x16"]}


def sample(i):
    generator = torch.Generator().manual_seed(i)
    latents = torch.randn(3, 2, 2 + i % 2, 2, generator=generator)
    text = torch.randn(2, 3, generator=generator).bfloat16()
    return latents, {"encoder_hidden_states": text, "mask": torch.tensor([1, i])}


def bucket(i):
    return f"5x{16 + 8 * (i % 2)}x16"


def sources(count):
    return {f"v/{i}.mp4": {"bytes": i, "caption": f"clip {i}"} for i in range(count)}


def write(folder, count=7, model=None, settings=None, make=True, **options):
    """Write `count` samples that are not there yet; return how many that were."""
    model = model_identity((model or FakeModel()).pipe)
    data = sources(count)
    arguments = {
        "settings": settings or SETTINGS,
        "model": model,
        "sources": data,
        "shard_samples": 3,
    }
    with store_writer(folder, **arguments | options) as writer:
        missing = [i for i in range(count) if f"v/{i}.mp4" not in writer.done]
        for i in missing if make else []:
            writer.add(f"v/{i}.mp4", bucket(i), sample(i), data[f"v/{i}.mp4"])
        writer.finish(list(data))
    return len(missing)


def check(folder, count=7, **options):
    """Check that the folder holds exactly the samples that were written."""
    store = open_store(folder, **options)
    assert list(store.ids) == list(sources(count))
    assert list(store.buckets) == [bucket(i) for i in range(count)]
    for i in range(count):
        (latents, conditions), (expected, text) = store.sample(i), sample(i)
        assert torch.equal(latents, expected)
        assert conditions.keys() == text.keys()
        for name, x in text.items():
            assert conditions[name].dtype == x.dtype
            assert torch.equal(conditions[name], x)


def test_what_is_written_is_read(tmp_path):
    assert write(tmp_path / "store") == 7
    check(tmp_path / "store", model=model_identity(FakeModel().pipe))
    names = {x.name for x in (tmp_path / "store").iterdir() if x.name != ".lock"}
    assert names == {MANIFEST, *(f"shard-{i:05d}.safetensors" for i in range(3))}


def test_latents_are_stored_in_fp32(tmp_path):
    data = {"a": {}}
    model = model_identity(FakeModel().pipe)
    with store_writer(tmp_path / "store", settings={}, model=model, sources=data) as writer:
        writer.add("a", "1x8x8", (torch.ones(3, 1, 1).bfloat16(), {}), {})
        writer.finish(["a"])
    assert open_store(tmp_path / "store").sample(0)[0].dtype == torch.float32


def test_a_second_run_writes_nothing(tmp_path):
    write(tmp_path / "store")
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "store").iterdir() if x.name != ".lock"}
    assert write(tmp_path / "store") == 0
    assert before == {
        x: x.stat().st_mtime_ns for x in (tmp_path / "store").iterdir() if x.name != ".lock"
    }


def test_a_folder_grows(tmp_path):
    write(tmp_path / "store", 4)
    check(tmp_path / "store", 4)
    assert write(tmp_path / "store", 7) == 3
    check(tmp_path / "store", 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": SETTINGS | {"fps": 8}},
            r"settings: fps was 16 and is 8; .*overwrite",
        ),
        (
            {"model": FakeModel(seed=3)},
            r"models \(unnamed model\): text_encoder .*; .*overwrite",
        ),
        ({"count": 5}, r"data: v/5.mp4, v/6.mp4 .*; .*overwrite"),
    ],
    ids=["settings", "model", "fewer"],
)
def test_other_samples_are_replaced_only_when_asked(tmp_path, changes, message):
    write(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        write(tmp_path / "store", **changes)
    assert str(error.value).startswith("output_dir=")
    check(tmp_path / "store")
    assert before == sorted(tmp_path.rglob("*"))
    count = changes.get("count", 7)
    assert write(tmp_path / "store", **changes, overwrite=True) == count
    check(tmp_path / "store", count)
    assert write(tmp_path / "store", **changes, overwrite=True) == 0


def test_a_changed_caption_is_noticed(tmp_path, monkeypatch):
    write(tmp_path / "store", 2)
    changed = {**sources(2), "v/1.mp4": {"bytes": 1, "caption": "other"}}
    monkeypatch.setitem(globals(), "sources", lambda count: changed)
    with pytest.raises(
        ValueError, match=r'data: .*v/1.mp4 \(caption was "clip 1" and is "other"\)'
    ):
        write(tmp_path / "store", 2)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*\(photo.png\)"):
        write(tmp_path, overwrite=True)


def test_two_writers_do_not_meet(tmp_path):
    folder = tmp_path / "store"
    arguments = {
        "settings": SETTINGS,
        "model": model_identity(FakeModel().pipe),
        "sources": sources(7),
    }
    with (
        store_writer(folder, **arguments),
        pytest.raises(RuntimeError, match=r"output_dir=.*another process"),
        store_writer(folder, **arguments),
    ):
        pass
    write(folder)
    check(folder)


def test_a_writer_waits_for_another_one(tmp_path):
    """So do the processes of one training run, of which one makes the samples."""
    folder, found = tmp_path / "store", []
    arguments = {
        "settings": SETTINGS,
        "model": model_identity(FakeModel().pipe),
        "sources": sources(7),
    }
    thread = threading.Thread(target=lambda: found.append(write(folder, wait=True)))
    with store_writer(folder, **arguments) as writer:
        thread.start()
        for i in range(7):
            writer.add(f"v/{i}.mp4", bucket(i), sample(i), sources(7)[f"v/{i}.mp4"])
        assert thread.is_alive()
        writer.finish(list(sources(7)))
    thread.join(10)
    assert found == [0]
    check(folder)


def test_a_shard_is_written_when_it_is_old(tmp_path, monkeypatch):
    """Samples that take minutes are not lost by the dozen."""
    monkeypatch.setattr("dit_accel.finetune.data.writer.SHARD_SECONDS", 0.0)
    write(tmp_path / "store", shard_samples=64)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 7
    check(tmp_path / "store")


def test_latents_that_are_not_finite_are_refused_by_name(tmp_path):
    arguments = {
        "settings": SETTINGS,
        "model": model_identity(FakeModel().pipe),
        "sources": {"x": {}},
    }
    with (
        pytest.raises(ValueError, match=r"x: .*not finite"),
        store_writer(tmp_path / "store", **arguments) as writer,
    ):
        writer.add("x", "1x8x8", (torch.tensor([[[float("nan")]]]), {}), {})


def test_finish_needs_every_sample(tmp_path):
    arguments = {
        "settings": SETTINGS,
        "model": model_identity(FakeModel().pipe),
        "sources": sources(2),
    }
    with (
        pytest.raises(RuntimeError, match=r"store: .*v/0.mp4, v/1.mp4"),
        store_writer(tmp_path / "store", **arguments) as writer,
    ):
        writer.finish(list(sources(2)))


# Reading damaged folders ----------------------------------------------------------------------------


def edit_manifest(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def drop(path, key="latents/v/0.mp4"):
    """Leave out a tensor, and give the manifest the new size and hash."""
    import hashlib

    tensors = load_file(path)
    save_file({k: x for k, x in tensors.items() if k != key}, path)
    new = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_manifest(path.parent, lambda x: x["shards"].update({path.name: new}))


FIRST = "shard-00000.safetensors"
DAMAGE = {
    "no folder": (
        shutil.rmtree,
        r"precomputed_dir='.*store': .*no manifest.json; .*dit-accel precompute",
    ),
    "no manifest": (lambda x: (x / MANIFEST).unlink(), r"store': .*no manifest.json"),
    "manifest cut off": (
        lambda x: truncate(x / MANIFEST),
        r"manifest.json: .*JSON",
    ),
    "manifest of nothing": (lambda x: (x / MANIFEST).write_text("[]"), r"format_version=None"),
    "other version": (
        lambda x: edit_manifest(x, lambda y: y.update(format_version=FORMAT_VERSION + 1)),
        rf"manifest.json: format_version={FORMAT_VERSION + 1}; .*{FORMAT_VERSION}",
    ),
    "no settings": (
        lambda x: edit_manifest(x, lambda y: y.pop("settings")),
        r"manifest.json: damaged .*settings",
    ),
    "no shards": (
        lambda x: edit_manifest(x, lambda y: y["shards"].clear()),
        r"manifest.json: damaged",
    ),
    "shard elsewhere": (
        lambda x: edit_manifest(
            x, lambda y: y["shards"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}})
        ),
        r"manifest.json: damaged .*passwd",
    ),
    "no sample": (
        lambda x: edit_manifest(x, lambda y: y["samples"].clear()),
        r"precomputed_dir='.*store': .*no samples",
    ),
    "shard missing": (lambda x: (x / FIRST).unlink(), rf"{FIRST}: .*\(No such file"),
    "shard cut off": (
        lambda x: truncate(x / FIRST),
        rf"{FIRST}: truncated \(\d+ of \d+ bytes\)",
    ),
    "latents missing": (
        lambda x: drop(x / FIRST),
        rf"{FIRST}: .*'v/0.mp4' .*no latents",
    ),
    "text missing": (
        lambda x: drop(x / FIRST, "mask/v/2.mp4"),
        rf"{FIRST}: .*'v/2.mp4' .*no mask",
    ),
    "other shape": (
        lambda x: edit_manifest(
            x, lambda y: y["samples"]["v/0.mp4"]["shapes"].update(latents=[3, 9, 9, 9])
        ),
        rf"{FIRST}: latents .*'v/0.mp4' .*\[3, 2, 2, 2\].*\[3, 9, 9, 9\]",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name(tmp_path, case):
    damage, message = DAMAGE[case]
    folder = tmp_path / "store"
    write(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_store(folder)
    assert "\n" not in str(error.value)


def test_a_changed_byte_is_noticed_when_the_shard_is_read(tmp_path):
    write(tmp_path / "store")
    flip(tmp_path / "store" / FIRST)
    store = open_store(tmp_path / "store")
    with pytest.raises(ValueError, match=rf"{FIRST}: damaged .*sha256"):
        store.sample(0)
    store.sample(5)


def test_another_model_is_refused_by_name(tmp_path):
    write(tmp_path / "store")
    pipe = FakeModel(seed=3).pipe
    pipe.config = {"_name_or_path": "/models/other-wan"}
    message = r"precomputed_dir='.*': .*\(unnamed model, not other-wan\): text_encoder"
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path / "store", model=model_identity(pipe))


@pytest.mark.parametrize("damage", [truncate, lambda x: x.unlink()], ids=["cut off", "missing"])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    folder = tmp_path / "store"
    write(folder)
    damage(folder / "shard-00001.safetensors")
    assert write(folder) == 3
    check(folder)


def test_many_shards_do_not_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_accel.finetune.data.store._MOST_OPEN", 2)
    write(tmp_path / "store")
    check(tmp_path / "store")
    store = open_store(tmp_path / "store")
    for i in (0, 6, 3, 0, 6):
        assert torch.equal(store.sample(i)[0], sample(i)[0])
    assert len(store._opened) == 2
