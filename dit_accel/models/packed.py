"""Common parts of FLUX.1 and Qwen-Image: packed latents, joint attention over [text, references, image]."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.models.call import Call
from dit_accel.models.dispatch import DispatchProcessor
from dit_accel.models.family import Family
from dit_accel.models.hooks import Hook, after
from dit_accel.models.selection import TokenSelection


class PackedTransformer(Family):
    """Base class of families whose pipelines pack 2 x 2 latent positions into a token.

    The guidance halves are separate calls. References are the tokens of input images (FLUX.1 Kontext, Qwen-Image-Edit).
    They run in every call, like text tokens. Pipelines append them to the image and drop their output, so the output
    of an accelerated transformer has image tokens only.
    """

    separate_guidance = True

    def packed_call(
        self,
        transformer: Any,
        arguments: dict[str, Any],
        grid: tuple[int, int, int],
        mask: Tensor | None = None,
    ) -> Call:
        """Return the description of a call on `hidden_states` with tokens [image, references].

        Args:
            transformer: the transformer.
            arguments: arguments of the call by name.
            grid: number of image tokens along (t, h, w).
            mask: mask of the text tokens. Default: none.

        Raises:
            ValueError: references and residuals of a ControlNet are used together.
        """
        hidden_states = arguments["hidden_states"]
        tokens = math.prod(grid)
        references = hidden_states.shape[1] - tokens
        for name in self.residuals:
            if references and arguments.get(name) is not None:
                raise ValueError(
                    f"{name}: given with {references} tokens of reference images; acceleration accepts one of the two"
                )
        image = hidden_states[:, :tokens].transpose(1, 2)
        return Call(
            image.unflatten(2, grid),
            arguments["encoder_hidden_states"],
            self.output_channels(transformer),
            grid,
            arguments.get("timestep"),
            mask=mask,
            references=references,
        )

    residuals: tuple[str, ...]
    """Names of the arguments with residuals of a ControlNet. Each is a list of image tokens, one tensor per block."""

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        t, h, w = hidden_states.shape[2:]
        return t, h, w

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        scale = 2 * pipe.vae_scale_factor
        return 1, pipe.transformer.config.in_channels, 1, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        return transformer.config.patch_size**2 * transformer.out_channels

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        given = {name: x for name in self.residuals if (x := arguments.get(name)) is not None}
        if not given:
            return arguments
        return {
            **arguments,
            **{name: [selection.take(x) for x in residuals] for name, residuals in given.items()},
        }

    def packed_hooks(
        self, transformer: Any, selection: TokenSelection, image: nn.Module, text: nn.Module
    ) -> list[Hook]:
        """Register hooks on the layers that embed image and text, and on the last layer. Return the hooks."""
        return [
            after(image, image_part, selection),
            after(text, text_part, selection),
            after(transformer.proj_out, _complete, selection),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config, dim = transformer.config, transformer.inner_dim
        double = len(transformer.transformer_blocks)
        single = len(getattr(transformer, "single_transformer_blocks", ()))
        # A block has the projections of attention and a feed-forward layer of four times the width.
        row = 12 * dim * dim + 2 * (tokens + text) * dim
        modulation = (12 * double + 3 * single + 2) * dim * dim
        ends = tokens * config.in_channels + text * config.joint_attention_dim
        ends += active * self.output_channels(transformer)
        return 2.0 * ((double + single) * (active + text) * row + modulation + dim * ends)


def own_text(selection: TokenSelection) -> tuple[slice, slice]:
    """Return the text tokens and the reference tokens that run in this process, as slices.

    The sequence [text, references] is shared among the processes as a whole.
    """
    text = selection.call.text_length - selection.call.references
    places = selection.part(torch.arange(selection.call.text_length, device="cpu")[None])[
        0
    ].tolist()
    start, stop = (places[0], places[-1] + 1) if places else (0, 0)  # fewer tokens than processes
    return slice(min(start, text), min(stop, text)), slice(
        max(start - text, 0), max(stop - text, 0)
    )


def text_part(selection: TokenSelection, x: Tensor) -> Tensor:
    """Return the text tokens that run in this process; `x` has all of them, `[R or 1, T, ...]`."""
    return x[:, own_text(selection)[0]]


def image_part(selection: TokenSelection, x: Tensor) -> Tensor:
    """Return the tokens [references, image] that run in this process; `x` is [image, references], `[R or 1, L, ...]`."""
    tokens = math.prod(selection.call.grid)
    image = selection.take(x[:, :tokens])
    if not selection.call.references:
        return image
    references = x[:, tokens:][:, own_text(selection)[1]]
    return torch.cat([references.expand(len(image), *references.shape[1:]), image], dim=1)


def set_text_tokens(selection: TokenSelection, layers: list[Any], like: Tensor) -> None:
    """Store in the processors of these layers the number of tokens before the image."""
    text, references = (x.stop - x.start for x in own_text(selection))
    selection.per_context["references"] = references
    text_tokens = like.new_empty(text + references, 0)
    for layer in layers:
        layer.processor.text_tokens = text_tokens


def _complete(selection: TokenSelection, output: Tensor) -> Tensor:
    return selection.complete(output[:, selection.per_context["references"] :])


class PackedProcessor(DispatchProcessor):
    """Base class of processors for joint attention over [text, references, image].

    Only image tokens pass the seam `kv_store`.
    """

    text_tokens: Tensor | None = None
    """Tensor `[W, 0]`; W is the number of tokens before the image. Stored as a tensor shape, because torch.compile
    specialises on Python ints. None: not set, because no method or parallelism needs it."""

    def release(self) -> Any:
        self.text_tokens = None
        return super().release()

    @property
    def num_text_tokens(self) -> int:
        """Number of tokens before the image; 0 if it is not set."""
        return 0 if self.text_tokens is None else self.text_tokens.shape[0]
