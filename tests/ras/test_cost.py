"""The counted cost against torch's own FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel.models import family_of

from ..random_pipelines import FAMILIES, make, run


class PerCall:
    """Counter of the FLOPs of every transformer call."""

    def __init__(self, *transformers):
        self.counts = []
        for transformer in transformers:
            transformer.register_forward_pre_hook(self.before, prepend=True)
            transformer.register_forward_hook(self.after)

    def before(self, module, args):
        self.mode = FlopCounterMode(display=False)
        self.mode.__enter__()

    def after(self, module, args, output):
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_cost_is_what_torch_counts(family):
    pipe = make(family)
    counter = PerCall(pipe.transformer)
    with sdpa_kernel(SDPBackend.MATH):  # counted as two products
        run(pipe, family)
        plain = counter.counts[-1]
        counter.counts.clear()
        dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 2, "resets": ()})
        run(pipe, family)
    contexts = 2 if family in ("wan", "lumina2") else 1
    steps = dit_accel.summary(pipe, strict=True).ras.steps
    counted = [
        sum(counter.counts[i : i + contexts]) / contexts / plain
        for i in range(0, len(counter.counts), contexts)
    ]
    for step, share in zip(steps, counted, strict=True):
        assert step.cost == pytest.approx(share, rel=0.01)


def test_a_dense_step_at_real_size_has_the_published_flops():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=12, ffn_dim=8960, num_layers=30, text_dim=4096
        )
    family = family_of(transformer)
    flops = family.flops(transformer, 32760, 32760, 512)
    # 30 x (4 n d^2 + 2 n d^2 + 2 n d ffn + 2 n^2 d + 2 n 512 d) multiply-adds, d 1536, n 32,760.
    expected = 2 * 30 * 32760 * 1536 * (6 * 1536 + 2 * 8960 + 2 * 32760 + 2 * 512)
    assert flops == pytest.approx(expected, rel=1e-3)
