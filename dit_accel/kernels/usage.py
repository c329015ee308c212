"""Resources of a compiled kernel, and the bounds that kernels must keep."""

from dataclasses import dataclass

from dit_accel.kernels.chips import CHIPS
from dit_accel.kernels.machine_code import ROW_BYTES, Loop
from dit_accel.kernels.predicted import Prediction


@dataclass(frozen=True)
class Usage:
    """Resources and main loops of a compiled kernel."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of spill stores per thread (HIP: spilled registers * 4)."""
    stack: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes per program."""
    programs: int
    """Programs that fit on one SM at a time. 0: the chip cannot launch the kernel, or is not in `CHIPS`."""
    matrix: dict[str, int]
    """Number of matrix instructions in the machine code, by kind."""
    async_copies: int
    """Number of asynchronous copies in the machine code."""
    warps: int
    stages: int
    tile: dict[str, int]
    """Tile sizes, by the name of the kernel's constant."""
    loops: tuple[Loop, ...]
    """Main loops (innermost loops with matrix instructions), in the order of the code."""
    flops: tuple[int, ...]
    """Matrix FLOP of one step of each main loop, from Triton's TTGIR."""
    predicted: tuple[Prediction | None, ...]
    """Prediction for each main loop; None if the model has no number."""


def missed(arch: str, head_dim: int, usage: Usage) -> list[str]:
    """Return the bounds that a kernel misses, as text.

    - Spills: none up to head_dim 128 on sm_80, sm_90 and sm_100; at most 128 bytes otherwise.
    - Shared memory: within the limit of the chip.
    - Main loops: the matrix instruction of the chip, only asynchronous loads, and no wait for all copies.

    A loop with nothing to prefetch (one stage, or no loads of tiles from global memory) is exempt from the bounds on
    loads, and so is gfx942, which loads into registers. Loops over partial blocks and extra keys are not exempt, because
    the plan determines how often they run.

    Args:
        arch: key of `CHIPS`.
        head_dim: head_dim of the launch.
        usage: result of `compile_launch`.
    """
    chip = CHIPS[arch]
    strict = head_dim <= 128 and arch in ("80", "90", "100")
    found = []
    if usage.spills > (0 if strict else 128):
        found.append("spills")
    if usage.shared > chip.shared_kib * 1024:
        found.append("too much shared memory")
    elif not usage.programs:
        found.append("too many registers for one program on an SM")
    if usage.flops and not usage.loops:
        found.append("no main loop in the machine code")
    for number, loop in enumerate(usage.loops, 1):
        if strict and loop.instructions.get("local"):
            found.append(f"spills in loop {number}")
        if chip.matrix not in loop.matrix:
            found.append(f"no {chip.matrix} in loop {number}, but {', '.join(loop.matrix)}")
        if usage.stages == 1 or chip.matrix == "mfma":
            continue
        if loop.wait == 0:
            found.append(f"async_wait 0 in loop {number}")
        elif loop.wait is None and (loop.copied or 0) >= ROW_BYTES:
            found.append(f"no asynchronous copies in loop {number}")
    return found
