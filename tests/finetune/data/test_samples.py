"""Batches of samples."""

import pytest
import torch

from dit_accel.finetune.data.samples import Samples, load_batch


class Memory(Samples):
    """Samples in memory."""

    def __init__(self, shapes, buckets):
        self.shapes, self.buckets = shapes, buckets
        self.ids = [f"s{i}" for i in range(len(shapes))]
        self.fetched = []

    def sample(self, index):
        return torch.full((2, *self.shapes[index]), float(index)), {"text": torch.tensor([index])}

    def prefetch(self, indices):
        self.fetched += indices


def test_rows_are_the_samples_in_order():
    samples = Memory([(3, 4)] * 3, ["a", "a", "b"])
    batch = load_batch(samples, [1, 0, 1])
    assert batch.ids == ("s1", "s0", "s1")
    assert batch.latents.shape == (3, 2, 3, 4)
    assert (
        batch.latents[:, 0, 0, 0].tolist() == batch.conditions["text"][:, 0].tolist() == [1, 0, 1]
    )
    assert samples.fetched == [1, 0, 1]


def test_batches_of_several_shapes_are_refused():
    samples = Memory([(3, 4), (4, 3), (3, 4)], ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"indices=\[0, 2\]: .*\['a', 'b'\]"):
        load_batch(samples, [0, 2])
    with pytest.raises(ValueError, match=r"indices=\[\]: .*bucket"):
        load_batch(samples, [])
    with pytest.raises(ValueError, match=r"latents: .*\[2, 4, 3\] of 's1' .*\[2, 3, 4\] of 's0'"):
        load_batch(samples, [0, 1])
