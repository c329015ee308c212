"""Triton backend, with the functions of torch_backend."""

from dit_accel.kernels.block_sparse.triton_backward import backward
from dit_accel.kernels.block_sparse.triton_forward import forward

__all__ = ["backward", "forward"]
