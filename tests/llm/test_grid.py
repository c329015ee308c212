"""Grid: planted strides and phases are found again, and the plan costs little more than the exact mask."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.llm.prefill import Prompt, grid_detection, pattern_of
from dit_accel.llm.prefill.estimate import QuerySums
from dit_accel.llm.prefill.grid import detect

from .prompts import always, causal, check_plan, last_rows, prompts

STRIDES = st.integers(2, 110)


def planted(
    length: int, grids: list, *, strength: float = 9.0, noise: float = 0.5, seed: int = 0, **options
) -> Prompt:
    """Return a prompt whose heads attend to (stride, phase), or evenly for None; keys vary in strength by `noise`."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, len(grids), length, 16, generator=g) * 0.3 for _ in range(2))
    q[..., 0] = 4
    at = torch.arange(length)
    for h, grid in enumerate(grids):
        worth = noise * torch.randn(length, generator=g)
        if grid is not None:
            worth += strength * (at % grid[0] == grid[1])
        k[0, h, :, 0] = worth / 4
    return Prompt(q, k, scale=1.0, **options)


@given(
    stride=STRIDES,
    data=st.data(),
    seed=st.integers(0, 2**16),
    noise=st.sampled_from([0.0, 0.5]),
)
def test_planted_stride_and_phase_are_found(stride, data, seed, noise):
    phase = data.draw(st.integers(0, stride - 1))
    other = data.draw(STRIDES)
    prompt = planted(1200, [(stride, phase), None, (other, other - 1)], seed=seed, noise=noise)
    found = detect(prompt.q, prompt.k, scale=1.0, sink=64, window=128)
    assert found.stride.tolist() == [[stride, 0, other]]
    assert found.phase.tolist() == [[phase, 0, other - 1]]
    assert found.gain[0, 1] == 0


def test_weak_grids_and_single_strong_keys_are_no_grids():
    prompt = planted(1200, [(37, 5), None])
    prompt.k[0, 1, 300, 0] = 4
    prompt.k[0, 1, 517, 0] = 4
    options = {"scale": 1.0, "sink": 64, "window": 128}
    found = detect(prompt.q, prompt.k, **options)
    assert found.stride.tolist() == [[37, 0]]
    gain = float(found.gain[0, 0])
    assert 0.5 < gain < 1
    assert detect(prompt.q, prompt.k, **options, min_gain=gain + 0.01).stride.tolist() == [[0, 0]]


@pytest.mark.parametrize("length", [2, 64, 130, 200])
def test_prompts_without_room_for_a_grid(length):
    prompt = planted(length, [(3, 1)])
    assert detect(prompt.q, prompt.k, scale=1.0, sink=64, window=128).stride.tolist() == [[0]]
    assert pattern_of("grid", {"window": 128}).plan(prompt).density() > 0.9


