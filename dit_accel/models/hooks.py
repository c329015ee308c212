"""Forward hooks of the families: registration, and hooks that several families share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dit_accel.models.attention import computed_once
from dit_accel.models.selection import TokenSelection


@dataclass(frozen=True)
class Hook:
    """A forward hook and its module."""

    module: nn.Module
    handle: Any

    def remove(self) -> None:
        """Remove the hook from the module."""
        self.handle.remove()


def after(module: nn.Module, change: Callable[..., Any], *state: Any) -> Hook:
    """Replace the output of a module by `change(*state, output)`."""
    # partial and not a closure, so that a deep copy of the module has a deep copy of the state.
    return Hook(module, module.register_forward_hook(partial(_changed, change, state)))


def _changed(
    change: Callable[..., Any], state: tuple, _module: Any, _args: Any, output: Any
) -> Any:
    return change(*state, output)


def before(module: nn.Module, change: Callable[..., Any], *state: Any) -> Hook:
    """Replace the arguments of a module by the pair `change(*state, args, kwargs)`."""
    hook = partial(_prepared, change, state)
    return Hook(module, module.register_forward_pre_hook(hook, with_kwargs=True))


def _prepared(
    change: Callable[..., Any], state: tuple, _module: Any, args: Any, kwargs: Any
) -> Any:
    return change(*state, args, kwargs)


# Hooks of several families ----------------------------------------------------------------------------


def shrink_tables(
    selection: TokenSelection, patch: tuple[int, int, int], args: tuple, kwargs: dict
) -> Any:
    """Shrink the latents to one token, before a module that makes rotary tables, if `run_tables` has stored them.

    Args:
        selection: tokens of the call.
        patch: size of a token in latent positions (t, h, w).
        args, kwargs: arguments of the module; the first one is the latents.
    """
    if "rope" in selection.per_run:
        t, h, w = patch
        args = (args[0][..., :t, :h, :w],)
    return args, kwargs


def run_tables(selection: TokenSelection, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rotary tables of the whole run: `output` in the first call, the stored tables in later calls."""
    return selection.per_run.setdefault("rope", output)


def set_text_keys(
    selection: TokenSelection,
    modules: list[Any],
    compute: Callable[[Any, Tensor], Any],
    texts: Callable[[], list[Tensor]],
) -> None:
    """Give keys and values of the text to the processors of cross-attention, computed once per context.

    Args:
        selection: tokens of the call.
        modules: cross-attention modules.
        compute: function `(module, text) -> keys and values`.
        texts: function that returns the text embeddings for each module; called if nothing is stored.
    """
    if "text" not in selection.per_context:
        selection.per_context["text"] = [
            computed_once(attn, compute, text) for attn, text in zip(modules, texts(), strict=True)
        ]
    for attn, known in zip(modules, selection.per_context["text"], strict=True):
        attn.processor.text = known
