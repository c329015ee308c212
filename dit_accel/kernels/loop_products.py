"""Matrix products of each main loop, read from TTGIR, Triton's intermediate form of a kernel before LLVM."""

import re
from collections.abc import Iterator

# Matrix operations in the TTGIR of Triton 3.6 to 3.9. A tcgen05 instruction in machine code does not contain its size.
_PRODUCT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b")
_SHAPE = re.compile(r"(?:tensor|memdesc)<(\d+)x(\d+)x")
_LOOP = re.compile(r"\bscf\.(for|while)\b")


def loop_flops(ttgir: str) -> tuple[int, ...]:
    """Return the matrix FLOP of one step of each innermost loop that multiplies matrices, in order."""
    return tuple(flops for flops in (sum(map(_flops, body)) for body in _innermost(ttgir)) if flops)


def _innermost(ttgir: str) -> Iterator[list[str]]:
    """Yield the lines of each loop that holds no other loop."""
    depth = 0
    stack: list[
        tuple[int, list[str] | None]
    ] = []  # open loops: brace depth outside, lines if innermost
    for line in ttgir.splitlines():
        if line.startswith("#"):  # layouts and locations
            continue
        if _LOOP.search(line):
            stack = [(outside, None) for outside, _ in stack]
            stack.append((depth, []))
        elif stack and (lines := stack[-1][1]) is not None:
            lines.append(line)
        depth += line.count("{") - line.count("}")
        while stack and depth <= stack[-1][0]:
            _, body = stack.pop()
            if body is not None:
                yield body


def _flops(line: str) -> int:
    product = _PRODUCT.search(line)
    # fp32 products in a blocked layout are plain multiply-adds that do not use matrix units.
    if product is None or "#blocked" in line[product.end() :]:
        return 0
    # ... : <M x K> * <K x N> -> ..., or, in tensor memory: <M x K>, <K x N>, <M x N>.
    shapes = _SHAPE.findall(line[product.end() :])[:2]
    (m, k), (_, n) = ((int(a), int(b)) for a, b in shapes)
    return 2 * m * n * k
