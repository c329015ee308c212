"""`SparseLinearAttention`: attention layer with exact attention on some key blocks and linear attention on others."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.config import SLAConfig
from dit_accel.kernels import (
    Geometry,
    LinearState,
    SparsePlan,
    block_scores,
    linear_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.router.criteria import topk_blocks
from dit_accel.sla.geometry import joint_geometry, query_block
from dit_accel.sla.router import LearnedRouter, taught
from dit_accel.sla.text import Text, image_first, split_text, valid_keys


class Projection(nn.Module):
    """Weights of a linear layer, zero at first, which a kernel applies.

    `forward` returns the weights, so that offloading hooks load them. Not an `nn.Linear`, so that LoRA, quantisation and
    other tools that wrap linear layers leave it alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention (SLA, arXiv 2509.24006) of one layer, with its learned weights.

    A router ranks the key blocks of each query block. The best blocks are read exactly, and the others are combined as
    `config.combine` says. Text tokens of a joint sequence are exact as keys and as queries: routing, centroids and the
    linear branch use image tokens only. Weights stay in fp32 when the model is cast to another dtype.

    Args:
        config: settings. Schedules and token orders in it are not used here.
        heads: number of query heads.
        head_dim: number of channels of a value head.
        topk: `topk` of this layer. Default: `config.topk`.

    Attributes:
        proj_l: for `combine="proj"`: weight and bias of a linear layer on the output of the linear branch, zero at
            first.
        alpha_logit: for `combine="alpha"`: `[heads]`; its sigmoid is the weight of the exact branch. The first call sets
            it to the mean attention mass that the plan reads, unless weights were loaded.
        router: function that ranks key blocks, with the arguments of `block_scores`.
        learned_router: for `router="learned"`: weights of the ranking.
        calibrated: True if `alpha_logit` was measured or loaded, or is not used.
    """

    def __init__(
        self, config: SLAConfig, heads: int, head_dim: int, *, topk: float | int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.topk = config.topk if topk is None else topk
        self.router: Callable[..., Tensor] = functools.partial(
            block_scores, spread=config.router != "mean"
        )
        if config.router == "learned":
            self.learned_router = LearnedRouter(heads, head_dim)
        self.processes: Any = None
        """Processes that split the heads of the current call, see `Call.processes`; None: one process."""
        self.calibrated = True
        self._measured: Tensor | None = None
        if config.combine == "proj":
            self.proj_l = Projection(head_dim)
        elif config.combine == "alpha":
            self.alpha_logit = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
            self.calibrated = False

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "SparseLinearAttention":
        def keeping_fp32(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if moved.dtype != x.dtype else moved

        return super()._apply(keeping_fp32, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # State dicts of the whole model may lack this weight, for example those of a LoRA.
        self.calibrated |= f"{prefix}alpha_logit" in state_dict

    def forward(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        text: Text = "none",
        text_tokens: int = 0,
        text_lengths: Int[Tensor, " b"] | None = None,
        topk_blocks: int | None = None,
        scale: float | None = None,
        state: LinearState | None = None,
        tally: Int[Tensor, "3"] | None = None,
    ) -> Float[Tensor, "b h l_q d_v"]:
        """Compute attention over image tokens, or over a joint sequence of image and text.

        Args:
            q: `[B, Hq, Lq, D]`, some or all image tokens, and all text tokens.
            k, v: `[B, Hkv, Lk, D]`, all tokens; `Hq` is a multiple of `Hkv`.
            text: position of the text tokens, in q and in k.
            text_tokens: number of text tokens.
            text_lengths: `[B]`, number of text tokens of each row without padding. Padding is at the end of the text. No
                query reads it, and its outputs are undefined. Default: no padding.
            topk_blocks: number of image blocks that each query block reads exactly. Default: according to `topk`.
            scale: factor of the dot products. Default: `D ** -0.5`.
            state: sums over the image keys, kept by the caller; inference only.
            tally: int64 `[3]` on the device of q, to which this call is added: number of calls, of attended (query, key)
                pairs, and of all pairs. Text is included and padding keys are not. The density is the second number
                over the third.
        """
        if text == "none":
            text, text_tokens = "last", 0
        if not text_tokens:
            text_lengths = None
        (words, q_image), (words_k, k_image), (words_v, v_image) = (
            split_text(x, text, text_tokens) for x in (q, k, v)
        )
        tokens, gap = k_image.shape[2], 0
        keys, values = k, v
        if text_tokens:
            # [image, padding to whole blocks, text]: every image query reads the blocks of the text.
            gap = -tokens % self.config.block_k
            if gap or text == "first":
                keys = image_first(k_image, words_k, gap)
                values = image_first(v_image, words_v, gap)
        projection = None
        if self.config.router == "learned":
            projection = self._own_heads(self.learned_router().to(q.device), q, k)
        scores = self._scores(q_image, k_image, projection, scale)
        geometry = joint_geometry(
            q_image, tokens, text_tokens, text_lengths=text_lengths, **self._blocks(q_image)
        )
        plan = self._plan(scores, geometry, text_tokens, topk_blocks, tally)
        mode = self._mode(q_image, keys, plan, scale)
        if text_tokens and mode.get("linear_scope") == "all":
            # The linear branch covers every image key and no text key, which no kernel supports.
            exact = sparse_linear_attention(
                q_image, keys, values, plan, scale=scale, combine="none"
            )
            o = self._mix(exact, q_image, k_image, v_image, state, mode)
        else:
            if state is not None and text_tokens:
                # The kernel subtracts all blocks that are read, the text too, so the text is added to the sums first.
                added = LinearState.from_keys(
                    words_k, words_v, feature_map=state.feature_map, kv_lengths=text_lengths
                )
                state = LinearState(state.kv + added.kv, state.k + added.k, state.feature_map)
            o = sparse_linear_attention(
                q_image, keys, values, plan, scale=scale, state=state, **mode
            )
        if projection is not None and projection.requires_grad and torch.is_grad_enabled():
            o = taught(
                o, self.learned_router, projection, scores, plan, q_image, k_image, v_image,
                scale=scale, mode=mode, text=(words_k, words_v), text_lengths=text_lengths,
            )  # fmt: skip
        if not text_tokens:
            return o
        # Text queries are few and read every key, so dense attention is fastest.
        grouped, mask = q.shape[1] != k.shape[1], None
        if text_lengths is not None:
            mask = valid_keys(k.shape[2], text, text_tokens, text_lengths)[:, None, None]
        o_words = scaled_dot_product_attention(
            words, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        o_words = o_words.to(o.dtype)
        return torch.cat([o_words, o] if text == "first" else [o, o_words], dim=2)

    def _blocks(self, q: Tensor) -> dict[str, int]:
        """Return the numbers of tokens in a block, as keyword arguments."""
        return {"block_q": query_block(self.config, q.device), "block_k": self.config.block_k}

    def _scores(
        self, q: Tensor, k: Tensor, projection: Tensor | None, scale: float | None
    ) -> Tensor:
        """Return the scores of the blocks of image keys `k` for image queries `q`."""
        learned = {} if projection is None else {"projection": projection}
        return self.router(q, k, scale=scale, **self._blocks(q), **learned)

    def _plan(
        self,
        scores: Tensor,
        geometry: Geometry,
        text_tokens: int,
        topk_blocks: int | None,
        tally: Tensor | None,
    ) -> SparsePlan:
        """Return the plan of image queries over [image keys, text keys]."""
        config = self.config
        return SparsePlan.from_scores(
            scores,
            count=self.blocks_read(scores.shape[3]) if topk_blocks is None else topk_blocks,
            top_p=config.top_p,
            skip=config.skip,
            tail_blocks=-(-text_tokens // config.block_k),
            geometry=geometry,
            tally=tally,
            # Text queries read every key.
            dense_queries=text_tokens,
        )

    def _mode(self, q: Tensor, k: Tensor, plan: SparsePlan, scale: float | None) -> dict[str, Any]:
        """Return the arguments of `sparse_linear_attention` that combine the branches, with their weights."""
        config = self.config
        if not config.has_linear_branch:
            return {"combine": config.combine}
        mode: dict[str, Any] = {
            "combine": config.combine,
            "linear_scope": config.linear_scope,
            "feature_map": config.feature_map,
        }
        if config.combine == "proj":
            weight, bias = self.proj_l()
            if self.processes is not None:
                weight, bias = self.processes.summed(weight), self.processes.summed(bias)
            return mode | {"proj_weight": weight.to(q.device), "proj_bias": bias.to(q.device)}
        if not self.calibrated:
            self._calibrate(q, k, plan, scale)
        return mode | {"alpha": self._own_heads(self.alpha_logit.to(q.device), q, k).sigmoid()}

    def _own_heads(
        self, weight: Float[Tensor, "h ..."], q: Tensor, k: Tensor
    ) -> Float[Tensor, "own ..."]:
        """Return the rows of the heads that this process computes, which are the heads of `q`."""
        if self.processes is None:
            return weight
        return self.processes.own_heads(weight, q.shape[1] // k.shape[1])

    def _mix(
        self,
        exact: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LinearState | None,
        mode: dict[str, Any],
    ) -> Tensor:
        """Return the exact branch combined with a linear branch over every image key."""
        linear = linear_attention(q, k, v, feature_map=mode["feature_map"], state=state)
        linear = linear.to(exact.dtype)
        if mode["combine"] == "alpha":
            return torch.lerp(linear, exact, mode["alpha"].to(exact.dtype)[:, None, None])
        weight, bias = (mode[name].to(exact.dtype) for name in ("proj_weight", "proj_bias"))
        return exact + nn.functional.linear(linear, weight, bias)

    def blocks_read(self, blocks: int) -> int | None:
        """Return the number of key blocks that `topk` selects out of `blocks`; None if `top_p` alone decides."""
        if self.topk is None:
            return None
        if self.config.rounding == "ceil":
            return topk_blocks(self.topk, blocks)
        # No epsilon, because checkpoints were trained with int(topk * blocks) in binary floating point, which is 28 for
        # .29 of 100 blocks.
        return max(1, math.floor(self.topk * blocks))

    @torch.compiler.disable(
        reason="combine='alpha' measures the weight of its exact branch in the first sparse call, which "
        "cannot be compiled as one graph: run the pipeline once before you compile it, or load weights"
    )
    @torch.no_grad()
    def _calibrate(self, q: Tensor, k: Tensor, plan: SparsePlan, scale: float | None) -> None:
        mass = plan.recall(q, k, scale=scale).mean(0)
        if self.processes is not None:
            grouped = q.shape[1] // k.shape[1]
            mass = self.processes.all_heads(mass, self.alpha_logit.shape[0], grouped)
        # Clamped to the inside of (0, 1), where sigmoid has a gradient.
        self._measured = mass.float().clamp(1e-3, 1 - 1e-3).logit()
        self.alpha_logit.copy_(self._measured)
        self.calibrated = True

    @torch.no_grad()
    def keep_measured(self) -> None:
        """Write the measured `alpha_logit` again, after offloading restored its copy of the weights.

        Call this after a forward of the whole model.

        Raises:
            RuntimeError: the offloaded weights cannot be written, for example on a disk.
        """
        if self._measured is None:
            return
        measured, self._measured = self._measured.cpu(), None
        # The second iteration checks that the value written by the first one is kept.
        for _ in range(2):
            offloaded = self.alpha_logit.device.type == "meta"
            with align_module_device(self, "cpu") if offloaded else contextlib.nullcontext():
                if torch.equal(self.alpha_logit.cpu(), measured):
                    return
                self.alpha_logit.copy_(measured)
        self.calibrated = False
        raise RuntimeError(
            "combine='alpha': the measurement of the first sparse call cannot be written to offloaded weights; "
            "run the pipeline once before you offload it, or load weights"
        )
