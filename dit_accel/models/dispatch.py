"""`DispatchProcessor`: base class of processors for models with selectable attention backends in diffusers."""

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel.models.attention import SparseProcessor


class DispatchProcessor(SparseProcessor):
    """Processor with the attributes that diffusers sets for attention backends and context parallelism."""

    def __init__(self, stock: Any = None) -> None:
        super().__init__(stock)
        # Attributes that set_attention_backend and enable_parallelism of diffusers set on processors.
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config

    def release(self) -> Any:
        # They may have been called while this processor was installed.
        self.stock._attention_backend = self._attention_backend
        self.stock._parallel_config = self._parallel_config
        return super().release()

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Run diffusers' attention on `[B, L, H, D]`."""
        backend = self._attention_backend
        return dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=backend)
