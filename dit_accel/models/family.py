"""`Family`: what acceleration asks of a model, and `TokenSelection`: what a model asks of acceleration."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dit_accel.models.tokens import take


@dataclass(frozen=True)
class Call:
    """One call of a transformer, as far as acceleration needs to know it."""

    hidden_states: Tensor
    """Latents `[R, C, (t,) h, w]`. A model that is called with tokens gives a view of them as `[R, C, *grid]`; one that is
    called with frames before channels gives a transposed view (see `Family.channel_axis`)."""
    context: Tensor | None
    """`encoder_hidden_states`; its identity tells contexts apart. None: the model has no text."""
    channels: int
    """How many of the C are noisy latents; others are conditions."""
    grid: tuple[int, int, int]
    """Image tokens (t, h, w); they lie in raster order, w fastest."""
    timestep: Any = None
    """The transformer's argument of that name."""
    images: Tensor | None = None
    """Image embeddings that the call is conditioned on, beside the text."""
    image_tokens: int = 0
    """Tokens of `images` that the layers read with those of the text."""
    token_flops: float = 0.0
    """Matrix products of each active image token beside those that `Family.flops` counts."""
    mask: Tensor | None = None
    """Mask of the text tokens that count."""
    references: int = 0
    """Tokens of reference images. They run in every call, as those of the text do."""
    variant: Hashable = None
    """What else tells contexts apart."""
    epoch: Hashable = None
    """What cached keys were made with: if it changes within a run, they are stale."""
    form: Hashable = None
    """Argument `return_dict`, which decides the form of the output."""
    flops: Callable[[int], float] | None = None
    """Matrix products of this call with so many active image tokens; the runtime fills it in."""
    processes: Any = None
    """Processes that compute this call together (`runtime.parallel.Group`); None: there are no others. The runtime
    fills it in."""
    must_run: bool = False
    """True if the transformer runs whatever a method answers; the runtime fills it in."""

    @property
    def conditions(self) -> tuple[Tensor, ...]:
        """The tensors that the call is conditioned on; their identity tells contexts apart."""
        tensors = (self.context, self.images, self.mask)
        return tuple(x for x in tensors if x is not None)

    @property
    def noisy_latents(self) -> Tensor:
        """`hidden_states` without the channels that are conditions."""
        return self.hidden_states[:, : self.channels]

    @property
    def text_length(self) -> int:
        """Tokens beside those of the image, which run in every call: of the text, of references, and of images that the
        layers read with the text."""
        text = 0 if self.context is None or self.context.ndim < 3 else self.context.shape[1]
        return text + self.references + self.image_tokens


class TokenSelection:
    """The tokens that the current call runs on, and their order, as the hooks of a family see them."""

    call: Call
    index: Tensor | None
    """The tokens that run, `[R, n]` places in raster order; None: all of them, in that order."""
    keeps: bool = True
    """Whether `per_run` and `per_context` outlive the call, so that it pays to compute things once."""

    @property
    def per_run(self) -> dict[str, Any]:
        """For what stays the same over the run and all contexts."""
        raise NotImplementedError

    @property
    def per_context(self) -> dict[str, Any]:
        """For what stays the same over the calls of this context."""
        raise NotImplementedError

    @property
    def passes(self) -> bool:
        """True if tokens run as they come: all of them, in raster order, in one process."""
        return self.index is None

    def take(self, x: Tensor) -> Tensor:
        """The tokens that run in this process, `[R, n, ...]`, of `[R or 1, N, ...]` in raster order."""
        return x if self.index is None else take(x, self.index)

    def part(self, x: Tensor, layout: str = "text") -> Tensor:
        """The share of this process in a sequence `[R, L, ...]` that every process has whole. Context
        parallelism shares it out; else it is the sequence itself.

        Args:
            x: the sequence.
            layout: "text", or a name that the family gives to `place`. Image tokens have `take`.
        """
        return x

    def whole(self, x: Tensor, layout: str = "image", *, ends: bool = False) -> Tensor:
        """The shares of all processes, put together: undoes `part`, and for "image" the sharing of `take`.

        Args:
            x: the share of this process.
            layout: as in `part`, or "image".
            ends: whether all processes do the same with the result up to the loss. Else each uses it for its share,
                and its gradient is the sum of theirs.
        """
        return x

    def complete(self, x: Tensor) -> Tensor:
        """The output of all tokens in raster order, `[R, N, C]`, from that of those that ran in this process,
        `[R, n, C]`."""
        return self.fill(self.whole(x, ends=True))

    def fill(self, x: Tensor) -> Tensor:
        """The output of all tokens in raster order, `[R, N, C]`, from that of those that ran in all processes."""
        raise NotImplementedError

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        """Says where the image tokens of each row lie in the layers of this layout: from `offsets[r]`
        on, in `length` tokens. The others are always active.

        Returns:
            The places of the layout that run, `[R, n']`; None: all of them, in order.
        """
        raise NotImplementedError


