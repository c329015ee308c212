"""Comparison of split products with padding, for head_dim 72 and 96, as compiled (kernels/split_head_dim.py)."""

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from dit_accel.files import atomic_path
from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch


@dataclass
class SplitHeadDim:
    """Resources of a forward kernel with head_dim padded, or split in two products."""

    append_to: Path | None = None
    """Markdown file to which the section is appended. Default: print it."""

    def run(self) -> None:
        """Compile all variants, and print or append the table."""
        text = section()
        if self.append_to is None:
            print(text)
            return
        with atomic_path(self.append_to) as path:
            path.write_text(self.append_to.read_text().rstrip() + "\n\n" + text)


@triton.jit
def load_part(X, o_row, stride, first, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load WIDTH channels of some rows from channel `first` on; 0 beyond head_dim."""
    o_d = first + tl.arange(0, WIDTH)
    return tl.load(
        X + o_row[:, None] * stride + o_d[None, :], mask=o_d[None, :] < HEAD_DIM, other=0.0
    )


@triton.jit
def split_forward(
    Q, K, V, O, INDEX, count, stride, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """Compute block-sparse attention of one head. D1 = 0: no second part."""
    stride = stride // 8 * 8  # a multiple of 8 for the compiler, which asynchronous copies need
    o_q = tl.program_id(0) * TQ + tl.arange(0, TQ)
    b_q0 = load_part(Q, o_q, stride, 0, D0, HEAD_DIM)
    b_o0 = tl.zeros([TQ, D0], tl.float32)
    if D1 > 0:
        b_q1 = load_part(Q, o_q, stride, D0, D1, HEAD_DIM)
        b_o1 = tl.zeros([TQ, D1], tl.float32)
    b_m = tl.full([TQ], float("-inf"), tl.float32)
    b_l = tl.zeros([TQ], tl.float32)
    for t in tl.range(0, count):
        o_k = tl.load(INDEX + t) * TK + tl.arange(0, TK)
        b_s = tl.dot(b_q0, tl.trans(load_part(K, o_k, stride, 0, D0, HEAD_DIM)))
        if D1 > 0:
            b_s = tl.dot(b_q1, tl.trans(load_part(K, o_k, stride, D0, D1, HEAD_DIM)), b_s)
        b_s = b_s * scale
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_top[:, None])
        b_keep = tl.exp2(b_m - b_top)
        b_l = b_l * b_keep + tl.sum(b_p, 1)
        b_p = b_p.to(b_q0.dtype)
        b_v0 = load_part(V, o_k, stride, 0, D0, HEAD_DIM)
        b_o0 = tl.dot(b_p, b_v0, b_o0 * b_keep[:, None])
        if D1 > 0:
            b_v1 = load_part(V, o_k, stride, D0, D1, HEAD_DIM)
            b_o1 = tl.dot(b_p, b_v1, b_o1 * b_keep[:, None])
        b_m = b_top
    o_d = tl.arange(0, D0)
    p_o = O + o_q[:, None] * stride
    tl.store(p_o + o_d[None, :], (b_o0 / b_l[:, None]).to(b_q0.dtype), mask=o_d[None, :] < HEAD_DIM)
    if D1 > 0:
        o_e = D0 + tl.arange(0, D1)
        tl.store(
            p_o + o_e[None, :], (b_o1 / b_l[:, None]).to(b_q0.dtype), mask=o_e[None, :] < HEAD_DIM
        )


def launch(head_dim: int, d0: int, d1: int, tq: int, warps: int) -> Launch:
    """Return a launch with head_dim in parts of `d0` and `d1` channels, for a tile of `tq` rows."""
    x = torch.empty(16384, head_dim, dtype=torch.bfloat16, device="meta")
    index = torch.empty(16, dtype=torch.int32, device="meta")
    arguments = {"Q": x, "K": x, "V": x, "O": x, "INDEX": index}
    return Launch(
        split_forward,
        (1,),
        {**arguments, "count": 13, "stride": head_dim, "scale": 0.1},
        {"HEAD_DIM": head_dim, "D0": d0, "D1": d1, "TQ": tq, "TK": 64},
        warps,
        3,
    )


def section() -> str:
    """Return the section of docs/kernel-table.md as Markdown."""
    lines = [
        "## Split dots against padding\n",
        "A plain block-sparse forward kernel, bf16, tiles of 64 keys, with head_dim padded to 128 or split in two "
        "products. Multiply-adds: those of a tile's products, divided by those without padding.\n",
        "| chip | head_dim | parts | rows, warps | multiply-adds | regs | spills | shared KiB | matrix | async |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for chip in ("80", "90"):
        for head_dim, rest in ((72, 16), (96, 32)):
            for d0, d1 in ((128, 0), (64, rest)):
                for tq, warps in ((64, 4), (128, 8)):
                    usage = compile_launch(
                        launch(head_dim, d0, d1, tq, warps), Target("cuda", chip)
                    )
                    matrix = " ".join(f"{n} {kind}" for kind, n in usage.matrix.items())
                    lines.append(
                        f"| sm_{chip} | {head_dim} | {d0}{f' + {d1}' if d1 else ''} | {tq}, {warps} | "
                        f"{(d0 + d1) / head_dim:.2f} | {usage.registers} | {usage.spills} | "
                        f"{usage.shared / 1024:.1f} | {matrix} | {usage.async_copies} |"
                    )
    return "\n".join(lines) + "\n"
