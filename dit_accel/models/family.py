"""`Family`: the facts of a model; `Call`: one call of it; `TokenSelection`: the tokens on which the call runs."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_accel.models.hooks import Hook
from dit_accel.models.tokens import take


@dataclass(frozen=True)
class Call:
    """One call of a transformer: the arguments and sizes that acceleration uses."""

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


class TokenSelection:
    """Tokens on which the current call runs, and their order. The hooks of a family use this interface."""

    call: Call
    index: Tensor | None
    """Tokens that run, `[R, n]` indices into the raster order; None: all tokens in raster order."""
    keeps: bool = True
    """True if `per_run` and `per_context` outlive the call, so that values can be computed once and stored there."""

    @property
    def per_run(self) -> dict[str, Any]:
        """Storage for values that are the same in all calls of the run."""
        raise NotImplementedError

    @property
    def per_context(self) -> dict[str, Any]:
        """Storage for values that are the same in all calls of this context."""
        raise NotImplementedError

    @property
    def passes(self) -> bool:
        """True if nothing changes: all tokens run, in raster order, in one process."""
        return self.index is None

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens that run in this process.

        Args:
            x: values of all tokens in raster order, `[R or 1, N, ...]`.

        Returns:
            `[R, n, ...]`.
        """
        return x if self.index is None else take(x, self.index)

    def part(self, x: Tensor, layout: str = "text") -> Tensor:
        """Return the share of this process in a sequence. Without context parallelism, return the sequence.

        Args:
            x: sequence `[R, L, ...]` that every process holds.
            layout: "text", or a layout that the family passes to `place`. For image tokens use `take`.
        """
        return x

    def whole(self, x: Tensor, layout: str = "image", *, ends: bool = False) -> Tensor:
        """Return the shares of all processes, concatenated. This undoes `part`, and for "image" the sharing of `take`.

        Args:
            x: share of this process.
            layout: as in `part`, or "image".
            ends: True if all processes compute the same from the result, up to the loss. False if each process computes
                its share from it; the gradient is then summed over the processes.
        """
        return x

    def complete(self, x: Tensor) -> Tensor:
        """Return the output of all tokens in raster order, `[R, N, C]`.

        Args:
            x: output of the tokens that ran in this process, `[R, n, C]`.
        """
        return self.fill(self.whole(x, ends=True))

    def fill(self, x: Tensor) -> Tensor:
        """Return the output of all tokens in raster order, `[R, N, C]`.

        Args:
            x: output of the tokens that ran in all processes, `[R, n, C]`.
        """
        raise NotImplementedError

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        """Set the positions of the image tokens in the layers of a layout.

        Args:
            layout: name of the layout, as in `AttentionLayer.layout`.
            length: number of tokens in a sequence of the layout.
            offsets: position of the first image token in each row. All other tokens of the sequence are active.

        Returns:
            Positions in the sequence that run, `[R, n']`; None: all positions, in order.
        """
        raise NotImplementedError


class AllTokens(TokenSelection):
    """All tokens in raster order. Nothing is stored from one call to the next, so gradients can flow."""

    keeps = False

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self._kept: dict[str, Any] = {}

    @property
    def per_run(self) -> dict[str, Any]:
        return self._kept

    @property
    def per_context(self) -> dict[str, Any]:
        return self._kept

    def fill(self, x: Tensor) -> Tensor:
        return x

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        return None


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
