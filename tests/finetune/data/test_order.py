"""The order of batches."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.finetune.data.order import Order

BUCKETS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)
SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**63 - 1)


@given(buckets=BUCKETS, batch_size=SIZES, seed=SEEDS, epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample(buckets, batch_size, seed, epoch):
    order = Order(buckets, batch_size, seed)
    steps = order.steps_per_epoch
    batches = [order.batch(epoch * steps + i) for i in range(steps)]
    counts = Counter(i for batch in batches for i in batch)
    assert set(counts) == set(range(len(buckets)))
    for name in set(buckets):
        own = [counts[i] for i, x in enumerate(buckets) if x == name]
        # What fills the last batch is spread evenly.
        assert max(own) - min(own) <= 1
        assert sum(own) - len(own) < batch_size


@given(buckets=BUCKETS, batch_size=SIZES, seed=SEEDS, step=st.integers(0, 200))
def test_a_batch_is_full_and_of_one_bucket(buckets, batch_size, seed, step):
    batch = Order(buckets, batch_size, seed).batch(step)
    assert len(batch) == batch_size
    assert len({buckets[i] for i in batch}) == 1
    if buckets.count(buckets[batch[0]]) >= batch_size:
        assert len(set(batch)) == batch_size


@given(
    buckets=BUCKETS, batch_size=SIZES, seed=SEEDS, steps=st.lists(st.integers(0, 200), max_size=8)
)
def test_a_batch_depends_on_seed_and_step_alone(buckets, batch_size, seed, steps):
    """A run that resumes, or that asks in another order, gets the same batches."""
    order = Order(buckets, batch_size, seed)
    asked = [order.batch(x) for x in steps]
    assert asked == [Order(buckets, batch_size, seed).batch(x) for x in steps]


@given(
    buckets=BUCKETS,
    seed=SEEDS,
    step=st.integers(0, 50),
    split=st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]),
)
def test_processes_share_one_batch(buckets, seed, step, split):
    """Each process takes its part of the global batch; together they have the batch of one process."""
    processes, own = split
    order = Order(buckets, processes * own, seed)
    parts = [order.batch(step)[rank * own : (rank + 1) * own] for rank in range(processes)]
    assert [i for part in parts for i in part] == Order(buckets, 8, seed).batch(step)


def test_epochs_and_seeds_differ():
    buckets = ["a"] * 32 + ["b"] * 32
    order = Order(buckets, 4, 0)
    epochs = [[order.batch(i + 16 * epoch) for i in range(16)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Order(buckets, 4, 1).batch(i) for i in range(16)]
    names = [buckets[batch[0]] for batch in epochs[0]]
    assert names != sorted(names)


def test_the_order_stays_what_it_was():
    """Resumed runs rely on it: another order is another training."""
    order = Order(["a", "b", "a", "a", "b", "a", "a"], 2, 7)
    assert [order.batch(i) for i in range(8)] == EXPECTED


EXPECTED = [[2, 5], [3, 0], [5, 6], [1, 4], [3, 2], [4, 1], [0, 3], [6, 5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 1, 0), "buckets="), ((["a"], 0, 0), "batch_size=0")],
    ids=["none", "batch"],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(*arguments)
    with pytest.raises(ValueError, match="step=-1"):
        Order(["a"], 1, 0).batch(-1)
