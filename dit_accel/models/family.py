"""`Family`: the facts and the attention processors of a model."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_accel.models.call import Call
from dit_accel.models.hooks import Hook
from dit_accel.models.selection import TokenSelection


@dataclass(frozen=True)
class AttentionLayer:
    """A self-attention module and its sizes."""

    module: Any
    kv_heads: int
    head_dim: int
    layout: str = "image"
    """Layout of its sequences: "image" for image tokens alone, or a name that the family passes to
    `TokenSelection.place`."""


class Family:
    """Facts and attention processors of a model family. Each family is a subclass in a file of its own."""

    name: str
    stock_processors: tuple[str, ...]
    separate_guidance: bool
    """True if the halves of classifier-free guidance are two calls. False if they are one batch, with the same latents in
    both halves."""
    exchanging_cross_attention = False
    """True if the cross-attention processor of diffusers exchanges heads in context parallelism. It is always replaced
    then, because every process has the whole text."""
    channel_axis = 1
    """Axis of the channels in the transformer's output; 2 for `[R, t, C, h, w]`."""
    repeated_blocks: tuple[str, ...] = ()
    """Class names of the repeated blocks. Needed if the transformer class of diffusers has no `_repeated_blocks`."""

    def blocks_of(self, transformer_class: Any) -> tuple[str, ...]:
        """Return the class names of the blocks that `torch.compile` compiles one by one."""
        return self.repeated_blocks or tuple(getattr(transformer_class, "_repeated_blocks", ()))

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the repeated blocks in the order of the modules."""
        names = self.blocks_of(type(transformer))
        return [x for x in transformer.modules() if type(x).__name__ in names]

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        """Return the self-attention layers by name, in the order in which they run."""
        raise NotImplementedError

    def cross_attention(self, transformer: Any) -> dict[str, Any]:
        """Return the cross-attention modules from image to text, by name."""
        return {}

    def processor(self, stock: Any) -> Any:
        """Return a processor that replaces `stock` in self-attention.

        It has three hooks ("seams"), None at first, which `SparseProcessor.run` calls:

        - `attend(q, k, v, text=..., ...) -> o | None`, tensors `[B, H, L, D]`: attention in place of dense attention; None
          to run dense. Keywords as in `run`.
        - `kv_store(k, v) -> (k, v)`, tensors `[B, L, H, D]`: keys and values of all tokens, from those of the tokens that
          run.
        - `exchange`: exchange of tokens and heads between the processes of context parallelism.
        """
        raise NotImplementedError

    def cross_processor(self, stock: Any) -> Any:
        """Return a processor that replaces `stock` in cross-attention. Its `text` holds keys and values computed once."""
        raise NotImplementedError

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        """Return the description of a call.

        Args:
            transformer: the transformer.
            arguments: all arguments of the call by name, see `by_name`.

        Raises:
            ValueError: an argument asks for a feature that acceleration does not support.
        """
        raise NotImplementedError

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        """Return the number of image tokens along (t, h, w)."""
        p = transformer.config.patch_size
        return 1, hidden_states.shape[2] // p, hidden_states.shape[3] // p

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of `Call.hidden_states` for one sample of this size in pixels."""
        scale = pipe.vae_scale_factor
        return 1, pipe.transformer.config.in_channels, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        """Return the number of output channels at each latent position."""
        return transformer.out_channels

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        """Reduce arguments that have a value for each token to the tokens that run.

        Returns:
            The arguments; the same dict if nothing changes.
        """
        return arguments

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        """Register the hooks that take the tokens that run after embedding, and complete the output. Return them."""
        raise NotImplementedError

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        """Return the FLOPs of one row of a call, without values that are computed once per context.

        Args:
            transformer: the transformer.
            active: number of image tokens that run.
            tokens: number of image tokens in all.
            text: number of other tokens, see `Call.text_length`.
        """
        raise NotImplementedError

    def text_flops(self, transformer: Any, text: int) -> float:
        """Return the FLOPs of values that are computed once per context here, and in each call in diffusers."""
        return 0.0


def by_name(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of the transformer by name."""
    # The signature of the class, because offloading and caches replace the forward of the module.
    _, *names = inspect.signature(type(transformer).forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}
