"""Generation of sample sets: interrupted runs, shards, batches, layouts, invalid input.

`wan` and `sd3` are real pipelines. The fixture `drawn` replaces their calls by random frames in tests of files.
"""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import control
from dit_accel.runtime.install import installation_of
from dit_accel.sampling import batches as module
from dit_accel.sampling import generate as generation
from dit_accel.sampling import journal, media, sample_files
from dit_accel.sampling.call import BatchResult, run_batch
from dit_accel.sampling.devices import device_name
from dit_accel.sampling.generate import check_generate, generate
from dit_accel.sampling.journal import Journal, Shards, known_samples, merge
from dit_accel.sampling.plan import plan_batches, plan_samples
from dit_accel.sampling.prompts import PromptRecord, number_prompts
from dit_accel.sampling.set_plan import shard_of
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling

PROMPTS = [
    PromptRecord("00000", "a red circle moving right"),
    PromptRecord("00001", "a blue square", seed=11),
    PromptRecord("00002", "a white cross", negative_prompt="a green triangle"),
    PromptRecord("00003", "a cyan circle moving down on a navy background"),
]
SAMPLING = Sampling(
    height=32,
    width=32,
    num_frames=5,
    num_inference_steps=2,
    guidance_scale=2.0,
    max_sequence_length=16,
)
IMAGE = Sampling(height=64, width=64, num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture
def drawn(monkeypatch):
    """Replace pipeline calls by random frames and the video encoder by a stub. Return the list of the prompts of each call."""
    calls = []

    def draw(pipe, samples, **_):
        calls.append([x.record.prompt for x in samples])
        used = samples[0].sampling
        shape = (used.num_frames or 1, used.height, used.width, 3)
        frames = np.stack([np.random.default_rng(x.seed).random(shape) for x in samples])
        seconds = {"text": 0.25, "denoise": 1.0, "decode": 0.25, "total": 1.5}
        return BatchResult(tuple(samples), frames, seconds, control.summary(pipe))

    monkeypatch.setattr(module, "run_batch", draw)
    monkeypatch.setattr(media, "write_video", lambda path, *_, **__: path.write_bytes(b"mp4"))
    return calls


@pytest.fixture
def counted(monkeypatch):
    """Return the list of the prompts of each pipeline call."""
    calls = []

    def count(pipe, samples, **overrides):
        calls.append([x.record.prompt for x in samples])
        return run_batch(pipe, samples, **overrides)

    monkeypatch.setattr(module, "run_batch", count)
    return calls


def make(pipe, folder, prompts=PROMPTS, *, act=generate, **changed):
    sampling = SAMPLING if hasattr(pipe, "vae_scale_factor_temporal") else IMAGE
    options = {"output_dir": folder, "model": "tiny", "sampling": sampling, "progress": False}
    return act(pipe, prompts, **options | changed)


def pictures(folder):
    """Return the bytes of each frame file by its path."""
    found = sorted(folder.rglob("*.png"))
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in found}


def names(folder):
    return sorted(x.name for x in folder.iterdir())


@pytest.fixture(scope="module")
def whole(wan, tmp_path_factory):
    """Sample set of one process without interruption, with one sample per call."""
    folder = tmp_path_factory.mktemp("whole")
    assert make(wan, folder).ids == ("00000", "00001", "00002", "00003")
    return folder


def start(pipe, folder, *, die_at=0, printed=os.devnull, environment=None, **changed):
    """Start a process that calls `make` and kills itself while it writes frame number `die_at`.

    Args:
        printed: file for its stderr.
        environment: environment variables of the process.
        changed: arguments of `make`.
    """

    def run():
        write_png, written = media.write_png, []

        def dying(path, image):
            written.append(path)
            if len(written) == die_at:
                path.write_bytes(b"half an image")
                os.kill(os.getpid(), signal.SIGKILL)
            write_png(path, image)

        os.environ.update(environment or {})
        media.write_png = dying
        with open(printed, "w") as sys.stderr:
            make(pipe, folder, progress=True, **changed)

    # A forked process has the loaded pipeline already.
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_a_clip_is_frames_a_video_and_a_record(whole):
    clips = SampleSet.open(whole)
    assert clips.kind == "clips"
    assert clips.prompts["00002"] == "a white cross"
    frames = clips.frames("00000")
    assert frames.shape == (5, 32, 32, 3)
    assert frames.std() > 5
    assert clips.media("00001") == whole / "00001.mp4"
    manifest = clips.manifest
    assert (manifest["model"], manifest["shards"], manifest["dtype"]) == ("tiny", 1, "float32")
    assert manifest["acceleration"] == {"sla": None, "ras": None, "cache": None}
    records = manifest["samples"]
    assert [records[x]["seed"] for x in clips.ids] == [0, 11, 2, 3]
    assert records["00002"]["negative_prompt"] == "a green triangle"
    assert records["00000"]["sha256"] == sample_files.frames_sha256(frames)
    assert set(records["00000"]["seconds"]) == {"text", "denoise", "decode", "total"}
    assert names(whole) == sorted([*clips.ids, *(f"{x}.mp4" for x in clips.ids), "manifest.json"])


