"""Recording, variation and compilation of launches by the GPU check."""

import os
import sys
from unittest import mock

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from dit_accel.bench.gpu import compiling, steps
from dit_accel.bench.gpu.cases import MODES, WAN, Layer, inputs
from dit_accel.bench.gpu.device import DryDevice
from dit_accel.bench.gpu.recording import Sketch, launches, without_device
from dit_accel.bench.gpu.sweep import neighbours, outputs, retiled, tile_of
from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.kernels.block_sparse import tiles
from dit_accel.kernels.block_sparse.tiles import Target, Tile

HOPPER = Target("cuda", "90")


def layer_launches(mode, *, grad=False):
    device = DryDevice()
    with without_device(HOPPER) as held:
        q, k, v = inputs(device, WAN, grad=grad)
        layer = Layer(device, WAN, mode, 0.05)
        o = layer(q, k, v)
        if grad:
            torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    return held


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_launches_its_attention_kernel_last(mode):
    assert layer_launches(mode)[-1].name == "forward"


@pytest.mark.parametrize("kernel", ["forward", "rows", "columns"])
@pytest.mark.parametrize("tile", [Tile(64, 64, 4, 2), Tile(32, 32, 8, 3), Tile(128, 64, 8, 1)])
def test_a_retiled_launch_is_what_the_backend_would_launch(monkeypatch, kernel, tile):
    launch = next(x for x in layer_launches("none", grad=True) if x.name == kernel)
    original = tiles.tile
    for module in list(sys.modules.values()):
        if getattr(module, "tile", None) is original:
            monkeypatch.setattr(module, "tile", lambda *args, **options: tile)
    expected = next(x for x in layer_launches("none", grad=True) if x.name == kernel)
    found = retiled(launch, tile)
    assert found.grid == expected.grid
    assert found.sketch().constants == expected.sketch().constants
    assert found.sketch().options == expected.sketch().options
    assert tile_of(found) == tile


def packed_launch():
    """Return the forward launch of a call whose query heads, four per key head, share their lists."""
    with without_device(HOPPER) as held:
        q = torch.empty(1, 8, 200, 64, device="meta", dtype=torch.float16)
        k = q[:, :2]
        mask = torch.ones(1, 1, 13, 4, dtype=torch.bool, device="meta")
        sizes = {"block_q": 16, "block_k": 64, "q_len": 200, "kv_len": 200}
        plan = SparsePlan.from_block_mask(mask, **sizes)
        block_sparse_attention(q, k, k, plan)
    return next(x for x in held if x.name == "forward")


