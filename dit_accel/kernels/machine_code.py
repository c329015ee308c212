"""Description of the main loops of a kernel, from its machine code.

A main loop is an innermost loop with matrix instructions.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from dit_accel.kernels.assembly import Instruction, innermost_loops

# An instruction belongs to the first class whose pattern matches the start of its mnemonic.
_SASS = {
    "matrix": r"[HIQBDO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA",
    "special": r"MUFU",
    "convert": r"F2|I2F|FRND",
    "shuffle": r"SHFL",
    "wait": r"DEPBAR|LDGDEPBAR|SYNCS|WARPGROUP\.DEPBAR",
    "async_copy": r"LDGSTS|UTMALDG|UBLKCP",
    "local": r"LDL|STL",
    "shared_load": r"LDS",
    "shared_store": r"STS|ATOMS",
    "tensor_memory": r"LDT|STT",
    "global_load": r"LDG|LD\b",
    "global_store": r"STG|ST\b|RED|ATOM|UTMASTG",
    "barrier": r"BAR|MEMBAR|FENCE|ERRBAR|CCTL|WARPSYNC|WARPGROUP",
    "control": r"BRA|BRX|JMP|BSSY|BSYNC|BREAK|EXIT|CALL|RET|NOP|YIELD|NANOSLEEP",
    "fp": r"F(?!LO)|H(ADD|MUL|FMA|SET|MNMX)",
    "uniform": r"U[A-Z]|R2UR|S2UR|LDCU|ELECT|VOTEU|REDUX",
    "imad": r"IMAD",
    "int": r"I|LEA|SHF|LOP|V[A-Z]|PRMT|SEL|BMSK|SGXT|PLOP|P2R|R2P|POPC|FLO|CS2R|S2R|MOV|LDC|BREV",
}
_AMDGCN = {
    "matrix": r"v_mfma|v_smfmac",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "convert": r"v_cvt",
    "shuffle": r"ds_(b?permute|swizzle)|v_permlane|v_\w+_dpp",
    "async_copy": r"(global|buffer)_load\S* .*\blds\b",
    "local": r"scratch_",
    "shared_load": r"ds_read",
    "shared_store": r"ds_",
    "global_load": r"(global|buffer|flat)_load",
    "global_store": r"(global|buffer|flat)_",
    "wait": r"s_waitcnt",
    "barrier": r"s_barrier",
    "control": r"s_(c?branch|endpgm|nop|setpc|swappc|sleep|sched)",
    "uniform": r"s_",
    "fp": r"v_\w*_(f|bf)(16|32|64)",
    "int": r"v_",
}
_BULK = r"UTMALDG|UBLKCP"
ROW_BYTES = 16
"""Bytes per thread and step above which loads are tiles. Smaller loads are indices and sizes."""
MATRIX_NAMES = {
    "wgmma": r"HGMMA",
    "tcgen05": r"UTC[A-Z]*MMA",
    "mma.sync": r"HMMA",
    "mfma": r"v_mfma",
}


@dataclass(frozen=True)
class Loop:
    """Main loop of a kernel, as machine code. Counts are per warp and step."""

    instructions: dict[str, int]
    """Number of instructions by class: matrix, special (exp2 and similar), fp, int, imad, convert, shuffle, ..."""
    names: dict[str, int]
    """Number of instructions by mnemonic without modifiers."""
    products: dict[str, int]
    """Matrix instructions by mnemonic with modifiers. The suffix `shared`: wgmma reads A from shared memory."""
    copied: int | None
    """Bytes that a thread copies from global memory; None: unknown, because of a bulk copy."""
    wait: int | Literal["mbarrier"] | None
    """Smallest number of copy groups that may be in flight when the loop waits for its data.

    0: each step waits for all copies, including those that it has just started, so copies and products do not overlap.
    "mbarrier": bulk copies, which signal barriers. None: no asynchronous copies.
    """

    @property
    def total(self) -> int:
        """Number of instructions of all classes."""
        return sum(self.instructions.values())

    @property
    def matrix(self) -> tuple[str, ...]:
        """Kinds of matrix instructions, by their names in PTX or AMD's documents."""
        return tuple(
            name
            for name, pattern in MATRIX_NAMES.items()
            if any(re.match(pattern, x) for x in self.products)
        )


