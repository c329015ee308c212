"""Micro-batches: the global batch of a step, whoever takes which part of it."""

import pytest

from dit_accel.finetune.feed import Feed

from .fakes import FakeOrder, FakeSamples, load


def rows(size, accumulation, processes, step, *, ahead=False):
    """Ids of the global batch of a step, by row, put together from all processes."""
    samples = FakeSamples(30)
    found = {}
    for rank in range(processes):
        feed = Feed(
            samples,
            FakeOrder(30, size * accumulation * processes, seed=1),
            load,
            size=size,
            accumulation=accumulation,
            rank=rank,
            processes=processes,
            ahead=ahead,
        )
        for before in range(step):
            for micro in range(accumulation):
                feed.micro(before, micro)
        for micro in range(accumulation):
            first = feed.first_row(micro)
            for i, name in enumerate(feed.micro(step, micro).ids):
                found[first + i] = name
        feed.close()
    return [found[i] for i in range(len(found))]


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_do_not_depend_on_who_takes_them(ahead):
    whole = rows(12, 1, 1, step=2)
    assert len(whole) == 12
    for size, accumulation, processes in ((6, 2, 1), (3, 1, 4), (2, 3, 2), (1, 12, 1)):
        assert rows(size, accumulation, processes, step=2, ahead=ahead) == whole


def test_loading_ahead_out_of_order():
    samples = FakeSamples(30)
    feed = Feed(samples, FakeOrder(30, 4, seed=1), load, size=2, accumulation=2, ahead=True)
    plain = Feed(samples, FakeOrder(30, 4, seed=1), load, size=2, accumulation=2)
    for step, micro in ((0, 0), (0, 1), (7, 1), (7, 0), (8, 0), (0, 0)):
        assert feed.micro(step, micro).ids == plain.micro(step, micro).ids
    feed.close()


def test_sample_that_cannot_be_read_is_an_error_where_it_is_needed():
    def broken(samples, indices):
        raise ValueError("clip.mp4: cannot be read")

    feed = Feed(FakeSamples(4), FakeOrder(4, 2, seed=1), broken, size=2, ahead=True)
    with pytest.raises(ValueError, match=r"clip.mp4"):
        feed.micro(0, 0)
    feed.close()


def test_some_rows():
    feed = Feed(FakeSamples(30), FakeOrder(30, 4, seed=1), load, size=4)
    assert feed.rows(3, 1, 2).ids == feed.micro(3, 0).ids[1:3]
