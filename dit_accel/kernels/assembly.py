"""Reader of assembly (NVIDIA's SASS, and amdgcn): list of instructions, and innermost loops."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_SASS_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?(\S.*?)\s*;\s*/\*")
_AMDGCN_LINE = re.compile(r"(?:(\.?\w+):)?\s*([a-z]\w+)?([^;]*)")


class Instruction(NamedTuple):
    """Line of assembly."""

    address: int
    """SASS: address in bytes. amdgcn: index of the instruction."""
    text: str
    """Mnemonic and operands, without a predicate."""
    target: int | None = None
    """Target address of a branch; None: no branch."""
    ends: bool = False
    """True if the next instruction never follows this one: an unconditional branch, or the end."""

    @property
    def name(self) -> str:
        return self.text.split()[0]


def read_sass(text: str) -> list[Instruction]:
    """Read the instructions of `cuobjdump -sass`."""
    found = []
    for line in text.splitlines():
        if match := _SASS_LINE.match(line):
            address, predicate = int(match[1], 16), match[2]
            # Some versions print scheduling hints for new chips: "BRA 0x30   &req={1}   ?trans5".
            code = re.sub(r"\s+[&?].*", "", match[3])
            jump = re.match(r"BRA\S*\s+(.*?)0x([0-9a-f]+)$", code)
            always = bool(re.match("EXIT|RET", code)) or (jump is not None and not jump[1])
            target = int(jump[2], 16) if jump else None
            found.append(Instruction(address, code, target, always and not predicate))
    return found


def read_amdgcn(text: str) -> list[Instruction]:
    """Read the instructions of amdgcn assembly as LLVM prints it, up to the end of the kernel."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        match = _AMDGCN_LINE.match(line)
        label, name, operands = match.groups() if match else (None, None, "")
        if label:
            labels[label] = len(lines)
        if name:
            lines.append(f"{name} {operands.strip()}".strip())
        if label and label.startswith(".Lfunc_end"):
            break
    found = []
    for i, code in enumerate(lines):
        jump = re.match(r"s_c?branch\S*\s+(\S+)", code)
        ends = code.startswith(("s_branch", "s_endpgm"))
        found.append(Instruction(i, code, labels.get(jump[1]) if jump else None, ends))
    return found


def innermost_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the instructions of each loop that holds no other loop, in the order of their addresses.

    A loop is a backward branch that is reachable from its target.
    """
    index = {x.address: i for i, x in enumerate(code)}
    last: dict[int, int] = {}  # several branches back to one address are one loop
    for i, x in enumerate(code):
        if x.target is not None and x.target <= x.address and x.target in index:
            first = index[x.target]
            if _reachable(code[first : i + 1]):
                last[first] = i
    spans = sorted(last.items())
    for first, end in spans:
        if not any((a, b) != (first, end) and first <= a and b <= end for a, b in spans):
            yield code[first : end + 1]


def _reachable(body: list[Instruction]) -> bool:
    """Return whether the last instruction can be reached from the first without leaving `body`."""
    index = {x.address: i for i, x in enumerate(body)}
    seen: set[int] = set()
    todo = [0]
    while todo:
        i = todo.pop()
        # Straight-line code is walked here, so that only branch targets go on the list.
        while i < len(body) and i not in seen:
            seen.add(i)
            target = body[i].target
            if target is not None and target in index:
                todo.append(index[target])
            if body[i].ends:
                break
            i += 1
    return len(body) - 1 in seen
