"""Ahead-of-time compilation of a launch for any chip, and its resource usage, read from the machine code."""

import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import native_specialize_impl

from dit_accel.kernels import assembly, machine_code
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.chips import CHIPS
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.loop_products import loop_flops
from dit_accel.kernels.predicted import Prediction, predict
from dit_accel.kernels.usage import Usage

# Kernel constants that are tile sizes.
_TILE = ("TQ", "TK", "TL", "TV")


def compile_launch(launch: Launch, target: Target) -> Usage:
    """Compile `launch` for `target`, with the same specialisation as Triton's launcher. The chip need not be present.

    Triton's exception passes through if the kernel does not compile.
    """
    hip = target.backend == "hip"
    gpu = GPUTarget("hip", target.arch, 64) if hip else GPUTarget("cuda", int(target.arch), 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(_source(launch, make_backend(gpu)), target=gpu, options=options)
    if hip:
        code = assembly.read_amdgcn(compiled.asm["amdgcn"])
        registers, spills, stack = _hip_usage(compiled.asm["amdgcn"])
    else:
        text = _disassemble(compiled.asm["cubin"])
        code = assembly.read_sass(text)
        registers, stack = _cuda_usage(text)
        spills = machine_code.local_stores(code)
    loops = machine_code.main_loops(code, amd=hip)
    shared = compiled.metadata.shared
    flops = loop_flops(compiled.asm["ttgir"])
    programs = 0
    predicted: tuple[Prediction | None, ...] = (None,) * len(loops)
    if (chip := CHIPS.get(target.arch)) is not None:
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        programs = chip.programs(registers, launch.num_warps, shared, columns)
        if len(flops) == len(loops):  # they differ if the assembler has split or unrolled a loop
            predicted = tuple(
                predict(x, n, launch.num_warps, programs, chip)
                for x, n in zip(loops, flops, strict=True)
            )
    return Usage(
        registers=registers,
        spills=spills,
        stack=stack,
        shared=shared,
        programs=programs,
        matrix=machine_code.matrix_instructions(code),
        async_copies=machine_code.async_copies(code, amd=hip),
        warps=launch.num_warps,
        stages=launch.num_stages,
        tile={x: int(launch.constants[x]) for x in _TILE if x in launch.constants},
        loops=loops,
        flops=flops,
        predicted=predicted,
    )


def _source(launch: Launch, backend: BaseBackend) -> ASTSource:
    """Return the compiler's input: types, constants, and the arguments that are multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constants)
    attributes = {}
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        signature[name], key = native_specialize_impl(
            backend,
            launch.arguments.get(name),
            parameter.is_const,
            not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )
        if signature[name] == "constexpr":  # None, or an integer that is 1
            constants[name] = key
        elif key:
            attributes[(position,)] = backend.parse_attr(key)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _hip_usage(text: str) -> tuple[int, int, int]:
    """Return registers, bytes of spilled registers and bytes of stack, from amdgcn assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, f"{key}: not found in the assembly"
        return int(found.group(1))

    return (
        number("vgpr_count"),
        4 * number("vgpr_spill_count"),
        number("private_segment_fixed_size"),
    )


def _cuda_usage(text: str) -> tuple[int, int]:
    """Return registers and bytes of stack, from the output of cuobjdump."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, "REG, STACK: not found in the output of cuobjdump"
    return int(found.group(1)), int(found.group(2))


def _disassemble(cubin: bytes) -> str:
    """Return SASS and resource usage, from the disassembler that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump cannot read the kernel: {done.stderr}")
    return done.stdout + done.stderr