@pytest.mark.parametrize(
    ("rows", "packed"), [(64, 4), (32, 2), (16, 1)], ids=["4 heads", "2 heads", "1 head"]
)
def test_a_retiled_launch_packs_the_heads_that_fit_in_the_tile(monkeypatch, rows, packed):
    launch = packed_launch()
    assert launch.keywords["HEADS_PACKED"] == 4
    tile = Tile(rows, 64, 4, 2)
    original = tiles.tile
    for module in list(sys.modules.values()):
        if getattr(module, "tile", None) is original:
            monkeypatch.setattr(module, "tile", lambda *args, **options: tile)
    expected, found = packed_launch(), retiled(launch, tile)
    assert found.keywords["HEADS_PACKED"] == packed
    assert found.grid == expected.grid == (13, 8 // packed, 1)
    assert found.sketch().constants == expected.sketch().constants


def test_neighbours_fit_the_blocks():
    found = neighbours(Tile(64, 64, 4, 3), 64, 64)
    assert found
    assert all(x.q <= 64 and x.k <= 64 and x.stages >= 1 for x in found)
    assert Tile(64, 64, 4, 3) not in found
    assert len(set(found)) == len(found)


def test_outputs_are_what_the_kernels_write():
    held = layer_launches("none", grad=True)
    by_name = {x.name: x for x in held}
    assert outputs(by_name["forward"])[0] is by_name["forward"].keywords["O"]
    assert outputs(by_name["rows"])[0] is by_name["rows"].keywords["GRAD_Q"]
    assert len(outputs(by_name["columns"])) == 2


def test_a_sketch_compiles_and_equal_sketches_compile_once():
    sketches = [x.sketch() for x in layer_launches("none") + layer_launches("none")]
    distinct = compiling.unique(sketches)
    assert len(distinct) < len(sketches)
    assert compiling.unique(distinct) == distinct
    compiling.compile_ahead(distinct[-1], HOPPER)


def test_lengths_of_another_divisibility_are_another_kernel():
    sketch = layer_launches("none")[-1].sketch()
    name = next(n for n, x in sketch.arguments.items() if x == WAN.tokens)
    keys = {
        Sketch(**{**sketch._asdict(), "arguments": {**sketch.arguments, name: n}}).key()
        for n in (1, 16, 32, 33, 35)
    }
    assert len(keys) == 3


def test_a_limit_takes_every_kernel_once_before_more_of_one():
    sketches = compiling.unique(
        x.sketch() for mode in MODES for x in layer_launches(mode, grad=True)
    )
    kernels = {x.kernel for x in sketches}
    assert {x.kernel for x in compiling.spread(sketches, len(kernels))} == kernels
    assert len(compiling.spread(sketches, 20)) <= 20
    assert compiling.spread(sketches, None) == sketches


def compile_none(sketch, target):
    """Stand-in for `compile_ahead`: ends its process, raises an error, or succeeds."""
    if sketch.constants["TQ"] == 24:
        os.abort()
    if sketch.constants["TQ"] == 48:
        raise ValueError("no such tile")


def test_a_launch_that_does_not_compile_is_named_and_costs_only_itself(monkeypatch):
    sketch = layer_launches("none")[-1].sketch()
    ends, fails = (sketch._replace(constants={**sketch.constants, "TQ": n}) for n in (24, 48))
    monkeypatch.setattr(compiling, "compile_ahead", compile_none)
    result = compiling.compile_all([ends, fails, sketch], HOPPER, here=False, workers=1)
    assert result["compiled"] == 1
    assert result["not_compiled"] == {
        compiling.label(ends): "the compiler ended its process",
        compiling.label(fails): "ValueError: no such tile",
    }


def test_compiling_ends_at_its_limit():
    sketches = [layer_launches("none")[-1].sketch()]
    result = compiling.compile_all(sketches, HOPPER, here=False, workers=1, seconds=0.01)
    assert result["compiled"] == 0
    assert result["compile_s"] < 30


def test_walking_in_other_processes_finds_the_same():
    ids = [x.id for x in steps.first_measurements() if "5%, none" in x.id][:2]
    found, errors = steps.walk_all([*ids, "speed/unknown"], HOPPER)
    assert errors == {"speed/unknown": mock.ANY}
    expected = [x for name in ids for x in compiling.walk(steps._by_id()[name], HOPPER)]
    assert {x.key() for x in found} == {x.key() for x in expected}


def test_launches_are_recorded_in_order_without_running():
    with without_device(HOPPER) as outer:
        device = DryDevice()
        q, k, v = inputs(device, WAN)
        with launches() as inner:
            Layer(device, WAN, "all", 0.05)(q, k, v)
    assert [x.name for x in inner] == [x.name for x in outer]
    assert inner[-1].name == "forward"


class Chip:
    """Stand-in for the driver of a chip."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def test_compiling_ahead_of_a_call_fills_the_cache_that_the_call_looks_into(monkeypatch):
    """A sketch has dtypes in place of tensors, and must be specialised like the tensors."""
    held = layer_launches("none")[-1]
    sketch = held.sketch()
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(driver, "_active", Chip())
    held.kernel.device_caches.clear()
    found = []
    warmup = held.kernel.warmup
    with mock.patch.object(held.kernel, "warmup", lambda **x: found.append(warmup(**x))):
        compiling.compile_here(sketch, HOPPER)
    held.kernel.device_caches.clear()
    tensors = {
        name: torch.empty(64, dtype=x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in held.keywords.items()
    }
    called = warmup(grid=held.grid, **tensors)
    held.kernel.device_caches.clear()
    assert found[0].hash == called.hash