class AllTokens(TokenSelection):
    """TokenSelection on all tokens in raster order. Nothing is kept from one call to the next, so that gradients can flow."""

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
    """One self-attention module."""

    module: Any
    kv_heads: int
    head_dim: int
    layout: str = "image"
    """Whose tokens it sees: "image", or a name that the family gives to `TokenSelection.place`."""


class Family:
    """A model family: facts, and its attention processor. One subclass per file."""

    name: str
    stock_processors: tuple[str, ...]
    separate_guidance: bool
    """Whether the halves of classifier-free guidance are two calls; else they are one batch, with the
    same latents in both."""
    exchanging_cross_attention = False
    """Whether diffusers' processor for cross-attention exchanges heads in context parallelism. Then ours stands in for it
    always: every process has all of the text."""
    channel_axis = 1
    """Axis of the channels in the transformer's output. 2: frames come first, `[R, t, C, h, w]`."""
    repeated_blocks: tuple[str, ...] = ()
    """Class names of the repeated blocks, where diffusers names none (`_repeated_blocks` of the transformer)."""

    def blocks_of(self, transformer_class: Any) -> tuple[str, ...]:
        """Class names of the blocks that `torch.compile` compiles one by one."""
        return self.repeated_blocks or tuple(getattr(transformer_class, "_repeated_blocks", ()))

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """The repeated blocks, in the order of the modules."""
        names = self.blocks_of(type(transformer))
        return [x for x in transformer.modules() if type(x).__name__ in names]

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        """Self-attention layers by name, in the order they run."""
        raise NotImplementedError

    def cross_attention(self, transformer: Any) -> dict[str, Any]:
        """Attention modules from image to text, by name."""
        return {}

    def processor(self, stock: Any) -> Any:
        """The processor that stands in for `stock` in self-attention. It has three seams, None at first, which
        `SparseProcessor.run` serves: `attend(q, k, v, text=..., ...) -> o | None`, `[B, H, L, D]`, may answer instead
        of dense attention (arguments are those of `run`); `kv_store(k, v) -> (k, v)`, `[B, L, H, D]`, turns fresh keys into those of all tokens;
        `exchange` trades tokens for heads between the processes of context parallelism.
        """
        raise NotImplementedError

    def cross_processor(self, stock: Any) -> Any:
        """The processor for cross-attention; its `text` holds keys and values computed before."""
        raise NotImplementedError

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        """What a call of the transformer with these arguments is (see `by_name`).

        Raises:
            ValueError: it uses something that acceleration cannot follow.
        """
        raise NotImplementedError

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        """Image tokens (t, h, w); they lie in raster order, w fastest."""
        p = transformer.config.patch_size
        return 1, hidden_states.shape[2] // p, hidden_states.shape[3] // p

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of `Call.hidden_states` for one sample of this size, in pixels."""
        scale = pipe.vae_scale_factor
        return 1, pipe.transformer.config.in_channels, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        """Channels of the output at each latent position."""
        return transformer.out_channels

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the transformer with token-wise ones reduced to the tokens that run; the very
        same where there are none."""
        return arguments

    def hooks(self, transformer: Any, selection: TokenSelection) -> "list[Hook]":
        """Registers the hooks that gather after embedding and complete the output."""
        raise NotImplementedError

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        """Matrix products of one row with `active` of `tokens` image tokens computed, what is computed
        once per context left out."""
        raise NotImplementedError

    def text_flops(self, transformer: Any, text: int) -> float:
        """Matrix products that are computed once per context, and in each call of the plain model."""
        return 0.0


def by_name(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the transformer by name."""
    # Of the class: offloading and caches put functions of their own in the place of a module's forward.
    _, *names = inspect.signature(type(transformer).forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Hook:
    """A forward hook, and the module that it is on."""

    module: nn.Module
    handle: Any

    def remove(self) -> None:
        """Take it off."""
        self.handle.remove()


def after(module: nn.Module, change: Callable[..., Any], *state: Any) -> Hook:
    """Replaces a module's output by `change(*state, output)`."""
    # partial, not a closure: a deep copy of the module then has a deep copy of the state.
    return Hook(module, module.register_forward_hook(partial(_changed, change, state)))


def _changed(
    change: Callable[..., Any], state: tuple, _module: Any, _args: Any, output: Any
) -> Any:
    return change(*state, output)


def before(module: nn.Module, change: Callable[..., Any], *state: Any) -> Hook:
    """Replaces a module's arguments by `change(*state, args, kwargs)`, a pair."""
    hook = partial(_prepared, change, state)
    return Hook(module, module.register_forward_pre_hook(hook, with_kwargs=True))


def _prepared(
    change: Callable[..., Any], state: tuple, _module: Any, args: Any, kwargs: Any
) -> Any:
    return change(*state, args, kwargs)
