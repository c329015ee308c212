"""`TokenSelection`: the tokens on which a call runs, and their order."""

from typing import Any

from torch import Tensor

from dit_accel.models.call import Call
from dit_accel.models.tokens import take


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
