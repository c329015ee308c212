"""Compiles a launch for a chip that is not here, and reads what the assembler says of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"v_mfma",
}
ASYNC_COPIES = r"cp\.async\.c[ag]|cp\.async\.bulk"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of the chip."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of spill stores per thread (HIP: spilled registers * 4)."""
    shared: int
    """Bytes per program."""
    matrix: dict[str, int]
    """Matrix instructions in the assembly, by kind."""
    async_copies: int
    warps: int
    stages: int


def compile_launch(launch: Launch, target: Target) -> Usage:
    """Compile `launch`, specialised as Triton's launcher would: by dtype, divisibility and ones."""
    function = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constants)
    attributes = {}
    for position, name in enumerate(function.arg_names):
        value = launch.arguments.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    hip = target.backend == "hip"
    gpu = GPUTarget("hip", target.arch, 64) if hip else GPUTarget("cuda", int(target.arch), 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    registers, spills = (_hip_usage if hip else _cuda_usage)(compiled.asm)
    text = compiled.asm["amdgcn" if hip else "ptx"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return Usage(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        matrix={name: n for name, n in counts.items() if n},
        async_copies=len(re.findall(ASYNC_COPIES, text)),
        warps=launch.num_warps,
        stages=launch.num_stages,
    )


def _hip_usage(asm: dict[str, str]) -> tuple[int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])
        assert found is not None, f"{key} is not in the assembly"
        return int(found.group(1))

    return number("vgpr_count"), 4 * number("vgpr_spill_count")


def _cuda_usage(asm: dict[str, str]) -> tuple[int, int]:
    """Assembles the PTX once more, verbosely: the driver that would tell is not here."""
    ptx = asm["ptx"]
    found = re.search(r"\.target (\S+?)(,|$)", ptx, re.MULTILINE)
    assert found is not None, "the PTX names no target"
    chip = found.group(1)
    # The assembler has to match the PTX version, and Triton ships two of them.
    new = int(re.sub(r"\D", "", chip)) >= 90 and hasattr(knobs.nvidia, "ptxas_blackwell")
    attempts = [knobs.nvidia.ptxas_blackwell, knobs.nvidia.ptxas] if new else [knobs.nvidia.ptxas]
    errors = ""
    for tool in attempts:
        with (
            tempfile.NamedTemporaryFile("w", suffix=".ptx") as source,
            tempfile.NamedTemporaryFile(suffix=".o") as binary,
        ):
            source.write(ptx)
            source.flush()
            command = [tool.path, "-v", f"--gpu-name={chip}", source.name, "-o", binary.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            spills = re.search(r"(\d+) bytes spill stores", done.stderr)
            registers = re.search(r"Used (\d+) registers", done.stderr)
            assert spills is not None, done.stderr
            assert registers is not None, done.stderr
            return int(registers.group(1)), int(spills.group(1))
        errors += done.stderr
    raise RuntimeError(f"the assembler refused the kernel for {chip}: {errors}")
