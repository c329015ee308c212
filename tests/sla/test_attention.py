"""When attention runs sparse, and what is counted."""

import json

import pytest
import torch

from dit_accel.config import SLAConfig
from dit_accel.sla import SparseAttention, crossover


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 96, 16, generator=generator) for _ in range(3)]


def make(**settings):
    return SparseAttention(
        SLAConfig(**{"block_q": 16, "block_k": 16, "crossover": "never", **settings}), 4
    )


def test_dense_steps_as_a_fraction_are_rounded_up(qkv):
    attention = make(dense_steps=0.26, dense_layers=0)
    outcomes = []
    for step in range(4):
        attention.begin_step(step, 4, (1, 8, 12))
        outcomes.append(attention(1, *qkv) is None)
    assert outcomes == [True, True, False, False]
    assert attention.layers[1].dense_calls == {"dense step": 2}


def test_dense_layers_count_from_either_end(qkv):
    attention = make(dense_layers=[0, -1], dense_steps=0)
    attention.begin_step(0, 4, (1, 8, 12))
    assert [attention(i, *qkv) is None for i in range(4)] == [True, False, False, True]


def test_masked_and_single_block_calls_go_dense_with_a_reason(qkv):
    attention = make(dense_layers=0, dense_steps=0)
    attention.begin_step(0, 4, (1, 8, 12))
    assert attention(0, *qkv, masked=True) is None
    assert attention(0, *(x[:, :, :16] for x in qkv)) is None
    assert attention.layers[0].dense_calls == {
        "attention mask": 1,
        "one block: 16 keys, block_k=16": 1,
    }


def test_topk_by_layer_changes_the_density_of_that_layer_only(qkv):
    attention = make(dense_layers=0, dense_steps=0, topk=0.5, topk_by_layer={-1: 1.0})
    attention.begin_step(0, 4, (1, 8, 12))
    for layer in (0, 3):
        attention(layer, *qkv)
    assert attention.layers[0].density == pytest.approx(0.5)
    assert attention.layers[3].density == pytest.approx(1.0)


def test_a_tile_order_needs_its_grid(qkv):
    attention = make(order=(1, 4, 4), dense_layers=0, dense_steps=0)
    attention.begin_step(0, 4, (1, 5, 5))
    with pytest.raises(RuntimeError, match=r"the grid \(1, 5, 5\) does not hold 96 tokens"):
        attention(0, *qkv)


@pytest.fixture
def measured(monkeypatch):
    rows = [
        {"device": "cpu", "topk": 0.1, "block": 64, "min_length": 500},
        {"device": "cpu", "topk": 0.25, "block": 64, "min_length": 2000},
        {"device": "cpu", "topk": 0.4, "block": 64, "min_length": None},
    ]
    monkeypatch.setattr(crossover, "_table", lambda: rows)


def test_crossover_reads_only_rows_that_are_no_easier(measured):
    assert crossover.min_sparse_length("cpu", topk=0.05, block=64) == 500
    assert crossover.min_sparse_length("cpu", topk=0.2, block=64) == 2000
    assert crossover.min_sparse_length("cpu", topk=0.4, block=64) is None
    assert crossover.min_sparse_length("cpu", topk=0.1, block=32) is None
    assert crossover.min_sparse_length("cuda", topk=0.1, block=64) is None


def test_crossover_auto_goes_dense_below_and_sparse_above(measured):
    attention = SparseAttention(SLAConfig(topk=0.1, dense_layers=0, dense_steps=0), 1)
    attention.begin_step(0, 4, (1, 1, 1))
    short, long = ([torch.randn(1, 1, n, 16) for _ in range(3)] for n in (499, 500))
    assert attention(0, *short) is None
    assert attention(0, *long) is not None
    assert attention.layers[0].dense_calls == {
        "crossover='auto': 499 tokens, sparse wins from 500": 1
    }


def test_the_shipped_table_is_well_formed():
    rows = crossover._table()
    assert json.loads(json.dumps(rows)) == rows
    assert all({"device", "topk", "block", "min_length"} <= set(row) for row in rows)
