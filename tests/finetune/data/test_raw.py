"""Files that are encoded while training runs."""

import pytest
import torch

from dit_accel.finetune.data.captions import read_captions
from dit_accel.finetune.data.encode import size_rules
from dit_accel.finetune.data.precompute import precompute
from dit_accel.finetune.data.raw import RawSamples
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.samples import load_batch
from dit_accel.finetune.data.sources import find_sources, size_choice
from dit_accel.finetune.data.store import open_store

from .fakes import FakeModel
from .test_precompute import break_tail
from .videos import write_clip


def raw(folder, model, **options):
    sizes = size_choice(size_rules(model), fps=10)
    sources, _ = find_sources(read_captions(folder), sizes)
    return RawSamples(sources, model, fps=10, **options), sources, sizes


def test_mixed_lengths_equal_the_precomputed_folder(tmp_path, dataset, model):
    folder = dataset(3)
    write_clip(folder / "videos/00001.mp4", 30)
    samples, sources, sizes = raw(folder, model)
    assert list(samples.buckets) == ["9x48x64", "29x48x64", "9x48x64"]
    precompute(model, sources, sizes, tmp_path / "out")
    store = open_store(tmp_path / "out")
    assert (list(store.ids), list(store.buckets)) == (list(samples.ids), list(samples.buckets))
    for i in (2, 0, 1, 0):
        (a, x), (b, y) = samples.sample(i), store.sample(i)
        assert torch.equal(a, b)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_sample_does_not_depend_on_its_batch(dataset, model):
    samples, _, _ = raw(dataset(4), model)
    batch = load_batch(samples, [3, 1, 2])
    assert batch.ids == ("videos/00003.mp4", "videos/00001.mp4", "videos/00002.mp4")
    assert {x[0] for x in model.calls} == {1}
    assert torch.equal(batch.latents[1], samples.sample(1)[0])


def test_samples_are_kept_up_to_a_number_of_bytes(dataset):
    model = FakeModel()
    samples, _, _ = raw(dataset(3), model)
    for _ in range(2):
        for i in range(3):
            samples.sample(i)
    assert len(model.calls) == len(model.prompts) == 3
    size = samples.sample(0)[0].nbytes
    model = FakeModel()
    samples, _, _ = raw(dataset(3, "other"), model, cache_bytes=5 * size)
    for i in (0, 1, 2, 2, 1, 0):
        samples.sample(i)
    assert len(model.calls) == 4
    model = FakeModel()
    samples, _, _ = raw(dataset(1, "third"), model, cache_bytes=0)
    assert torch.equal(samples.sample(0)[0], samples.sample(0)[0])
    assert len(model.calls) == 2


def test_callers_may_change_what_they_get(dataset, model):
    samples, _, _ = raw(dataset(1), model)
    _, conditions = samples.sample(0)
    conditions.clear()
    assert samples.sample(0)[1]


def test_a_file_that_turns_out_broken_is_named(dataset, model):
    folder = dataset(1, frames=37)
    break_tail(folder / "videos/00000.mp4")
    samples, _, _ = raw(folder, model)
    for _ in range(2):
        with pytest.raises(BrokenFileError, match=r"00000.mp4: .*\d+ of 37"):
            samples.sample(0)


def test_latents_that_are_not_finite_are_refused(dataset, model):
    samples, _, _ = raw(dataset(1), model)
    real = model.encode_pixels
    model.encode_pixels = lambda x: real(x) * float("nan")
    with pytest.raises(ValueError, match=r"00000.mp4: .*not finite"):
        samples.sample(0)
