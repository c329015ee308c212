"""Region-adaptive sampling without gathering: every call runs on all tokens, and what a left-out token
would not have computed is replaced by its prediction. Slow, and independent of indices and buffers."""

import torch

from dit_accel.models import by_name, family_of


class Remembered:
    """Values of tokens at their last two updates."""

    def __init__(self, linear):
        self.linear = linear
        self.last = self.previous = self.at = self.before = None

    def merge(self, x, active, sigma):
        """Return x `[R, L, ...]` for active tokens, and the prediction for noise level `sigma` for all others."""
        wide = active.reshape(*active.shape, *[1] * (x.ndim - 2))
        sigma = torch.full(active.shape, float(sigma), dtype=torch.float64)
        if self.last is None:
            assert active.all()
            self.last, self.previous, self.at, self.before = x, x, sigma, sigma
            return x
        gap = self.at - self.before
        factor = torch.where(
            gap == 0, 0.0, (sigma - self.at) / torch.where(gap == 0, 1.0, gap)
        ).clamp(0, 1)
        factor = factor.reshape(wide.shape).to(x.dtype) * self.linear
        merged = torch.where(wide, x, self.last + factor * (self.last - self.previous))
        moved = active & (self.at != sigma)  # a second value at the same level replaces the first
        wide_moved = moved.reshape(wide.shape)
        self.previous = torch.where(wide_moved, self.last, self.previous)
        self.before = torch.where(moved, self.at, self.before)
        self.last = torch.where(wide, x, self.last)
        self.at = torch.where(active, sigma, self.at)
        return merged


class Reference:
    """Reference that replaces processors of `pipe.transformer`; `masks[step]` `[S, N]` is true for active tokens."""

    def __init__(self, pipe, masks, *, linear, linear_kv):
        self.pipe, self.masks = pipe, masks
        self.linear, self.linear_kv = linear, linear_kv
        transformer = pipe.transformer
        self.family = family_of(transformer)
        self.memory, self.calls = {}, {}
        for name, layer in self.family.self_attention(transformer).items():
            processor = self.family.processor(layer.module.processor)
            processor.kv_store = lambda k, v, name=name, layer=layer: tuple(
                self.remember((name, i), x, self.linear_kv, layer.layout)
                for i, x in enumerate((k, v))
            )
            layer.module.set_processor(processor)
        last = transformer.proj_out if hasattr(transformer, "proj_out") else transformer.norm_out
        joint = "joint" if self.family.name.startswith("Lumina-Image") else "image"
        last.register_forward_hook(
            lambda m, a, out: self.remember(("output", 0), out, self.linear, joint)
        )
        transformer.register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, transformer, args, kwargs):
        call = self.family.call(transformer, by_name(transformer, args, kwargs))
        self.context = call.context
        key = (id(call.context), call.variant)
        self.key = key
        # The tensor is kept: its id stays its own.
        self.step = self.calls.get(key, (None, 0))[1]
        self.calls[key] = (call.context, self.step + 1)
        rows = call.hidden_states.shape[0]
        mask = self.masks[self.step]
        self.mask = mask.repeat(rows // len(mask), 1)
        self.sigma = self.pipe.scheduler.sigmas[self.step]
        lengths = kwargs.get("encoder_attention_mask")
        self.text = None if lengths is None else lengths.sum(1).tolist()

    def remember(self, name, x, linear, layout):
        active = self.mask
        if layout == "joint":
            tokens, active = active.shape[1], torch.ones(x.shape[:2], dtype=torch.bool)
            for row, start in enumerate(self.text):
                active[row, start : start + tokens] = self.mask[row]
        memory = self.memory.setdefault((self.key, name), Remembered(linear))
        return memory.merge(x, active, self.sigma)
