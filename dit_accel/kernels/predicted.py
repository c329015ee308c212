"""Prediction, from machine code, of the share of a chip's matrix throughput that a main loop reaches.

This is a model, not a measurement: no number was checked against a run. Clocks of one step of one program:

    pipes  = the largest of: matrix units, special functions, fp, alu, instruction issue, L2
    serial = matrix products + arithmetic between them + barriers + loads that do not overlap with anything
    step   = max(pipes, serial / programs on the SM)

`serial` needs latencies, which are known for sm_90 only. For other chips the busiest pipe gives an upper bound.
"""

import re
from dataclasses import dataclass

from dit_accel.kernels.chips import Chip
from dit_accel.kernels.machine_code import Loop

# Clocks, from the pipeline depth of sm_90: arithmetic between two products, a barrier, one iteration of the loop.
_ARITHMETIC, _BARRIER, _TURN = 120, 35, 60
_ON_ALU = ("FMNMX", "FMNMX3", "FSEL", "FSETP")


@dataclass(frozen=True)
class Prediction:
    """Predicted share of the matrix units' throughput of a loop."""

    share: float
    """Matrix FLOP of a step / (clocks of the step * FLOP per clock of the chip), in (0, 1]."""
    bound: bool
    """True if the share is an upper bound, because the latencies of the chip are unknown."""
    limit: str
    """Limiting part: "matrix", "special", "fp", "alu", "issue", "l2" or "serial"."""

    def __str__(self) -> str:
        return f"{'<= ' if self.bound else ''}{100 * self.share:.0f}"


def predict(
    loop: Loop, flops: int | None, warps: int, programs: int, chip: Chip
) -> Prediction | None:
    """Return the prediction for one main loop.

    Args:
        loop: machine code of the loop.
        flops: matrix FLOP of one step.
        warps: warps per program.
        programs: programs per SM.
        chip: chip that the loop is compiled for.
    """
    if not flops or not programs:
        return None
    pipes = _pipes(loop, flops, warps, chip)
    if chip.l2_latency is not None:
        pipes["serial"] = _serial(loop, pipes, warps, chip.l2_latency) / programs
    limit = max(pipes, key=lambda name: pipes[name])
    return Prediction(flops / chip.tensor / pipes[limit], chip.l2_latency is None, limit)


def _pipes(loop: Loop, flops: int, warps: int, chip: Chip) -> dict[str, float]:
    """Return the clocks that each pipe of an SM needs for one step."""
    count = loop.instructions.get
    lanes = warps * chip.warp
    on_alu = sum(n for name, n in loop.names.items() if name in _ON_ALU)
    fp = count("fp", 0) - on_alu + count("imad", 0)
    alu = on_alu + count("int", 0) + count("convert", 0)
    pipes = {
        "matrix": max(
            max(flops, _issued(loop, warps)) / chip.tensor, _shared_reads(loop) * warps / 4
        ),
        "special": count("special", 0) * lanes / chip.mufu,
        "alu": (alu + (fp if chip.fp is None else 0)) * lanes / chip.alu,
    }
    if chip.fp is not None:
        pipes["fp"] = fp * lanes / chip.fp
    if chip.issue is not None:
        pipes["issue"] = loop.total * warps / chip.issue
    if chip.l2_bytes is not None and loop.copied is not None:
        pipes["l2"] = loop.copied * lanes / chip.l2_bytes
    return pipes


def _issued(loop: Loop, warps: int) -> float:
    """Return the matrix FLOP of the instructions of a step.

    They exceed the FLOP of the products if warps compute the same product. 0 for tcgen05, whose instructions do not
    contain their size.
    """
    flops = 0.0
    for name, n in loop.products.items():
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # of a group of four warps
            flops += n * 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps / 4
        elif (shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name)) or (
            shape := re.match(r"HMMA\.(16)(8)(\d+)", name)
        ):
            flops += n * 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps
    return flops


def _shared_reads(loop: Loop) -> float:
    """Return the clocks in which wgmma of one group of four warps reads shared memory, at 128 bytes per clock."""
    clocks = 0.0
    for name, n in loop.products.items():
        if shape := re.match(r"HGMMA\.64x(\d+)x16", name):
            # A is 64 x 16 and B is 16 x N, with two bytes per number.
            clocks += n * (int(shape[1]) / 4 + (16 if name.endswith("shared") else 0))
    return clocks


def _serial(loop: Loop, pipes: dict[str, float], warps: int, latency: int) -> float:
    """Return the clocks of one step of a program that runs alone on an SM: its products wait for its arithmetic."""
    count = loop.instructions.get
    between = sum(count(x, 0) for x in ("fp", "special", "convert", "shuffle")) + 12
    extrema = sum(n for name, n in loop.names.items() if name.startswith("FMNMX"))
    arithmetic = _ARITHMETIC + max(
        pipes["special"] + 0.35 * extrema * warps / 2, between * warps / 4
    )
    barriers = loop.names.get("BAR", 0) + loop.names.get("WARPGROUP", 0) / 2
    exposed = 0.0
    if loop.wait in (0, None):
        # The first product starts after half of the loads of both operands.
        exposed = max(0.0, latency + (loop.copied or 0) * 32 * warps / 50 - pipes["matrix"] / 2)
    return pipes["matrix"] + arithmetic + barriers * _BARRIER + _TURN + exposed
