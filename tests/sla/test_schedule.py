"""When attention runs sparse, and what is counted."""

import json
from types import SimpleNamespace

import pytest
import torch

from dit_accel.config import SLAConfig
from dit_accel.models import AttentionLayer
from dit_accel.sla import SparseAttention, crossover

CPU = torch.device("cpu")
GRID = (1, 8, 12)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 96, 16, generator=generator) for _ in range(3)]


def layers(count, heads=2, head_dim=16):
    to_q = torch.nn.Linear(heads * head_dim, heads * head_dim)
    module = SimpleNamespace(heads=heads, to_q=to_q)
    return {f"blocks.{i}": AttentionLayer(module, heads, head_dim) for i in range(count)}


def make(count=4, **settings):
    settings = {"block_q": 16, "block_k": 16, "crossover": "never", **settings}
    return SparseAttention(SLAConfig(**settings), layers(count))


def call(attention, layer, qkv, **options):
    return attention.layers[f"blocks.{layer}"](*qkv, **options)


def test_dense_steps_as_a_fraction_are_rounded_up(qkv):
    attention = make(dense_steps=0.26, dense_layers=0)
    outcomes = []
    for step in range(4):
        attention.begin_step(step, 4, GRID, CPU)
        outcomes.append(call(attention, 1, qkv) is None)
    assert outcomes == [True, True, False, False]
    stats = attention.stats()["blocks.1"]
    assert stats.dense_calls == {"dense step": 2}
    assert stats.sparse_calls == 2


def test_dense_layers_count_from_either_end(qkv):
    attention = make(dense_layers=[0, -1], dense_steps=0)
    attention.begin_step(0, 4, GRID, CPU)
    assert [call(attention, i, qkv) is None for i in range(4)] == [True, False, False, True]
    assert attention.stats()["blocks.0"].dense_calls == {"dense layer": 1}
    assert attention.stats()["blocks.0"].density is None


def test_a_new_run_counts_anew(qkv):
    attention = make(dense_layers=0, dense_steps=0)
    for _ in range(2):
        attention.reset()
        attention.begin_step(0, 4, GRID, CPU)
        call(attention, 0, qkv)
    assert attention.stats()["blocks.0"].sparse_calls == 1


def test_masked_and_single_block_calls_go_dense_with_a_reason(qkv):
    attention = make(dense_layers=0, dense_steps=0)
    attention.begin_step(0, 4, GRID, CPU)
    assert call(attention, 0, qkv, masked=True) is None
    attention.begin_step(0, 4, (1, 4, 4), CPU)
    assert call(attention, 0, [x[:, :, :16] for x in qkv]) is None
    assert attention.stats()["blocks.0"].dense_calls == {
        "attention mask": 1,
        "one block: 16 tokens, block_k=16": 1,
    }


def test_topk_by_layer_changes_the_density_of_that_layer_only(qkv):
    attention = make(dense_layers=0, dense_steps=0, topk=0.5, topk_by_layer={-1: 1.0})
    attention.begin_step(0, 4, GRID, CPU)
    for layer in (0, 3):
        call(attention, layer, qkv)
    assert attention.stats()["blocks.0"].density == pytest.approx(0.5)
    assert attention.stats()["blocks.3"].density == pytest.approx(1.0)


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
    assert crossover.min_sparse_length("cpu", topk=0.4, block=64) == crossover.NEVER
    assert crossover.min_sparse_length("cpu", topk=0.1, block=32) == crossover.NEVER


def test_a_device_without_measurements_runs_long_sequences_sparse(measured):
    assert crossover.min_sparse_length("cuda", topk=0.5, block=64) == crossover.UNMEASURED
    assert crossover.min_sparse_length("cuda", topk=0.6, block=64) == crossover.NEVER


def test_crossover_auto_goes_dense_below_and_sparse_above(measured):
    attention = SparseAttention(SLAConfig(topk=0.1, dense_layers=0, dense_steps=0), layers(1))
    short, long = ([torch.randn(1, 2, n, 16) for _ in range(3)] for n in (499, 500))
    attention.begin_step(0, 4, (1, 1, 499), CPU)
    assert call(attention, 0, short) is None
    assert attention.stats()["blocks.0"].dense_calls == {
        "crossover='auto': 499 tokens, sparse from 500 on": 1
    }
    attention.reset()
    attention.begin_step(0, 4, (1, 1, 500), CPU)
    assert call(attention, 0, long) is not None


def test_where_sparse_never_won_the_reason_says_so(measured):
    attention = SparseAttention(SLAConfig(topk=0.4, dense_layers=0, dense_steps=0), layers(1))
    attention.begin_step(0, 4, (1, 1, 3000), CPU)
    assert call(attention, 0, [torch.randn(1, 2, 3000, 16) for _ in range(3)]) is None
    assert attention.stats()["blocks.0"].dense_calls == {
        "crossover='auto': 3000 tokens, sparse was not measured to win": 1
    }


def test_text_does_not_count_for_the_crossover(measured):
    """Else calls would run sparse in an order and in tiles that were not made for it."""
    attention = SparseAttention(
        SLAConfig(topk=0.4, dense_layers=0, dense_steps=0, block_q=32, block_k=32), layers(1)
    )
    qkv = [torch.randn(1, 2, 499 + 77, 16) for _ in range(3)]
    attention.begin_step(0, 4, (1, 1, 499), CPU)
    assert call(attention, 0, qkv, text="last") is None
    assert attention.order((1, 1, 499), CPU) is None
    assert attention.tile((1, 1, 499), CPU) is None


def test_tokens_selected_together_are_query_blocks_where_it_pays(measured):
    attention = SparseAttention(SLAConfig(topk=0.1, block_q=32), layers(2))
    assert attention.tile((1, 1, 499), CPU) is None
    assert attention.tile((1, 1, 500), CPU) == 32
    dense = SparseAttention(SLAConfig(topk=0.1, dense_layers=2), layers(2))
    assert dense.tile((1, 1, 500), CPU) is None


def test_the_shipped_table_is_well_formed():
    rows = crossover._table()
    assert json.loads(json.dumps(rows)) == rows
    assert all({"device", "topk", "block", "min_length"} <= set(row) for row in rows)
