"""CogVideoX with positional embeddings added to text and video, like the 2B model."""

from . import cogvideox
from .cogvideox import CHANNEL_AXIS, CONTEXTS, GRID, SIZES, arguments, blocks, embeddings

__all__ = ["CHANNEL_AXIS", "CONTEXTS", "GRID", "SIZES", "arguments", "blocks", "embeddings", "make"]


def make(solver="euler"):
    return cogvideox.make(solver, use_rotary_positional_embeddings=False)
