"""The flex backend: torch's FlexAttention computes the forward pass of the exact branch.

FlexAttention is compiled. It returns no lse on a CPU, and does not support fp64. The torch backend computes the forward
pass of calls that need lse or fp64, and the linear branch. FlexAttention has no gradient on a CPU, and none through the
lse of its FLASH kernel. The default backend of the device therefore computes gradients from o and lse.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dit_accel.kernels import flex
from dit_accel.kernels.block_sparse import torch_backend
from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.linear import torch_branch
from dit_accel.kernels.linear.mix import Mix
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.merge import merge_lse
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import wide
from dit_accel.kernels.router import pool_blocks

FLASH_TILES = {9: (128, 128), 10: (256, 128)}
"""Query and key block sizes of flash-attn-4's block-sparse kernels, by major compute capability."""


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    shared_softmax: bool,
    linear: Linear | None,
    want_lse: bool,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `o, lse, o_l, norm` as `torch_backend.forward` does."""
    if not serves(q, lse=want_lse or shared_softmax):
        return torch_backend.forward(
            q, k, v, plan, scale=scale, shared_softmax=shared_softmax, linear=linear,
            want_lse=want_lse, mix=mix,
        )  # fmt: skip
    q, k, v = (x.detach() for x in (q, k, v))  # FlexAttention refuses requires_grad on a CPU
    k, v = (_without_padding(x, plan) for x in (k, v))
    o, lse = _attend(q, k, v, plan.to_flex(), scale, flash=flash_fits(q, v, plan))
    if shared_softmax:
        o, lse = merge_lse((o, lse), _attend_to_means(q, k, v, plan, scale))
    # The operator's fake promises contiguous outputs, but FlexAttention returns the strides of q.
    o, lse = o.contiguous(), lse.contiguous() if want_lse else lse.new_empty(0)
    o_l, norm = q.new_empty(0), lse.new_empty(0)
    if linear is not None and mix is not None:
        torch_branch.mix_(o, q, k, v, plan, linear, mix)
    elif linear is not None:
        o_l, norm = torch_branch.forward(q, k, v, plan, linear)
    return o, lse, o_l, norm


def serves(q: Tensor, *, lse: bool) -> bool:
    """Return whether FlexAttention can compute the forward pass of `q`, and the lse if `lse`."""
    return q.dtype != torch.float64 and (q.is_cuda or not lse)


def backward(grad_o: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, from the default backend of the device."""
    own = importlib.import_module(
        f"dit_accel.kernels.block_sparse.{'triton' if runs_here(grad_o) else 'torch'}_backend"
    )
    return own.backward(grad_o, *args, **options)


def flash_fits(q: Tensor, v: Tensor, plan: SparsePlan) -> bool:
    """Return whether flash-attn-4 is installed and supports this call. The plan's blocks must fit the kernel's tiles."""
    if not q.is_cuda or torch.version.hip or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    tile = FLASH_TILES.get(torch.cuda.get_device_capability(q.device)[0])
    if tile is None or plan.block_q % tile[0] or plan.block_k != tile[1]:
        return False
    return q.shape[-1] == v.shape[-1] in (64, 128) and _flash_installed()


@functools.cache
def _flash_installed() -> bool:
    # Before torch 2.13 its lse is in another base (pytorch issue 181645).
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13):
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # find_spec imports the parent package, which may be missing or broken
        return False


def _without_padding(x: Tensor, plan: SparsePlan) -> Tensor:
    """Return keys or values with zeros in padding, which may hold NaN that a weight of 0 would not cancel."""
    if plan.kv_lengths is None and plan.k_block_sizes is None:
        return x
    token = torch.arange(plan.kv_len, device=x.device)
    padding = token % plan.block_k >= plan.k_sizes()[:, token // plan.block_k]
    return x.masked_fill(padding[:, None, :, None], 0.0)


def _attend_to_means(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `o, lse` of attention to one mean per unread block j, with `log n_j` added to its score."""
    sizes = plan.k_sizes()  # [B|1, T_k]
    means_k, means_v = (pool_blocks(x, plan.block_k, sizes, dtype=q.dtype) for x in (k, v))
    bias = sizes.to(wide(q)).log()
    rows = flex.row_blocks(plan)
    unread = ~plan.to_block_mask() & (sizes > 0)[:, None, None]
    unread = torch.nn.functional.pad(unread, (0, 0, 0, 1))  # padding reads nothing
    b_unread, h_unread, b_bias = len(unread) > 1, unread.shape[1] > 1, len(bias) > 1

    def mask_mod(b, h, q, j):
        return unread[b if b_unread else 0, h if h_unread else 0, rows[q], j]

    def score_mod(score, b, h, q, j):
        return score + bias[b if b_bias else 0, j]

    mask = flex.every_block(plan.q_len, plan.num_k_blocks, q.device, mask_mod)
    return _attend(q, means_k, means_v, mask, scale, score_mod=score_mod)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    *,
    score_mod: Any = None,
    flash: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return `o, lse` of FlexAttention; lse is empty on a CPU."""
    arguments: dict[str, Any] = {
        "score_mod": score_mod,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if not q.is_cuda:
        # On a CPU, dynamic lengths produce C++ code that does not compile (torch 2.13), so each shape is compiled.
        return _run(_compiled(False), q, k, v, **arguments), q.new_empty(0, dtype=torch.float32)
    # With dynamic=None, torch makes lengths dynamic when they change.
    function = functools.partial(
        _run, _compiled(None), q, k, v, **arguments, return_aux=AuxRequest(lse=True)
    )
    triton = triton_options(q, v, mask.BLOCK_SIZE)
    o, aux = _flash_or(function, triton) if flash else function(kernel_options=triton)
    return o, aux.lse


def triton_options(q: Tensor, v: Tensor, blocks: tuple[int, int]) -> dict[str, int | bool]:
    """Return kernel options for FlexAttention's Triton kernel: tiles that divide the blocks."""
    # FlexAttention's kernel for short queries supports one query block only.
    options: dict[str, int | bool] = {"FORCE_USE_FLEX_ATTENTION": True}
    most = 32 if q.dtype == torch.float32 or max(q.shape[-1], v.shape[-1]) > 128 else 64
    for name, block in zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True):
        if block % 128:  # the default tiles divide 128
            options[name] = math.gcd(block, most)
    return options


@functools.cache
def _compiled(dynamic: bool | None) -> Any:
    # Without fullgraph, torch runs FlexAttention uncompiled after the recompile limit.
    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


def _run(function: Any, *args: Any, **options: Any) -> Any:
    from torch._dynamo import exc  # imported here, because it loads the compiler

    try:
        return function(*args, **options)
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise RuntimeError(
            "backend='flex': torch.compile could not build FlexAttention for this call, which needs a "
            f"C++ compiler on a CPU and Triton on a GPU ({reason}); 'torch' runs everywhere"
        ) from error


_flash_failed = False


def _flash_or(function: Any, triton: dict[str, int | bool]) -> Any:
    """Run flash-attn-4. After its first failure, warn and run FlexAttention's Triton kernel from then on."""
    global _flash_failed
    if not _flash_failed:
        try:
            return function(kernel_options={"BACKEND": "FLASH"})
        except Exception as error:  # an experimental kernel raises many kinds of errors
            _flash_failed = True
            warnings.warn(
                f"flash-attn-4 failed ({error}); FlexAttention's Triton kernel is used from now on",
                stacklevel=2,
            )
    return function(kernel_options=triton)
