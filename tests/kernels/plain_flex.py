"""FlexAttention's formula in plain torch, dense, with lse and every dtype, for tests."""

import contextlib
import math
from unittest import mock

import torch

from dit_accel.kernels.block_sparse import flex_backend
from dit_accel.kernels.precision import wide


def attend(q, k, v, mask, scale, *, score_mod=None, flash=False):
    """Return `o, lse` for the mask and score functions of a FlexAttention call."""
    dtype = wide(q)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    b, h, i, j = (torch.arange(n) for n in (*q.shape[:3], k.shape[2]))
    at = b[:, None, None, None], h[:, None, None], i[:, None], j
    scores = q.to(dtype) @ keys.mT * scale
    if score_mod is not None:
        scores = score_mod(scores, *at)
    scores = scores.masked_fill(~mask.mask_mod(*at), -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (weights @ values).to(q.dtype), lse


@contextlib.contextmanager
def in_use():
    """Context manager in which calls with `backend="flex"` take the code path of a GPU."""
    with (
        mock.patch.object(flex_backend, "serves", return_value=True),
        mock.patch.object(flex_backend, "_attend", attend),
    ):
        yield