@given(prompt=prompts(), stride=st.integers(2, 60), rows=st.booleans(), data=st.data())
def test_grid_reads_its_definition_and_little_else(prompt, stride, rows, data):
    phase = data.draw(st.integers(0, stride - 1))
    sink, window = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 60))
    options = {"stride": stride, "phase": phase, "sink": sink, "window": window, "rows": rows}
    _, mask = check_plan(pattern_of("grid", options), prompt)
    at = torch.arange(prompt.q_len)[:, None] + prompt.offset
    key = torch.arange(prompt.kv_len)
    dense = last_rows(prompt)[:, None] | (rows & (at % stride == phase))
    on_grid = key % stride == phase
    exact = ((key < sink) | (at - key < window) | on_grid | dense) & causal(prompt)
    assert mask[:, :, exact].all()
    # Sink and window are rounded up to whole blocks, on both sides of a block of queries.
    block = prompt.block
    reach = max(window, 2 * block) + 2 * block
    if rows:
        reach += block + 2 * (block // stride + 1)
    rounded = (key < sink + block) | (at - key < reach) | on_grid | always(prompt)
    if rows or prompt.tail:
        first = dense[:, 0].nonzero()
        rounded = rounded | dense
        if rows:  # other queries of the block where the dense ones begin
            n = (~dense).sum()
            short = (~dense[:, 0]).nonzero()[:, 0][n - n % block :]
            rounded[short if len(first) else short[:0]] = True
        else:
            rounded |= prompt.last_rows().repeat_interleave(block)[: prompt.q_len, None]
    assert not mask[:, :, ~rounded & causal(prompt)].any()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("window", range(40, 57))
def test_the_window_is_read_to_its_last_key(window, rows):
    q, k = torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 140, 4)
    prompt = Prompt(q, k, scale=1.0, block=16, tail=0)
    options = {"stride": 90, "phase": 89, "sink": 0, "window": window, "rows": rows}
    mask = pattern_of("grid", options).plan(prompt).to_dense_mask()[0, 0]
    distance = torch.arange(100)[:, None] + 40 - torch.arange(140)
    assert mask[(distance >= 0) & (distance < window)].all()
    assert mask.double().mean() < 0.75


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("sink", [0, 1, 15, 16, 17, 32, 33])
def test_the_sink_is_read_to_its_last_key(sink, rows):
    q = torch.zeros(1, 1, 112, 4)
    prompt = Prompt(q, q, scale=1.0, block=16, tail=0)
    options = {"stride": 110, "phase": 109, "sink": sink, "window": 1, "rows": rows}
    mask = pattern_of("grid", options).plan(prompt).to_dense_mask()[0, 0]
    blocks = max(1, -(-sink // 16))
    assert mask[64:, : 16 * blocks].all()
    assert not mask[64:80, 16 * blocks : 48].any()


def test_blocks_of_dense_rows_begin_after_whole_blocks_of_others():
    """96 queries, of which 16 are on the grid: the first 80 fill five blocks, none of which is dense."""
    q = torch.zeros(1, 1, 96, 4)
    prompt = Prompt(q, q, scale=1.0, block=16, tail=0)
    options = {"stride": 6, "phase": 5, "sink": 0, "window": 1, "rows": True}
    mask = pattern_of("grid", options).plan(prompt).to_dense_mask()[0, 0]
    at, key = torch.arange(96)[:, None], torch.arange(96)
    far = (at - key > 64) & (key >= 16) & (key % 6 != 5)
    assert not mask[far & (at % 6 != 5)].any()
    assert mask[far & (at % 6 == 5)].all()


def test_keys_of_the_sink_and_the_window_do_not_count(monkeypatch):
    """Strong keys just outside of what counts; inside of it they would make the weights uneven."""
    length, last, sink, window = 587, 64, 65, 100
    stop = length - last - window + 1
    stride = stop - sink + 1
    stride = next(s for s in range(20, 50) if stride % s == 0)
    columns = torch.full((1, 1, length), 1e-4)
    columns[..., stop % stride :: stride] = 0.01
    counted = columns[..., sink:stop].clone()
    columns[..., sink - 1] = columns[..., stop] = 50.0

    def sums(*_, **__):
        return QuerySums(columns, columns)

    monkeypatch.setattr(grid_detection, "last_query_sums", sums)
    q = torch.zeros(1, 1, length, 4)
    found = detect(q, q, scale=1.0, sink=sink, window=window, last=last)
    assert (int(found.stride), int(found.phase)) == (stride, stop % stride)
    on_grid = counted[0, 0] == 0.01
    excess = counted[0, 0][on_grid].sum() - on_grid.sum() * counted.mean()
    torch.testing.assert_close(found.gain[0, 0], excess)


@pytest.mark.parametrize(
    ("stride", "phase", "rows"), [(257, 3, False), (36, 20, True), (129, 128, False)]
)
def test_recall_and_cost_on_a_planted_grid(stride, phase, rows):
    prompt = planted(4096, [(stride, phase)], strength=12, block=16, tail=64)
    options = {"sink": 64, "window": 512}
    if rows:  # queries of the grid attend evenly, so that they need every key
        options |= {"stride": stride, "phase": phase, "rows": True}
        prompt.q[:, :, phase::stride] = 0
    plan = pattern_of("grid", options).plan(prompt)
    at, key = torch.arange(4096)[:, None], torch.arange(4096)
    exact = (key < 64) | (at - key < 512) | (key % stride == phase) | (at >= 4096 - 64)
    if rows:
        exact = exact | (at % stride == phase)
    cost = float((exact & causal(prompt)).sum() / causal(prompt).sum())
    assert plan.density() <= 1.15 * cost
    assert plan.recall(prompt.q, prompt.k, scale=1.0) >= 0.99


def test_recall_without_the_grid_is_low():
    prompt = planted(2048, [(129, 7)], strength=12, block=16, tail=64)
    found, wrong = (
        pattern_of("grid", {"window": 256, **options})
        .plan(prompt)
        .recall(prompt.q, prompt.k, scale=1.0)
        for options in ({}, {"stride": 129, "phase": 8})
    )
    assert found > 0.99
    assert wrong < 0.7


def test_heads_have_grids_of_their_own():
    prompt = planted(1200, [(40, 7), None, (100, 0)], block=16, tail=16)
    plan = pattern_of("grid", {"window": 128}).plan(prompt)
    lists = [[int(j) for j in x if j < 1200] for x in plan.columns[0]]
    assert lists == [list(range(7, 1200, 40)), [], list(range(0, 1200, 100))]
    assert math.ceil(1200 / 40) == plan.columns.shape[-1]
