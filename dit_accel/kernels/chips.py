"""Data of the chips that kernels are compiled for: limits, and throughput per clock and SM.

A field is None if no document states the number and it was not measured. On AMD chips, an SM is a compute unit and a
warp is a wave.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Limits and throughput of one chip."""

    matrix: str
    """Matrix instruction that kernels must use: a key of `Usage.matrix`."""
    shared_kib: int
    """Shared memory that one program may use, KiB."""
    sm_shared_kib: int
    """Shared memory of an SM, KiB."""
    sm_warps: int
    """Largest number of warps on an SM."""
    tensor: int
    """fp16 or bf16 FLOP per clock of the matrix units, accumulating in fp32."""
    mufu: int
    """exp2, log2, reciprocals per clock."""
    fp: int | None
    """fp32 additions, products or fused multiply-adds per clock. None: they share the `alu` pipe."""
    alu: int
    """Integer operations, comparisons, minima, maxima and conversions per clock."""
    issue: int | None
    """Instructions of a warp that an SM starts per clock."""
    l2_bytes: int | None
    """Bytes per clock that an SM reads from L2 while all other SMs read too."""
    l2_latency: int | None
    """Clocks between the start of a copy and its first byte, from L2 under load."""
    source: str
    """Source of the throughput numbers."""
    warp: int = 32
    """Threads of a warp."""
    quarter_registers: int = 16384
    """32-bit registers of one of the four parts of an SM."""
    reserved_kib: int = 1
    """Shared memory that the driver takes per program, KiB."""

    def programs(self, registers: int, warps: int, shared: int, tensor_columns: int = 0) -> int:
        """Return the number of programs that fit on one SM at a time.

        Args:
            registers: registers per thread.
            warps: warps per program.
            shared: bytes of shared memory per program.
            tensor_columns: columns of tensor memory per program (sm_100 has 512 per SM).
        """
        per_warp = max(-(-registers // 8) * 8, 8) * self.warp
        limits = [
            min(4 * (self.quarter_registers // per_warp), self.sm_warps) // warps,
            self.sm_shared_kib * 1024 // max(shared + self.reserved_kib * 1024, 1),
        ]
        if tensor_columns:
            limits.append(512 // tensor_columns)
        return min(limits)


_GUIDE = "CUDA C++ Programming Guide, table of arithmetic instructions"
CHIPS = {
    "80": Chip(
        "mma.sync", 163, 164, 64, 2048, 16, 64, 64, 4, None, None, f"A100 whitepaper; {_GUIDE}"
    ),
    "89": Chip(
        "mma.sync", 99, 100, 48, 1024, 16, 128, 64, 4, None, None,
        f"Ada whitepaper, L40S (GeForce cards have half the matrix throughput); {_GUIDE}",
    ),
    "90": Chip(
        "wgmma", 227, 228, 64, 4096, 16, 128, 64, 4, 24, 500,
        f"H100 whitepaper; {_GUIDE}; L2: 5.5 TB/s over 132 SMs at 1.755 GHz, an estimate",
    ),
    "100": Chip(
        "tcgen05", 227, 228, 64, 8192, 16, 128, 64, 4, None, None,
        f"B200 data sheet (2.25 PFLOP/s, 148 SMs, 1.85 GHz); {_GUIDE}",
    ),
    "120": Chip(
        "mma.sync", 99, 100, 48, 1024, 16, 128, 64, 4, None, None,
        f"RTX PRO 6000 data sheet (GeForce cards have half the matrix throughput); {_GUIDE}",
    ),
    "gfx942": Chip(
        "mfma", 64, 64, 32, 2048, 16, None, 64, None, None, None,
        "CDNA3 whitepaper and ISA guide: SIMDs of 16 lanes, transcendentals at a quarter of the rate",
        warp=64, quarter_registers=32768, reserved_kib=0,
    ),
}  # fmt: skip
