"""`Call`: one call of a transformer."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Call of a transformer: the arguments and sizes that acceleration uses."""

    hidden_states: Tensor
    """Latents `[R, C, (t,) h, w]`. Families whose model takes tokens give a view `[R, C, *grid]` of them. Families whose
    model takes frames before channels give a transposed view (see `Family.channel_axis`)."""
    context: Tensor | None
    """Text embeddings, the argument `encoder_hidden_states`. Calls with the same tensor belong to one context. None: the
    model has no text."""
    channels: int
    """Number of the C channels that are noisy latents, the first ones. The others are conditions."""
    grid: tuple[int, int, int]
    """Number of image tokens along (t, h, w). They are in raster order, w fastest."""
    timestep: Any = None
    """Argument `timestep` of the transformer."""
    images: Tensor | None = None
    """Image embeddings on which the call is conditioned, in addition to the text."""
    image_tokens: int = 0
    """Number of tokens of `images` that the layers read together with the text tokens."""
    token_flops: float = 0.0
    """FLOPs of each active image token that `Family.flops` does not count."""
    mask: Tensor | None = None
    """Mask of the text tokens: true (or 1) for tokens that are not padding."""
    references: int = 0
    """Number of tokens of reference images. They run in every call, like text tokens."""
    variant: Hashable = None
    """Further value that distinguishes contexts, such as skipped layers. Calls of one context have equal values."""
    epoch: Hashable = None
    """Value on which cached keys depend, such as the rotary table. If it changes within a run, cached keys are dropped."""
    form: Hashable = None
    """Argument `return_dict`, which decides the type of the output."""
    flops: Callable[[int], float] | None = None
    """Function from a number of active image tokens to the FLOPs of this call. Set by the runtime."""
    processes: Any = None
    """Processes that compute this call together (`runtime.parallel.group.Group`); None: one process. Set by the
    runtime."""
    must_run: bool = False
    """True if methods cannot answer this call in place of the transformer. Set by the runtime."""

    @property
    def conditions(self) -> tuple[Tensor, ...]:
        """Tensors on which the call is conditioned. Calls with the same tensors belong to one context."""
        tensors = (self.context, self.images, self.mask)
        return tuple(x for x in tensors if x is not None)

    @property
    def noisy_latents(self) -> Tensor:
        """Channels of `hidden_states` that are noisy latents."""
        return self.hidden_states[:, : self.channels]

    @property
    def text_length(self) -> int:
        """Number of tokens that are not image tokens and run in every call: text, references and `image_tokens`."""
        text = 0 if self.context is None or self.context.ndim < 3 else self.context.shape[1]
        return text + self.references + self.image_tokens
