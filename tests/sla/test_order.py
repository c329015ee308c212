import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_scores, sparse_linear_attention
from dit_accel.sla import tile_order

CPU = torch.device("cpu")
TILES = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 4, 4), (4, 1, 3), (3, 3, 3), (4, 4, 4), (8, 8, 8)]
sides = st.integers(1, 6)
grids = st.tuples(sides, sides, sides)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_grid_survives_the_round_trip(tile):
    for grid in itertools.product(range(1, 7), repeat=3):
        tokens = math.prod(grid)
        order = tile_order(grid, tile, CPU)
        x = torch.arange(tokens, dtype=torch.float32).view(1, 1, tokens, 1)
        assert torch.equal(order.undo(order.apply(x)), x), grid


@given(grid=grids, tile=st.sampled_from(TILES))
def test_tokens_of_one_tile_are_spatial_neighbours_in_raster_order(grid, tile):
    order = tile_order(grid, tile, CPU)
    block = math.prod(tile)
    points = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)
    owner = points // torch.tensor(tile)
    for i, start in enumerate(range(0, len(order.gather), block)):
        size = block if order.sizes is None else int(order.sizes[i])
        members = order.gather[start : start + size]
        assert len(owner[members].unique(dim=0)) == 1
        assert (members.diff() > 0).all()


@given(grid=grids, tile=st.sampled_from(TILES))
def test_sizes_count_the_tokens_and_padding_follows_them(grid, tile):
    order = tile_order(grid, tile, CPU)
    block, tokens = math.prod(tile), math.prod(grid)
    fits = all(n % size == 0 for n, size in zip(grid, tile, strict=True))
    assert (order.sizes is None) == fits
    sizes = torch.full((tokens // block,), block) if fits else order.sizes
    assert sizes.sum() == tokens
    assert sizes.min() >= 1
    assert len(order.gather) == len(sizes) * block
    places = torch.arange(len(order.gather)).view(-1, block)
    held = places[torch.arange(block) < sizes[:, None]]
    assert torch.equal(held, order.scatter.sort().values)


def test_tiles_follow_each_other_in_raster_order():
    order = tile_order((1, 4, 4), (1, 2, 2), CPU)
    assert order.gather.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@settings(max_examples=30)
@given(grid=grids, tile=st.sampled_from(TILES), combine=st.sampled_from(["none", "shared_softmax"]))
def test_attention_that_reads_every_tile_is_dense_attention(grid, tile, combine):
    shape = (3, 1, 2, math.prod(grid), 16)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    order = tile_order(grid, tile, CPU)
    block = math.prod(tile)
    tiled = [order.apply(x) for x in (q, k, v)]
    sizes = None if order.sizes is None else order.sizes[None]
    scores = block_scores(*tiled[:2], block_q=block, block_k=block, q_sizes=sizes, k_sizes=sizes)
    plan = SparsePlan.from_scores(
        scores,
        topk=1.0,
        block_q=block,
        block_k=block,
        q_len=tiled[0].shape[2],
        kv_len=tiled[1].shape[2],
        q_block_sizes=order.sizes,
        k_block_sizes=order.sizes,
    )
    out = order.undo(sparse_linear_attention(*tiled, plan, combine=combine))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert plan.density() == 1
