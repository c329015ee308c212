"""Schedule of sparse attention, and its counts."""

import json
from types import SimpleNamespace

import pytest
import torch

from dit_accel.config import SLAConfig
from dit_accel.models import AttentionLayer, Call, Family
from dit_accel.runtime.method import Host
from dit_accel.runtime.run import Run
from dit_accel.sla import SparseAttention, crossover
from dit_accel.sla import geometry as sla_geometry

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


def sparse_attention(config, count):
    attention = SparseAttention(config)
    attention.make_layers(layers(count))
    return attention


def make(count=4, **settings):
    settings = {"block_q": 16, "block_k": 16, "crossover": "never", **settings}
    return sparse_attention(SLAConfig(**settings), count)


def begin(attention, step, grid=GRID, run=None):
    """Begin a call in a step of a run of four steps; None: outside of a sampling loop."""
    if run is None:
        run = Run(None if step is None else torch.arange(4))
        attention.begin_run(run)
    run.step = 0 if step is None else step
    latents = torch.zeros(1, 4, *grid)
    attention.begin_call(run, Call(latents, torch.zeros(1, 2, 3), 4, grid))
    return run


def stats(attention, layer):
    rows = attention.rows(Host(None, Family()), None)
    return next(x for x in rows.layers if x.name == f"blocks.{layer}")


def call(attention, layer, qkv, **options):
    return attention.layers[f"blocks.{layer}"](*qkv, **options)


def test_dense_steps_as_a_fraction_are_rounded_up(qkv):
    attention = make(dense_steps=0.26, dense_layers=0)
    outcomes, run = [], None
    for step in range(4):
        run = begin(attention, step, run=run)
        outcomes.append(call(attention, 1, qkv) is None)
    assert outcomes == [True, True, False, False]
    found = stats(attention, 1)
    assert found.dense_calls == {"dense step": 2}
    assert found.sparse_calls == 2


def test_outside_of_a_sampling_loop_no_step_is_dense(qkv):
    attention = make(dense_steps=1.0, dense_layers=0)
    begin(attention, None)
    assert call(attention, 1, qkv) is not None
    assert not stats(attention, 1).dense_calls


def test_dense_layers_count_from_either_end(qkv):
    attention = make(dense_layers=[0, -1], dense_steps=0)
    begin(attention, 0)
    assert [call(attention, i, qkv) is None for i in range(4)] == [True, False, False, True]
    assert stats(attention, 0).dense_calls == {"dense layer": 1}
    assert stats(attention, 0).density is None


def test_a_new_run_counts_anew(qkv):
    attention = make(dense_layers=0, dense_steps=0)
    for _ in range(2):
        begin(attention, 0)
        call(attention, 0, qkv)
    assert stats(attention, 0).sparse_calls == 1


def test_masked_and_single_block_calls_go_dense_with_a_reason(qkv):
    attention = make(dense_layers=0, dense_steps=0)
    run = begin(attention, 0)
    assert call(attention, 0, qkv, masked=True) is None
    begin(attention, 0, (1, 4, 4), run)
    assert call(attention, 0, [x[:, :, :16] for x in qkv]) is None
    assert stats(attention, 0).dense_calls == {
        "attention mask": 1,
        "one block: 16 tokens, block_k=16": 1,
    }


def test_topk_by_layer_changes_the_density_of_that_layer_only(qkv):
    attention = make(dense_layers=0, dense_steps=0, topk=0.5, topk_by_layer={-1: 1.0})
    begin(attention, 0)
    for layer in (0, 3):
        call(attention, layer, qkv)
    assert stats(attention, 0).density == pytest.approx(0.5)
    assert stats(attention, 3).density == pytest.approx(1.0)


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
    attention = sparse_attention(SLAConfig(topk=0.1, dense_layers=0, dense_steps=0), 1)
    short, long = ([torch.randn(1, 2, n, 16) for _ in range(3)] for n in (499, 500))
    begin(attention, 0, (1, 1, 499))
    assert call(attention, 0, short) is None
    assert stats(attention, 0).dense_calls == {
        "crossover='auto': 499 tokens, sparse from 500 on": 1
    }
    begin(attention, 0, (1, 1, 500))
    assert call(attention, 0, long) is not None


def test_where_sparse_never_won_the_reason_says_so(measured):
    attention = sparse_attention(SLAConfig(topk=0.4, dense_layers=0, dense_steps=0), 1)
    begin(attention, 0, (1, 1, 3000))
    assert call(attention, 0, [torch.randn(1, 2, 3000, 16) for _ in range(3)]) is None
    assert stats(attention, 0).dense_calls == {
        "crossover='auto': 3000 tokens, sparse was not measured to win": 1
    }


def test_text_does_not_count_for_the_crossover(measured):
    """Otherwise calls would run sparse in an order and with tiles for dense attention."""
    attention = sparse_attention(
        SLAConfig(topk=0.4, dense_layers=0, dense_steps=0, block_q=32, block_k=32), 1
    )
    qkv = [torch.randn(1, 2, 499 + 77, 16) for _ in range(3)]
    begin(attention, 0, (1, 1, 499))
    assert call(attention, 0, qkv, text="last") is None
    assert attention.order((1, 1, 499), CPU) is None
    assert attention.tile((1, 1, 499), CPU) is None


def test_tokens_selected_together_are_query_blocks_where_it_pays(measured):
    attention = sparse_attention(SLAConfig(topk=0.1, block_q=32), 2)
    assert attention.tile((1, 1, 499), CPU) is None
    assert attention.tile((1, 1, 500), CPU) == 32
    dense = sparse_attention(SLAConfig(topk=0.1, dense_layers=2), 2)
    assert dense.tile((1, 1, 500), CPU) is None


def test_query_blocks_and_their_order_follow_the_device(measured, monkeypatch):
    monkeypatch.setattr(crossover, "UNMEASURED", 0)
    attention, grid = sparse_attention(SLAConfig(topk=0.1), 2), (4, 16, 16)
    orders = {}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(sla_geometry, "_capability", lambda device, c=capability: c)
        orders[capability] = attention.tile(grid, torch.device("cuda"))
    assert orders == {(8, 0): 64, (9, 0): 128}
    assert attention.tile(grid, CPU) == 64
    assert attention.config.tile_of(grid, 64) != attention.config.tile_of(grid, 128)


def test_the_shipped_table_is_well_formed():
    rows = crossover._table()
    assert json.loads(json.dumps(rows)) == rows
    assert all({"device", "topk", "block", "min_length"} <= set(row) for row in rows)
