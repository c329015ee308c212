"""Encoding of a data set into a folder."""

import json
import threading

import numpy as np
import pytest
import torch

from dit_accel.finetune.data import precompute as module
from dit_accel.finetune.data.captions import read_captions
from dit_accel.finetune.data.encode import size_rules
from dit_accel.finetune.data.model_identity import model_identity
from dit_accel.finetune.data.precompute import precompute
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.samples import load_batch
from dit_accel.finetune.data.sources import find_sources, size_choice
from dit_accel.finetune.data.store import open_store

from .fakes import FakeModel
from .videos import brightness, write_clip


def planned(folder, model, **sizes):
    choice = size_choice(size_rules(model), **sizes)
    sources, broken = find_sources(read_captions(folder), choice, skip_broken=True)
    return sources, choice, broken


def run(folder, output, model=None, sizes=None, **options):
    model = model or FakeModel()
    sources, choice, broken = planned(folder, model, **(sizes or {}))
    return precompute(model, sources, choice, output, broken=broken, **options)


def test_the_output_of_make_data(tmp_path, dataset, model):
    """Its layout is videos/*.mp4 and captions.jsonl with file_name and text."""
    result = run(dataset(5), tmp_path / "out", model, batch_size=2)
    assert (result.samples, result.made, result.broken) == (5, 5, {})
    assert result.buckets == {"9x48x64": 5}
    store = open_store(tmp_path / "out", model=model_identity(model.pipe))
    assert list(store.ids) == [f"videos/{i:05d}.mp4" for i in range(5)]
    assert store.contents.settings["made_from"] == "files"
    batch = load_batch(store, [0, 3])
    assert batch.latents.shape == (2, *model.latent_shape(48, 64, 9))
    text = model.encode_prompts(["clip 0", "clip 3"])
    for name, x in text.items():
        assert torch.equal(batch.conditions[name], x)
    # Frames 0, 4 and 8, each averaged over 8 x 8 pixels.
    for i in range(3):
        corner = batch.latents[0, :, i, -1, -1]
        assert torch.allclose(corner, torch.tensor(brightness(4 * i) / 127.5 - 1), atol=0.03)


def test_batches_are_of_one_bucket(tmp_path, dataset, model):
    folder = dataset(3)
    for i in range(2):
        write_clip(folder / f"videos/tall{i}.mp4", 9, height=64, width=32)
    with (folder / "captions.jsonl").open("a") as file:
        for i in range(2):
            file.write(json.dumps({"file_name": f"videos/tall{i}.mp4", "text": "tall"}) + "\n")
    result = run(folder, tmp_path / "out", model, batch_size=4)
    assert result.buckets == {"9x48x64": 3, "9x64x32": 2}
    assert model.calls == [(3, 3, 9, 48, 64), (2, 3, 9, 64, 32)]


def test_files_are_decoded_while_the_model_encodes(tmp_path, dataset, monkeypatch):
    """The model's thread does not decode; decoding goes on while it is busy, but not far ahead."""
    folder, threads, ahead = dataset(12, frames=5), set(), []
    decoded = threading.Semaphore(0)
    real = module.read_clip

    def noted(*args):
        threads.add(threading.current_thread())
        clip = real(*args)
        decoded.release()
        ahead.append(1)
        return clip

    class Busy(FakeModel):
        def encode_pixels(self, pixels):
            first = not self.calls
            result = super().encode_pixels(pixels)
            if first:
                # The clips of this batch, and more while it is encoded.
                for _ in range(4):
                    assert decoded.acquire(timeout=10)
                self.ahead = len(ahead)
            return result

    model = Busy()
    monkeypatch.setattr(module, "read_clip", noted)
    run(folder, tmp_path / "out", model, batch_size=2, workers=2)
    assert threading.main_thread() not in threads
    assert 4 <= model.ahead <= 6


def test_images(tmp_path, dataset):
    model = FakeModel(images=True)
    result = run(dataset(2), tmp_path / "out", model, {"height": 32, "width": 32})
    assert result.buckets == {"1x32x32": 2}
    assert open_store(tmp_path / "out").sample(0)[0].shape == (3, 4, 4)


