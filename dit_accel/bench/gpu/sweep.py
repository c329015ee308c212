"""Times of tiles around the defaults of the forward, rows and columns kernels, in launches of real calls."""

import math
import re
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from dit_accel.bench.gpu import compiling
from dit_accel.bench.gpu.cases import DENSE_TORCH, WAN, Layer, Shape, dense_functions, inputs
from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.recording import HeldLaunch
from dit_accel.bench.gpu.speed import held_launches, ratios
from dit_accel.bench.timing import Functions
from dit_accel.kernels.block_sparse.tiles import Tile, pad

D64 = Shape("d=64", 24, 17776, 64)
SMALL = Shape("blocks of 64", 12, 32760, 128, block_q=64)
# Tiles that are measured in addition to the neighbours of the default tile.
EXTRA = (Tile(128, 64, 8, 3), Tile(128, 64, 8, 5), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3))
# Allowed relative error: tiles sum in different orders before rounding.
TOLERANCE = 5e-3


def tile_of(launch: HeldLaunch) -> Tile:
    """Return the tile of a launch."""
    return Tile(*(launch.keywords[n] for n in ("TQ", "TK", "num_warps", "num_stages")))


def retiled(launch: HeldLaunch, tile: Tile) -> HeldLaunch:
    """Return a launch with another tile and its grid.

    A program of "columns" computes a part of a key block, a program of any other kernel a part of a query block. If the
    launch packs query heads, a program computes as many of them as fit in the tile.
    """
    block, part = ("BLOCK_K", "TK") if "columns" in launch.name else ("BLOCK_Q", "TQ")
    size, now = launch.keywords[block], launch.keywords[part]
    blocks = launch.grid[0] // math.ceil(size / now)
    new = {"TQ": tile.q, "TK": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}
    lanes = launch.grid[1]
    if (packed := launch.keywords.get("HEADS_PACKED", 1)) > 1:
        group = launch.keywords["group"]
        fit = [n for n in range(2, group + 1) if group % n == 0 and n * size <= tile.q]
        new["HEADS_PACKED"] = max(fit, default=1)
        lanes = lanes * packed // new["HEADS_PACKED"]
    grid = (blocks * math.ceil(size / new[part]), lanes, *launch.grid[2:])
    return launch.changed(grid, **new)


def neighbours(tile: Tile, block_q: int, block_k: int) -> list[Tile]:
    """Return the tiles that differ from `tile` in one number, and `EXTRA`, as far as they fit the blocks.

    Args:
        tile: default tile.
        block_q: query rows of a program: tokens per query block, times the number of packed heads.
        block_k: tokens per key block.
    """
    found = [
        *(tile._replace(q=x) for x in (tile.q // 2, tile.q * 2)),
        *(tile._replace(k=x) for x in (tile.k // 2, tile.k * 2)),
        *(tile._replace(warps=x) for x in (4, 8)),
        *(tile._replace(stages=x) for x in range(max(1, tile.stages - 1), tile.stages + 3)),
        *EXTRA,
    ]
    fits = [x for x in found if 16 <= x.q <= pad(block_q) and 16 <= x.k <= pad(block_k)]
    return [x for x in dict.fromkeys(fits) if x != tile]


def label(tile: Tile) -> str:
    return f"{tile.q}x{tile.k} w{tile.warps} s{tile.stages}"


def differs(device: Device, launch: HeldLaunch, default: list[Tensor], out: list[Tensor]) -> float:
    """Return the relative error of the outputs of a launch against `default`. The outputs are NaN before the launch."""
    for x in out:
        x.fill_(float("nan"))
    launch()
    device.wait()
    written = [(a.float(), b.float()) for a, b in zip(out, default, strict=True)]
    return device.number(lambda: max((a - b).norm() / b.norm() for a, b in written))


def sweep(shape: Shape, mode: str, kernel: str) -> SubStep:
    """Return a sub-step that compares the output of each tile of a kernel with that of the default, and times the tiles."""

    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, shape, grad=kernel != "forward")
        layer = Layer(device, shape, mode, 0.05, spread=False)
        plan = layer.plan(layer.route(q, k))
        if kernel == "forward":
            held = held_launches(lambda: layer.attend(q, k, v, plan))
        else:
            o = layer.attend(q, k, v, plan)
            held = held_launches(lambda: torch.autograd.grad(o, (q, k, v), torch.ones_like(o)))
        launch = next((x for x in held if x.name == kernel), None)
        if launch is None:
            raise LookupError(
                f"kernel={kernel!r}: not launched; launches are {[x.name for x in held]}"
            )
        default = tile_of(launch)
        out = outputs(launch)
        launch()
        kept = [x.detach().clone() for x in out]
        functions: Functions = {f"default {label(default)}": launch}
        wrong, refused = {}, {}
        # Tiles that failed to compile before: compiling them here could end this process.
        uncompiled = {
            name: error for x in found.values() for name, error in x.get("not_compiled", {}).items()
        }
        rows = launch.keywords.get("HEADS_PACKED", 1) * shape.block_q
        for tile in neighbours(default, rows, shape.block_k):
            try:
                candidate = retiled(launch, tile)
                if (known := uncompiled.get(compiling.label(candidate.sketch()))) is not None:
                    raise RuntimeError(known)
                distance = differs(device, candidate, kept, out)
            except Exception as error:  # the tile may need too much memory or too many registers
                device.wait()
                refused[label(tile)] = f"{type(error).__name__}: {error}"[:200]
                continue
            if distance <= TOLERANCE or device.dry:
                functions[label(tile)] = candidate
            else:
                wrong[label(tile)] = distance
        with torch.no_grad():
            dense = dense_functions(device, q.detach(), k.detach(), v.detach(), None)
            functions |= {"flash": dense["flash"]}
            times = device.times(functions, 8, optional=DENSE_TORCH)
        tiles = {n: x for n, x in times.items() if n not in (*DENSE_TORCH, "refused")}
        best = min(tiles, key=lambda n: tiles[n]["p50"])
        density = layer.density(device, plan)
        of = ratios(times, flops=shape.flops, shares={}, density=density)
        gain = times[f"default {label(default)}"]["p50"] / tiles[best]["p50"]
        result: Result = {"best": best, "default": label(default), "gain": gain}
        for name, x in (("wrong", wrong), ("not_launchable", refused)):
            result |= {name: x} if x else {}
        return {**result, "ms": times, "ratios": of}

    name = f"{kernel} {mode}, {shape.name}"
    return SubStep("tiles", name, run, 6.0, 3 * 10 * shape.flops)


def outputs(launch: HeldLaunch) -> list[Tensor]:
    """Return the tensors that a launch writes: the gradients of q, k and v if it has any, else its output."""
    named = {n: x for n, x in launch.keywords.items() if isinstance(x, Tensor)}
    gradients = [x for n, x in named.items() if re.fullmatch("GRAD_[QKV]", n)]
    return gradients or [named["O"]]


def sub_steps() -> Iterator[SubStep]:
    yield sweep(WAN, "none", "forward")
    yield sweep(WAN, "complement", "forward")
    yield sweep(WAN, "none", "rows")
    yield sweep(WAN, "none", "columns")
    yield sweep(WAN, "shared_softmax", "forward")
    for shape, kernel in product((SMALL, D64), ("forward",)):
        yield sweep(shape, "none", kernel)
    for kernel in ("rows", "linear_columns"):
        yield sweep(WAN, "complement", kernel)
