"""`History`: last value and last change of each token, in static buffers that are written in place."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels import LinearState
from dit_accel.ras.predictor import extrapolate

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Full:
    """Buffer of values in their own dtype."""

    def __init__(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> None:
        # Zeros and not empty memory, so that differences to values that were never written are finite.
        self.data = like.new_zeros(tokens, *shape)

    def write(self, x: Float[Tensor, "t ..."]) -> None:
        self.data.copy_(x)

    def put(self, index: Int[Tensor, " n"], x: Float[Tensor, "n ..."]) -> None:
        self.data.index_copy_(0, index, x.to(self.data.dtype))

    def read(self) -> Float[Tensor, "t ..."]:
        return self.data

    def take(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        return self.data.index_select(0, index)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class Fp8:
    """Buffer of 8-bit floats (e4m3), with one fp32 scale per token and head."""

    def __init__(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> None:
        # Stored as bytes, because index_copy_ does not support 8-bit floats.
        self.data = like.new_zeros(tokens, *shape, dtype=torch.uint8)
        self.scale = like.new_zeros(tokens, *shape[:-1], 1, dtype=torch.float32)
        self.dtype = like.dtype

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
        return (x / scale).to(FP8).view(torch.uint8), scale

    def _decode(self, data: Tensor, scale: Tensor) -> Tensor:
        return (data.view(FP8).float() * scale).to(self.dtype)

    def write(self, x: Float[Tensor, "t ..."]) -> None:
        data, scale = self._encode(x)
        self.data.copy_(data)
        self.scale.copy_(scale)

    def put(self, index: Int[Tensor, " n"], x: Float[Tensor, "n ..."]) -> None:
        data, scale = self._encode(x)
        self.data.index_copy_(0, index, data)
        self.scale.index_copy_(0, index, scale)

    def read(self) -> Float[Tensor, "t ..."]:
        return self._decode(self.data, self.scale)

    def take(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        return self._decode(self.data.index_select(0, index), self.scale.index_select(0, index))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


BUFFERS: dict[str, type[Full] | type[Fp8]] = {"full": Full, "fp8": Fp8}


class History:
    """Last value of each token and, if `linear`, its change between the last two updates.

    Args:
        rows, length: number of rows and of tokens in a row. Tokens are stored flat.
        shape: shape of a token.
        like: tensor of the same dtype and device.
        linear: whether to store the change, which doubles the memory.
        policy: "full" or "fp8".
    """

    def __init__(
        self,
        rows: int,
        length: int,
        shape: tuple[int, ...],
        like: Tensor,
        *,
        linear: bool,
        policy: str = "full",
    ) -> None:
        buffer = BUFFERS[policy]
        self.last = buffer(rows * length, shape, like)
        self.delta = buffer(rows * length, shape, like) if linear else None
        self.exact = policy == "full"

    def replace(self, x: Float[Tensor, "r l ..."], same: Float[Tensor, " t"] | None = None) -> None:
        """Update every token.

        Args:
            x: new values.
            same: 1 for tokens whose last update had the same noise level, else 0; None if there are none. The change of
                these tokens keeps spanning the interval before.
        """
        x = x.flatten(0, 1)
        if self.delta is not None:
            change = x - self.last.read()
            if same is not None:
                change = change + _wide(same, x) * self.delta.read()
            self.delta.write(change)
        self.last.write(x)

    def update(
        self,
        x: Float[Tensor, "r n ..."],
        index: Int[Tensor, " rn"],
        factor: Float[Tensor, " t"],
        same: Float[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "r l ..."]:
        """Update some tokens. Return all tokens, with predicted values for the others.

        The result may be the buffer itself, so it is valid until the next update.

        Args:
            x: new values.
            index: the updated tokens, in the concatenated rows.
            factor: extrapolation factor of each token.
            same: as in `replace`.
        """
        # Sizes are read from x, so that a compiled block serves every length.
        size = (x.shape[0], -1, *x.shape[2:])
        x = x.flatten(0, 1)
        if self.delta is None:
            if self.exact:
                self.last.put(index, x)
                return self.last.read().view(size)
            full = self.last.read()
        else:
            full = extrapolate(self.last.read()[None], self.delta.read()[None], factor[None])[0]
            change = x - self.last.take(index)
            if same is not None:
                change = change + _wide(same[index], x) * self.delta.take(index)
            self.delta.put(index, change)
        self.last.put(index, x)
        return full.index_copy_(0, index, x.to(full.dtype)).view(size)

    @property
    def nbytes(self) -> int:
        return self.last.nbytes + (0 if self.delta is None else self.delta.nbytes)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


class KVStore:
    """Seam `kv_store` of an attention module: from keys and values of the tokens that run to those of all tokens.

    The caches are set before each transformer call, outside of compiled blocks.

    Attributes:
        feature_map: feature map of linear attention; None if no method needs sums over image keys. While keys are
            cached, the store updates the sums by new minus old values of the tokens that run.
        totals: these sums for the call in progress; None if they are not kept.
    """

    def __init__(self) -> None:
        self.feature_map: str | None = None
        self.close()

    def close(self) -> None:
        """Disconnect the caches, so that keys and values pass through unchanged."""
        self.k: History | None = None
        self.v: History | None = None
        self.index: Tensor | None = None
        self.factor: Tensor | None = None
        self.same: Tensor | None = None
        self.totals: LinearState | None = None
        self.text = 0

    def open(
        self,
        kv: tuple[History, History],
        index: Int[Tensor, " rn"] | None,
        factor: Float[Tensor, " t"],
        same: Float[Tensor, " t"] | None,
        totals: LinearState | None = None,
        text: int = 0,
    ) -> None:
        """Connect the caches of a context.

        Args:
            kv: histories of keys and of values.
            index: tokens that run, in the concatenated rows; None: all tokens.
            factor, same: see `History.update`.
            totals: sums over the image keys in `kv`, to be updated.
            text: number of tokens before the image in each row, which are not in the sums.
        """
        self.k, self.v = kv
        self.index, self.factor, self.same = index, factor, same
        self.totals, self.text = totals, text

    def __call__(
        self, k: Float[Tensor, "r n h d"], v: Float[Tensor, "r n h d_v"]
    ) -> tuple[Float[Tensor, "r l h d"], Float[Tensor, "r l h d_v"]]:
        if self.k is None or self.v is None or self.factor is None:
            return k, v
        if self.index is None:
            self.k.replace(k, self.same)
            self.v.replace(v, self.same)
            if self.totals is not None:
                self.totals.set_(self._image(k), self._image(v))
            return k, v
        if self.totals is not None:
            # The last tile may repeat a token, which must change the sums only once.
            again = (self.index == self.index.roll(1)).view(len(k), -1, 1, 1)
            old: list[Tensor] = []
            for new, history in ((k, self.k), (v, self.v)):
                last = history.last.take(self.index).view_as(new).to(new.dtype)
                old.append(torch.where(again, new, last))
            self.totals.update_(*(self._image(x) for x in (*old, k, v)))
        return (
            self.k.update(k, self.index, self.factor, self.same).to(k.dtype),
            self.v.update(v, self.index, self.factor, self.same).to(v.dtype),
        )

    def _image(self, x: Float[Tensor, "r n h d"]) -> Float[Tensor, "r h m d"]:
        return x[:, self.text :].transpose(1, 2)
