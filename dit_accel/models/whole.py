"""`WholeTransformer`: family of any diffusers transformer, for methods that use only its inputs and its output."""

from typing import Any

from torch import Tensor

from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook
from dit_accel.models.selection import TokenSelection


class WholeTransformer(Family):
    """Family without facts about the model. The call has an argument `hidden_states` and returns one tensor."""

    name = "any diffusers transformer"
    separate_guidance = False
    stock_processors = ()

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {}

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        hidden_states, text = (
            _tensor(arguments, name) for name in ("hidden_states", "encoder_hidden_states")
        )
        if hidden_states is None:
            raise ValueError(
                f"hidden_states: {type(arguments.get('hidden_states')).__name__} in a call of "
                f"{type(transformer).__name__}; accepted is a tensor"
            )
        skipped = arguments.get("skip_layers")
        return Call(
            hidden_states,
            text,
            hidden_states.shape[1],
            (1, 1, 1),
            arguments.get("timestep"),
            images=_tensor(arguments, "encoder_hidden_states_image"),
            variant=None if skipped is None else tuple(skipped),
        )

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        return []

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        return active / tokens


def _tensor(arguments: dict[str, Any], name: str) -> Tensor | None:
    x = arguments.get(name)
    return x if isinstance(x, Tensor) else None
