import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.sla import tile_order

CPU = torch.device("cpu")
TILES = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 4, 4), (4, 1, 3), (3, 3, 3), (4, 4, 4), (8, 8, 8)]
sides = st.integers(1, 40)
grids = st.tuples(sides, sides, sides).filter(lambda grid: math.prod(grid) < 20_000)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_grid_survives_the_round_trip(tile):
    for grid in itertools.product(range(1, 7), repeat=3):
        tokens = math.prod(grid)
        order = tile_order(grid, tile, CPU)
        x = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1)
        assert torch.equal(order.undo(order.apply(x)), x), grid
        assert torch.equal(order.apply(order.undo(x)), x), grid


@given(grid=grids, tile=st.sampled_from(TILES))
def test_tiles_follow_each_other_without_gaps_and_hold_neighbours_in_raster_order(grid, tile):
    order = tile_order(grid, tile, CPU)
    assert torch.equal(order.gather.sort().values, torch.arange(math.prod(grid)))
    points = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)[order.gather]
    owner = points // torch.tensor(tile)
    counts = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    number = (owner[:, 0] * counts[1] + owner[:, 1]) * counts[2] + owner[:, 2]
    assert (number.diff() >= 0).all()
    assert len(number.unique()) == math.prod(counts)
    same = number.diff() == 0
    assert (order.gather.diff()[same] > 0).all()


def test_tiles_follow_each_other_in_raster_order():
    order = tile_order((1, 4, 4), (1, 2, 2), CPU)
    assert order.gather.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