def test_a_killed_process_goes_on_bit_for_bit(wan, whole, tmp_path, tmp_path_factory, counted):
    printed = tmp_path_factory.mktemp("stderr") / "stderr.txt"
    process = start(wan, tmp_path, die_at=8, printed=printed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "1/4" in printed.read_text()
    with pytest.raises(ValueError, match=r"path=.*manifest\.rank0\.jsonl"):
        SampleSet.open(tmp_path)
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert make(wan, tmp_path).ids == SampleSet.open(whole).ids
    assert counted == [[x.prompt] for x in PROMPTS[1:]]
    assert pictures(tmp_path) == pictures(whole)
    assert names(tmp_path) == names(whole)


def test_two_processes_make_what_one_makes(wan, tmp_path):
    make(wan, tmp_path / "one", batch_size=2)
    processes = [
        start(
            wan,
            tmp_path / "two",
            batch_size=2,
            environment={"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert names(tmp_path / "two") == names(tmp_path / "one")
    one, two = (SampleSet.open(tmp_path / x).manifest for x in ("one", "two"))
    assert (one["shards"], two["shards"]) == (1, 2)
    for manifest in (one, two):
        for record in manifest["samples"].values():
            del record["seconds"]
    assert two["samples"] == one["samples"]


def test_the_batch_size_changes_rounding_only(wan, whole, tmp_path, counted):
    samples = plan_samples(
        number_prompts(x.prompt for x in PROMPTS[:2]), SAMPLING, seed=3, count=1, layout="ids"
    )
    both = run_batch(wan, samples)
    for i in range(2):
        alone = run_batch(wan, [samples[i]])
        # fp32 sums of other shapes: some 1e-7 a layer; other noise would differ by 0.1 and more.
        np.testing.assert_allclose(both.frames[i], alone.frames[0], atol=1e-5)
    batched = make(wan, tmp_path, batch_size=3)
    # A prompt with a negative prompt cannot share a call with prompts without one.
    assert counted == [[PROMPTS[i].prompt for i in (0, 1, 3)], [PROMPTS[2].prompt]]
    single = SampleSet.open(whole)
    for name in single.ids:
        difference = single.frames(name).astype(int) - batched.frames(name)
        assert abs(difference).max() <= 1  # a value at a half can round both ways
        assert (difference != 0).mean() < 0.01


def test_images_with_sizes_and_seeds_of_their_own(sd3, tmp_path, counted):
    prompts = [
        PromptRecord("a", "a red circle", seed=5),
        PromptRecord("b", "a red circle", height=32, width=48),
        PromptRecord("c", "a red circle", seed=5),
    ]
    images = make(sd3, tmp_path, prompts, batch_size=4)
    assert images.kind == "images"
    assert [images.frames(x).shape for x in "abc"] == [
        (1, 64, 64, 3),
        (1, 32, 48, 3),
        (1, 64, 64, 3),
    ]
    np.testing.assert_array_equal(images.frames("a"), images.frames("c"))
    assert names(tmp_path) == ["a.png", "b.png", "c.png", "manifest.json"]
    assert [len(x) for x in counted] == [2, 1]
    assert images.manifest["samples"]["a"]["batch"] == 2


FAILURES = {
    "video": (media, "write_video"),
    "frame": (media, "write_png"),
    "note": (Journal, "append"),
    "folder": (sample_files, "atomic_directory"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_whatever_is_interrupted_goes_on(wan, drawn, tmp_path, monkeypatch, where):
    make(wan, tmp_path / "whole", batch_size=3)
    drawn.clear()
    owner, name = FAILURES[where]
    real, calls = getattr(owner, name), []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            make(wan, tmp_path / "cut", batch_size=3)
    done = 0 if where == "frame" else 1
    lines = (tmp_path / "cut" / "manifest.rank0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + done
    make(wan, tmp_path / "cut", batch_size=3)
    # The interrupted batch runs again with all its samples.
    assert drawn == [drawn[0]] * 2 + [[PROMPTS[2].prompt]]
    assert pictures(tmp_path / "cut") == pictures(tmp_path / "whole")
    assert names(tmp_path / "cut") == names(tmp_path / "whole")


def test_a_finished_set_is_left_alone(wan, drawn, tmp_path, capsys):
    make(wan, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    drawn.clear()
    assert len(make(wan, tmp_path)) == len(make(wan, tmp_path, overwrite=True)) == 4
    assert drawn == []
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert capsys.readouterr().err == ""
    make(wan, tmp_path, progress=True)
    assert "checking: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "pixel", "no frame", "no video", "empty video"])
def test_damaged_samples_are_made_again(wan, drawn, tmp_path, damage):
    make(wan, tmp_path)
    before = pictures(tmp_path)
    drawn.clear()
    frame, video = tmp_path / "00001" / "0003.png", tmp_path / "00001.mp4"
    if damage == "truncated":
        frame.write_bytes(frame.read_bytes()[:-50])
    elif damage == "pixel":
        media.write_png(frame, np.zeros((32, 32, 3), np.uint8))
    elif damage == "no frame":
        frame.unlink()
    elif damage == "no video":
        video.unlink()
    else:
        video.write_bytes(b"")
    make(wan, tmp_path)
    assert drawn == [[PROMPTS[1].prompt]]
    assert pictures(tmp_path) == before
    assert video.stat().st_size > 0


def test_a_cut_off_line_of_the_journal_is_made_again(wan, drawn, tmp_path):
    assert make(wan, tmp_path, rank=0, world_size=2) is None
    journal = tmp_path / "manifest.rank0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    drawn.clear()
    assert make(wan, tmp_path, rank=0, world_size=2) is None
    assert drawn == [[PROMPTS[2].prompt]]


def test_other_settings_are_refused_with_what_differs(wan, drawn, tmp_path):
    make(wan, tmp_path)
    before = pictures(tmp_path)
    other = SAMPLING.overridden(num_inference_steps=3)
    with pytest.raises(
        ValueError, match=r"sampling\.num_inference_steps was 2 and is 3; seed was 0 and is 1"
    ):
        make(wan, tmp_path, sampling=other, seed=1)
    with pytest.raises(ValueError, match=r"output_dir=.*prompts"):
        make(wan, tmp_path, PROMPTS[:3])
    with pytest.raises(ValueError, match=r"acceleration\.sla was null"):
        make(wan, tmp_path, sla="balanced")
    assert pictures(tmp_path) == before
    (tmp_path / "mine.txt").write_text("x")
    clips = make(wan, tmp_path, PROMPTS[1:], sampling=other, seed=1, overwrite=True)
    assert clips.ids == ("00001", "00002", "00003")
    assert clips.manifest["sampling"]["num_inference_steps"] == 3
    assert "00000" not in names(tmp_path)
    assert "00000.mp4" not in names(tmp_path)
    assert "mine.txt" in names(tmp_path)


def test_what_is_new_stays_when_an_unfinished_set_is_replaced(sd3, drawn, tmp_path):
    prompts = number_prompts("abcd")
    new = {"prompts": prompts, "seed": 9, "overwrite": True, "batch_size": 2, "world_size": 2}
    make(sd3, tmp_path, prompts, rank=1, world_size=2)
    assert make(sd3, tmp_path, rank=0, **new) is None
    # This journal of the old set lists 00001.png, which is new now. Rank 1 removes the journal when it starts.
    assert "manifest.rank1.jsonl" in names(tmp_path)
    before = pictures(tmp_path)
    drawn.clear()
    assert make(sd3, tmp_path, rank=0, **new) is None
    assert drawn == []
    assert pictures(tmp_path) == before
    assert len(make(sd3, tmp_path, rank=1, **new)) == 4
    assert drawn == [["c", "d"]]


def test_a_run_that_has_replaced_an_unfinished_set_needs_no_overwrite(
    sd3, drawn, tmp_path, monkeypatch
):
    prompts = number_prompts("abcd")
    for rank in range(3):
        make(sd3, tmp_path, prompts, rank=rank, world_size=5)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            make(sd3, tmp_path, prompts, seed=9, overwrite=True)
    assert names(tmp_path) == ["manifest.rank0.jsonl"]
    assert len(make(sd3, tmp_path, prompts, seed=9)) == 4


def test_ranks_that_replace_a_set_at_once_leave_each_other_alone(sd3, drawn, tmp_path, monkeypatch):
    prompts = number_prompts("abcd")
    for rank in range(2):
        make(sd3, tmp_path, prompts, rank=rank, world_size=3)
    new = {"prompts": prompts, "seed": 9, "overwrite": True, "world_size": 2}
    real = generation.remove_old

    def remove(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(generation, "remove_old", real)
            assert make(sd3, tmp_path, rank=1, **new) is None
        real(*arguments)

    monkeypatch.setattr(generation, "remove_old", remove)
    drawn.clear()
    assert len(make(sd3, tmp_path, rank=0, **new)) == 4
    assert drawn == [["b"], ["d"], ["a"], ["c"]]


@pytest.mark.parametrize(
    ("old", "ranks"),
    [("finished", [0]), ("finished", [1, 0]), ("unfinished", [1, 0])],
    ids=["finished-alone", "finished-two", "unfinished-two"],
)
def test_a_kill_before_any_removal_of_an_old_set_goes_on(
    sd3, drawn, tmp_path, monkeypatch, old, ranks
):
    real, removed = Path.unlink, []
    new = {"prompts": number_prompts("ab"), "seed": 9, "world_size": len(ranks)}
    [*_, whole] = [make(sd3, tmp_path / "whole", rank=rank, **new) for rank in ranks]

    def run(folder):
        return [make(sd3, folder, rank=rank, overwrite=True, **new) for rank in ranks]

    for death in itertools.count():
        folder = tmp_path / str(death)
        for rank in range(3 if old == "finished" else 2):
            make(sd3, folder, number_prompts("abcd"), rank=rank, world_size=3)
        removed.clear()

        def unlink(path, death=death, **options):
            if not path.name.startswith(".tmp"):
                removed.append(path)
                if len(removed) > death:
                    raise KeyboardInterrupt
            real(path, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            run(folder)
        run(folder)
        assert names(folder) == ["00000.png", "00001.png", "manifest.json"]
        assert pictures(folder) == pictures(whole.path)
        if len(removed) == death:  # it outlived the last one
            break
    assert death > 4


def test_the_models_own_number_of_steps_is_among_the_settings(wan, drawn, tmp_path):
    clips = make(wan, tmp_path, sampling=SAMPLING.overridden(num_inference_steps=None))
    assert clips.manifest["sampling"]["num_inference_steps"] == 50
    drawn.clear()
    make(wan, tmp_path, sampling=SAMPLING.overridden(num_inference_steps=50))
    assert drawn == []


def test_the_device_is_that_of_the_calls(wan, drawn, tmp_path, monkeypatch):
    # Offloading keeps the model elsewhere between the calls.
    monkeypatch.setattr(type(wan), "_execution_device", torch.device("meta"))
    assert make(wan, tmp_path).manifest["device"] == "meta"


def test_other_weights_under_the_same_name_are_refused(wan, drawn, tmp_path):
    make(wan, tmp_path)
    weight = wan.transformer.blocks[0].attn1.to_v.weight.data
    kept = weight.clone()
    try:
        weight.mul_(2)
        with pytest.raises(ValueError, match=r"output_dir=.*weights was"):
            make(wan, tmp_path)
    finally:
        weight.copy_(kept)


def test_files_of_somebody_else_are_not_touched(wan, drawn, tmp_path):
    (tmp_path / "00002").mkdir()
    (tmp_path / "00002" / "holiday.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"output_dir=.*00002"):
        make(wan, tmp_path)
    assert drawn == []
    with pytest.raises(RuntimeError, match=r"00002: .*sample '00002'"):
        make(wan, tmp_path, overwrite=True)
    assert (tmp_path / "00002" / "holiday.png").exists()


def test_a_full_disk_is_one_error_and_the_run_goes_on_later(wan, drawn, tmp_path, monkeypatch):
    real, written = media.write_png, []

    def full(path, image):
        written.append(path)
        if len(written) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(media, "write_png", full)
        with pytest.raises(RuntimeError, match=r"No space left.*'00001'"):
            make(wan, tmp_path)
    assert [x for x in names(tmp_path) if x.startswith(".tmp")] == []
    drawn.clear()
    assert len(make(wan, tmp_path)) == 4
    assert len(drawn) == 3


@pytest.mark.parametrize("where", ["swept", "faster"])
def test_a_second_process_for_the_same_samples_does_no_harm(
    wan, drawn, tmp_path, monkeypatch, where
):
    """It removes our temporary files when it finishes, or writes the same clip first."""
    real, disturbed = sample_files.atomic_directory, []

    @contextlib.contextmanager
    def disturb(place):
        with real(place) as temporary:
            yield temporary
            if not disturbed:
                disturbed.append(place)
                if where == "faster":
                    shutil.copytree(temporary, place)
                else:
                    shutil.rmtree(temporary)

    make(wan, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "atomic_directory", disturb)
        assert len(make(wan, tmp_path / "two")) == 4
    assert disturbed
    assert pictures(tmp_path / "two") == pictures(tmp_path / "alone")
    assert names(tmp_path / "two") == names(tmp_path / "alone")


def test_values_that_are_not_finite_are_no_picture(wan, tmp_path, monkeypatch):
    def broken(pipe, samples):
        frames = np.full((1, 5, 32, 32, 3), np.nan)
        return BatchResult(tuple(samples), frames, {"total": 1.0}, control.summary(pipe))

    monkeypatch.setattr(module, "run_batch", broken)
    with pytest.raises(RuntimeError, match=r"sample '00000': .*not finite"):
        make(wan, tmp_path)
    assert pictures(tmp_path) == {}


def test_too_large_a_batch_says_what_to_do(wan, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(wan.transformer, "forward", fail)
    with pytest.raises(RuntimeError, match=r"2 samples.*CUDA out of memory.*batch_size"):
        make(wan, tmp_path, batch_size=2)


def test_shards_divide_the_batches_and_the_last_one_merges(wan, drawn, tmp_path):
    prompts = number_prompts(f"clip {i}" for i in range(7))
    make(wan, tmp_path / "one", prompts, batch_size=2)
    drawn.clear()
    for rank in (2, 0):
        assert make(wan, tmp_path / "three", prompts, batch_size=2, rank=rank, world_size=3) is None
    assert drawn == [["clip 4", "clip 5"], ["clip 0", "clip 1"], ["clip 6"]]
    clips = make(wan, tmp_path / "three", prompts, batch_size=2, rank=1, world_size=3)
    assert len(clips) == 7
    assert clips.manifest["shards"] == 3
    assert pictures(tmp_path / "three") == pictures(tmp_path / "one")
    assert names(tmp_path / "three") == names(tmp_path / "one")


def test_more_processes_than_samples(wan, drawn, tmp_path):
    assert make(wan, tmp_path, PROMPTS[:1], rank=4, world_size=5) is None
    assert len(make(wan, tmp_path, PROMPTS[:1], rank=0, world_size=5)) == 1


def test_a_run_may_go_on_with_another_number_of_processes(wan, drawn, tmp_path):
    assert make(wan, tmp_path, rank=0, world_size=2) is None
    assert make(wan, tmp_path, rank=1, world_size=3) is None
    drawn.clear()
    assert len(make(wan, tmp_path)) == 4
    assert drawn == [[PROMPTS[3].prompt]]
    assert [x for x in names(tmp_path) if "rank" in x] == []


def test_a_damaged_sample_is_not_merged_while_its_rank_makes_it_again(wan, drawn, tmp_path):
    make(wan, tmp_path)
    (tmp_path / "00001" / "0000.png").unlink()

    def other_rank(*_):
        # Rank 0 finds nothing to do, and must not put an end to the journal of rank 1.
        make(wan, tmp_path, rank=0, world_size=2)
        assert "manifest.rank1.jsonl" in names(tmp_path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_batch", other_rank)
        with pytest.raises(KeyboardInterrupt):
            make(wan, tmp_path, rank=1, world_size=2)
    assert len(make(wan, tmp_path, rank=1, world_size=2)) == 4
    assert names(tmp_path / "00001")[0] == "0000.png"
    assert "manifest.rank1.jsonl" not in names(tmp_path)


@pytest.fixture
def journals(tmp_path):
    """Folder with the journals of two ranks with two finished samples each, its settings and the shards."""
    settings = {"kind": "images", "seed": 0}
    shards = [Shards({x: i % 2 for i, x in enumerate("abcd")}, rank, 2) for rank in range(2)]
    for rank, own in enumerate(("ac", "bd")):
        header = {"format_version": 1, **settings, "machine": {"gpu": rank}}
        with Journal(tmp_path, shards[rank], header, {}) as journal:
            for name in own:
                journal.append(name, {"files": [f"{name}.png"], "prompt": name})
    return tmp_path, settings, shards


def test_ranks_that_finish_at_once_write_one_manifest(journals):
    folder, settings, shards = journals
    saved = {x.name: x.read_bytes() for x in folder.iterdir()}
    manifests = set()
    for _ in range(10):
        for path in folder.iterdir():
            path.unlink()
        for name, data in saved.items():
            (folder / name).write_bytes(data)
        start, results = threading.Barrier(2), []

        def finish(rank, start=start, results=results):
            start.wait()
            results.append(merge(folder, settings, shards[rank]))

        threads = [threading.Thread(target=finish, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True, True]
        assert names(folder) == ["manifest.json"]
        manifests.add((folder / "manifest.json").read_bytes())
    assert len(manifests) == 1
    assert list(json.loads(manifests.pop())["samples"]) == list("abcd")


def merge_meanwhile(monkeypatch, owner, name, moment, *arguments):
    """Let another rank merge just before call number `moment` of a function."""
    real, calls = getattr(owner, name), []

    def call(*own):
        calls.append(own)
        if len(calls) == moment + 1:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, real)
                assert merge(*arguments)
        return real(*own)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_journals_that_vanish_while_they_are_read(journals, monkeypatch, moment):
    folder, settings, shards = journals
    merge_meanwhile(monkeypatch, journal, "_read", moment, folder, settings, shards[1])
    assert merge(folder, settings, shards[0])
    assert names(folder) == ["manifest.json"]
    assert list(json.loads((folder / "manifest.json").read_text())["samples"]) == list("abcd")


@pytest.mark.parametrize(
    ("owner", "name", "moment"),
    [(Path, "glob", 0), (journal, "_read", 0), (journal, "_read", 1)],
    ids=["before the list", "before the first", "before the second"],
)
def test_a_rank_that_starts_while_others_merge_knows_all(
    journals, monkeypatch, owner, name, moment
):
    folder, settings, shards = journals
    merge_meanwhile(monkeypatch, owner, name, moment, folder, settings, shards[0])
    found = known_samples(folder, settings, overwrite=False)
    assert sorted(found.samples) == list("abcd")
    assert names(folder) == ["manifest.json"]


def test_journals_that_never_can_be_read_end_in_nothing_known(journals, monkeypatch):
    folder, settings, _ = journals
    monkeypatch.setattr(journal, "_read", lambda path: Path("none").read_text())
    assert known_samples(folder, settings, overwrite=False).samples is None


def test_each_rank_knows_its_own_samples_best(journals):
    """Rank 1 lists a sample that it found at its start, and rank 0 has generated it again since."""
    folder, settings, shards = journals
    stale = {"files": ["a.png"], "prompt": "stale"}
    with Journal(folder, shards[1], {"format_version": 1, **settings}, {"a": stale}) as journal:
        for name in "bd":
            journal.append(name, {"files": [f"{name}.png"], "prompt": name})
    assert merge(folder, settings, shards[1])
    samples = json.loads((folder / "manifest.json").read_text())["samples"]
    assert [samples[x]["prompt"] for x in "abcd"] == list("abcd")


VBENCH = [
    PromptRecord("0", "a fantasy landscape"),
    PromptRecord("1", "A fantasy landscape"),
    PromptRecord("2", "Fireworks."),
    PromptRecord("3", "../../a/b: c?"),
    PromptRecord("4", "Snow on rocks and deep canyons, " * 6 + "steady"),
    PromptRecord("5", "long " * 80),
]


def test_vbench_finds_its_clips(wan, drawn, tmp_path, capsys):
    clips = make(wan, tmp_path / "out", VBENCH, layout="vbench", samples_per_prompt=2)
    videos = names(tmp_path / "out" / "vbench")
    for record in (*VBENCH[:3], VBENCH[4]):
        assert f"{record.prompt}-0.mp4" in videos
        assert f"{record.prompt}-1.mp4" in videos
    assert "_._.._a_b_ c_-1.mp4" in videos
    assert len(videos) == 12  # and no other file: VBench takes the suffix from the first file
    assert max(len(x.encode()) for x in videos) <= 255
    assert names(tmp_path) == ["out"]
    assert "note: 4 clips" in capsys.readouterr().err
    assert clips.ids == tuple(f"{i}-{j}" for i in range(6) for j in range(2))
    assert clips.frames("3-1").shape == (5, 32, 32, 3)
    assert clips.media("2-0") == tmp_path / "out" / "vbench" / "Fireworks.-0.mp4"
    assert [clips.manifest["samples"][x]["seed"] for x in clips.ids[:4]] == [0, 1, 2, 3]
    assert len(make(wan, tmp_path / "two", VBENCH[:1], layout="vbench")) == 5


def test_several_samples_a_prompt(wan, drawn, tmp_path):
    prompts = [PromptRecord("x", "a", seed=40), PromptRecord("y", "b")]
    clips = make(wan, tmp_path, prompts, samples_per_prompt=3)
    assert clips.ids == ("x-0", "x-1", "x-2", "y-0", "y-1", "y-2")
    assert [clips.manifest["samples"][x]["seed"] for x in clips.ids] == [40, 41, 42, 3, 4, 5]


@given(
    st.lists(st.tuples(st.sampled_from([None, 32, 48]), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_plans_divide_and_seeds_are_places(sizes, batch_size, count, seed):
    prompts = [
        PromptRecord(f"{i}", "x", height=height, negative_prompt="y" if negative else None)
        for i, (height, negative) in enumerate(sizes)
    ]
    samples = plan_samples(prompts, SAMPLING, seed=seed, count=count, layout="ids")
    assert [x.seed for x in samples] == list(range(seed, seed + len(sizes) * count))
    assert len({x.id for x in samples}) == len(samples)
    batches = plan_batches(samples, batch_size)
    assert sorted(x.id for b in batches for x in b) == sorted(x.id for x in samples)
    assert all(1 <= len(b) <= batch_size and len({x.call for x in b}) == 1 for b in batches)
    assert {x.sampling.height for x in samples if x.record.height is None} <= {32}
    order = [samples.index(b[0]) for b in batches]
    assert order == sorted(order)
    if batch_size == 1:
        assert [b[0] for b in batches] == samples


def test_acceleration_is_on_for_the_run_only(wan, tmp_path):
    from diffusers import FirstBlockCacheConfig

    sla = {"topk": 0.5, "block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 0}
    ras = {"ratio": 0.5, "warmup": 1, "tail": 1, "resets": []}
    steps = SAMPLING.overridden(num_inference_steps=4, height=64)
    from dit_accel import RASConfig, SLAConfig

    clips = make(
        wan,
        tmp_path / "both",
        PROMPTS[:1],
        sampling=steps,
        sla=SLAConfig(**sla),
        ras=RASConfig(**ras),
    )
    record = clips.manifest["samples"]["00000"]
    assert 0 < record["sparse_density"] < record["density"] < 1
    assert 2 < record["cost"] < 4
    assert clips.manifest["acceleration"]["sla"]["topk"] == 0.5
    assert clips.manifest["acceleration"]["ras"]["ratio"] == 0.5
    assert installation_of(wan) is None
    cached = make(
        wan,
        tmp_path / "cache",
        PROMPTS[:1],
        sampling=steps,
        cache=FirstBlockCacheConfig(threshold=0.9),
    )
    assert cached.manifest["acceleration"]["cache"] == {"name": "FirstBlockCache", "threshold": 0.9}
    assert not wan.transformer.is_cache_enabled
    plain = make(wan, tmp_path / "plain", PROMPTS[:1], sampling=steps)
    assert len({x.manifest["samples"]["00000"]["sha256"] for x in (clips, cached, plain)}) == 3


def test_what_is_on_already_is_noted(wan, drawn, tmp_path):
    wan.enable(sla="fast")
    try:
        clips = make(wan, tmp_path, PROMPTS[:1])
        assert clips.manifest["acceleration"]["sla"]["topk"] > 0
        with pytest.raises(ValueError, match=r"sla, ras: .*disable\(\)"):
            make(wan, tmp_path, PROMPTS[:1], sla="fast")
        assert installation_of(wan) is not None
    finally:
        wan.disable()


@pytest.mark.parametrize(
    ("acceleration", "first"),
    [({}, 2), ({"sla": "fast"}, 3), ({"ras": "fast"}, 3)],
    ids=["dense", "sla", "ras"],
)
def test_a_warm_up_is_one_call_more(wan, tmp_path, monkeypatch, acceleration, first):
    """The warm-up call is short without acceleration."""
    steps = []

    def count(pipe, samples, **overrides):
        steps.append(samples[0].sampling.overridden(**overrides).num_inference_steps)
        return run_batch(pipe, samples, **overrides)

    monkeypatch.setattr(module, "run_batch", count)
    three = SAMPLING.overridden(num_inference_steps=3)
    options = {"sampling": three, "warm_up": True, **acceleration}
    assert len(make(wan, tmp_path, PROMPTS[:1], **options)) == 1
    make(wan, tmp_path, PROMPTS[:1], **options)
    assert steps == [first, 3]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, r"prompts=\[\]"),
        ({"prompts": [PromptRecord("a", "x"), PromptRecord("A", "y")]}, r"prompts\[1\]: id='A'"),
        ({"prompts": [PromptRecord("a", "x", height=60)]}, "height=60.*16"),
        ({"prompts": [PromptRecord("a", "x", num_frames=6)]}, "num_frames=6.*4k"),
        (
            {"prompts": [PromptRecord("a", "x"), PromptRecord("b", "x")], "layout": "vbench"},
            r"prompts\[1\]: prompt='x'.*prompts\[0\].*layout='vbench'",
        ),
        ({"batch_size": 0}, "batch_size=0: .*>= 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"fps": 0}, r"fps=0: .*\[0\.01, 1000\]"),
        ({"seed": -1}, r"seed=-1: .*\[0, 2"),
        ({"layout": "tree"}, "layout='tree': .*ids.*vbench"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"rank": 0}, "rank=0, world_size=None"),
        ({"cache": object(), "batch_size": 2}, "batch_size=2: .*1 with cache"),
        ({"sla": "fats"}, "sla='fats'.*'fast'"),
        ({"output_dir": "/proc/none/out"}, "output_dir='/proc/none/out'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_bad_input_is_one_error_before_anything_is_written(wan, drawn, tmp_path, changed, message):
    folder = tmp_path / "out"
    for act in (check_generate, generate):
        with pytest.raises(ValueError, match=message):
            make(wan, **{"folder": folder, "act": act} | changed)
    assert drawn == []
    assert not folder.exists()


def test_a_check_says_what_a_run_would_and_leaves_no_trace(wan, drawn, tmp_path):
    def trace():
        return {x: x.is_file() and x.read_bytes() for x in tmp_path.rglob("*")}

    def check(folder, **changed):
        assert make(wan, folder, act=check_generate, **changed) is None

    check(tmp_path / "new" / "out", sla="fast", warm_up=True)
    assert trace() == {}
    assert installation_of(wan) is None
    make(wan, tmp_path / "old")
    make(wan, tmp_path / "begun", rank=0, world_size=2)
    (tmp_path / "begun" / "manifest.rank1.jsonl").write_text("{\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "00002").mkdir()
    before = trace()
    drawn.clear()
    check(tmp_path / "old")
    for folder, changed, message in (
        ("old", {"seed": 1}, "seed was 0 and is 1"),
        ("begun", {}, r"manifest\.rank1\.jsonl.*format 1"),
        ("foreign", {}, "output_dir=.*00002"),
    ):
        with pytest.raises(ValueError, match=message):
            check(tmp_path / folder, **changed)
        check(tmp_path / folder, overwrite=True, **changed)
    with pytest.raises(TypeError, match="sampels"):
        check(tmp_path / "old", sampels=1)
    assert drawn == []
    assert trace() == before


def test_what_images_cannot_have(sd3, drawn, tmp_path):
    with pytest.raises(ValueError, match="layout='vbench'"):
        make(sd3, tmp_path, layout="vbench")
    assert names(tmp_path) == []


def test_a_damaged_manifest_needs_overwrite(wan, drawn, tmp_path):
    make(wan, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: .*JSON.*overwrite"):
        make(wan, tmp_path)
    assert len(make(wan, tmp_path, overwrite=True)) == 4


def test_torchrun_says_who_we_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert shard_of() == (0, 1)
    assert device_name("cpu") == "cpu"
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert shard_of() == (5, 8)
    assert shard_of(0, 2) == (0, 2)
    assert device_name("cuda") == "cuda:1"
    assert device_name("cuda:3") == "cuda:3"
    assert device_name("cpu") == "cpu"
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK='x', WORLD_SIZE='8'"):
        shard_of()


def test_a_folder_of_somebodys_pictures_is_not_taken_over(sd3, tmp_path, drawn):
    media.write_png(tmp_path / "mine.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"output_dir=.*mine\.png"):
        make(sd3, tmp_path, PROMPTS)
    assert [x.name for x in tmp_path.iterdir()] == ["mine.png"]
