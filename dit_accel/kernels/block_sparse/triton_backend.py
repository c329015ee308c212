"""The Triton backend; same functions as torch_backend."""

from dit_accel.kernels.block_sparse.triton_backward import backward
from dit_accel.kernels.block_sparse.triton_forward import forward

__all__ = ["backward", "forward"]