def break_tail(path):
    data = bytearray(path.read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    at = first + int(0.8 * (last - first))
    data[at : at + 30] = bytes(30)
    path.write_bytes(data)


def test_a_file_that_cannot_be_decoded_is_an_error(tmp_path, dataset):
    """It keeps what was encoded before, so that the next run goes on."""
    folder = dataset(6, frames=37)
    break_tail(folder / "videos/00003.mp4")
    with pytest.raises(BrokenFileError, match=r"00003.mp4: .*\d+ of 37 .*--skip-broken"):
        run(folder, tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"precomputed_dir='.*out': .*incomplete"):
        open_store(tmp_path / "out")
    write_clip(folder / "videos/00003.mp4", 37)
    result = run(folder, tmp_path / "out")
    assert (result.samples, result.made) == (6, 3)


def test_broken_files_are_left_out_and_listed(tmp_path, dataset):
    folder = dataset(6, frames=37)
    break_tail(folder / "videos/00003.mp4")
    (folder / "videos/00004.mp4").write_text("hello")
    result = run(folder, tmp_path / "out", skip_broken=True, batch_size=4)
    assert (result.samples, result.made) == (4, 4)
    assert result.buckets == {"37x48x64": 4}
    assert list(result.broken) == ["videos/00004.mp4", "videos/00003.mp4"]
    store = open_store(tmp_path / "out")
    assert [x[7:12] for x in store.ids] == ["00000", "00001", "00002", "00005"]
    assert store.contents.broken == result.broken
    assert "videos/00004.mp4: " in store.contents.broken["videos/00004.mp4"]
    # The file was repaired: a second run makes it.
    write_clip(folder / "videos/00003.mp4", 37)
    write_clip(folder / "videos/00004.mp4", 37)
    result = run(folder, tmp_path / "out", skip_broken=True)
    assert (result.samples, result.made, result.broken) == (6, 2, {})


def test_nothing_that_can_be_decoded_is_an_error(tmp_path, dataset):
    folder = dataset(1, frames=37)
    break_tail(folder / "videos/00000.mp4")
    with pytest.raises(ValueError, match=r"none of the 1 files .*00000.mp4"):
        run(folder, tmp_path / "out", skip_broken=True)


def test_a_second_run_encodes_nothing_and_more_files_alone(tmp_path, dataset):
    folder = dataset(3)
    run(folder, tmp_path / "out")
    model = FakeModel()
    result = run(folder, tmp_path / "out", model)
    assert (result.samples, result.made) == (3, 0)
    assert model.calls == []
    write_clip(folder / "videos/new.mp4", 9)
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "videos/new.mp4", "text": "new"}) + "\n")
    assert run(folder, tmp_path / "out", model).made == 1
    assert model.calls == [(1, 3, 9, 48, 64)]


def test_a_run_that_failed_goes_on(tmp_path, dataset):
    """Precomputed samples are kept, whatever ended the run."""

    class Failing(FakeModel):
        def encode_pixels(self, pixels):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().encode_pixels(pixels)

    folder = dataset(5)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", Failing())
    assert run(folder, tmp_path / "out").made == 2
    run(folder, tmp_path / "whole")
    resumed, whole = open_store(tmp_path / "out"), open_store(tmp_path / "whole")
    assert resumed.ids == whole.ids
    for i in range(5):
        assert torch.equal(resumed.sample(i)[0], whole.sample(i)[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fps": 5}, "fps was null and is 5"),
        ({"height": 16, "width": 16}, "height was null and is 16"),
    ],
)
def test_other_options_need_another_folder(tmp_path, dataset, sizes, message):
    folder = dataset(2)
    run(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=f"output_dir=.* settings: .*{message}"):
        run(folder, tmp_path / "out", sizes=sizes)
    assert run(folder, tmp_path / "out", sizes=sizes, overwrite=True).made == 2


def test_changed_captions_and_files_are_noticed(tmp_path, dataset):
    folder = dataset(2)
    run(folder, tmp_path / "out")
    table = folder / "captions.jsonl"
    table.write_text(table.read_text().replace("clip 1", "other"))
    with pytest.raises(
        ValueError, match=r'data: .*videos/00001.mp4 \(caption was "clip 1" and is "other"\)'
    ):
        run(folder, tmp_path / "out")


def test_latents_that_are_not_finite_are_refused(tmp_path, dataset):
    class Overflowing(FakeModel):
        def encode_pixels(self, pixels):
            return super().encode_pixels(pixels) + float("inf")

    with pytest.raises(ValueError, match=r"videos/00000.mp4: .*not finite"):
        run(dataset(1), tmp_path / "out", Overflowing())


def test_too_little_memory_is_one_line(tmp_path, dataset):
    class Large(FakeModel):
        def encode_pixels(self, pixels):
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(
        RuntimeError, match=r"out of memory .*batch_size=2 .*\[9, 48, 64\]"
    ) as error:
        run(dataset(2), tmp_path / "out", Large(), batch_size=2)
    assert "\n" not in str(error.value)


def test_the_result_does_not_depend_on_workers(tmp_path, dataset):
    folder = dataset(4)
    for workers in (1, 3):
        run(folder, tmp_path / f"{workers}", workers=workers, batch_size=3)
    one, three = (open_store(tmp_path / f"{x}") for x in (1, 3))
    assert one.ids == three.ids
    assert all(np.array_equal(one.sample(i)[0], three.sample(i)[0]) for i in range(4))