def instruction_class(text: str, classes: dict[str, str] = _SASS) -> str:
    """Return the class of an instruction, or "other" if no pattern matches."""
    return next((name for name, pattern in classes.items() if re.match(pattern, text)), "other")


def main_loops(code: list[Instruction], *, amd: bool = False) -> tuple[Loop, ...]:
    """Describe the innermost loops that hold matrix instructions, in order."""
    classes = _AMDGCN if amd else _SASS
    loops = []
    for body in innermost_loops(code):
        counts = Counter(instruction_class(x.text, classes) for x in body)
        if not counts["matrix"]:
            continue
        products = (
            _product(x.text) for x in body if instruction_class(x.text, classes) == "matrix"
        )
        loops.append(
            Loop(
                instructions=dict(counts.most_common()),
                names=dict(Counter(x.name.split(".")[0] for x in body).most_common()),
                products=dict(Counter(products)),
                copied=_copied(body),
                wait=_wait(body),
            )
        )
    return tuple(loops)


def matrix_instructions(code: list[Instruction]) -> dict[str, int]:
    """Count the matrix instructions of a whole kernel, by their names in PTX or AMD's documents."""
    found = {
        name: sum(bool(re.match(pattern, x.text)) for x in code)
        for name, pattern in MATRIX_NAMES.items()
    }
    return {name: n for name, n in found.items() if n}


def async_copies(code: list[Instruction], *, amd: bool = False) -> int:
    """Count the asynchronous copies of a whole kernel."""
    classes = _AMDGCN if amd else _SASS
    return sum(instruction_class(x.text, classes) == "async_copy" for x in code)


def local_stores(code: list[Instruction]) -> int:
    """Return the bytes per thread that SASS stores to local memory (spill stores)."""
    return sum(_width(x.text) for x in code if x.text.startswith("STL"))


def _wait(body: list[Instruction]) -> int | Literal["mbarrier"] | None:
    waits = [re.match(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", x.text) for x in body]
    numbers = [int(x[1], 16) for x in waits if x]
    if numbers:
        return min(numbers)
    if any(re.match(_BULK, x.text) for x in body):
        return "mbarrier"
    # Other warps may copy for this loop. On sm_100 products signal barriers too, so a loop with its own loads is excluded.
    if any(x.text.startswith("SYNCS") for x in body) and (_copied(body) or 0) < ROW_BYTES:
        return "mbarrier"
    return None


def _product(text: str) -> str:
    name = text.split()[0]
    # HGMMA R24, gdesc[UR4], R24: A and B are in shared memory. HGMMA R24, R120, gdesc[UR4]: only B is.
    shared = re.match(r"HGMMA\S* \w+, gdesc", text)
    return f"{name} shared" if shared else name


def _copied(body: list[Instruction]) -> int | None:
    if any(re.match(_BULK, x.text) for x in body):
        return None
    return sum(
        _width(x.text) for x in body if re.match(r"LDGSTS|LDG\.|(global|buffer)_load", x.text)
    )


def _width(text: str) -> int:
    """Return the bytes per thread of a load or store."""
    name = text.split()[0]
    if words := re.search(r"dword(?:x(\d))?$", name):
        return 4 * int(words[1] or 1)
    if bits := re.search(r"\.(64|128)\b", name):
        return int(bits[1]) // 8
    small = re.search(r"\.[US](8|16)\b|_[us]?(byte|short)", name)
    if small is None:
        return 4
    return 1 if (small[1] or small[2]) in ("8", "byte") else 2
