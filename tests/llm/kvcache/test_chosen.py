"""Attention over chosen tokens: gathered, or under a mask where there are many queries."""

import pytest
import torch

from dit_accel.llm.kvcache import chosen
from dit_accel.llm.kvcache.chosen import attend_chosen
from dit_accel.llm.kvcache.store import store_of

from .store_cases import tokens
from .test_channels import mask_of
from .test_channels import store_of as channels


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("store", ["dense", "int", "channels"])
def test_a_mask_gives_what_gathering_gives(store, padding, monkeypatch):
    made = (
        channels(mask_of(0, 8)[0])
        if store == "channels"
        else store_of(store, {"group": 8} if store == "int" else {})
    )
    for seed in range(3):  # two parts
        made.append(tokens(40, seed=seed, padding=padding if not seed else 0))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 3, 20, 16, generator=g)
    index = torch.rand(2, 2, 20, made.slots, generator=g).argsort(-1)[..., :30]
    visible = torch.rand(index.shape, generator=g) < 0.8
    visible[0, 0, 0] = False  # a query that reads nothing
    found = attend_chosen(made, q, index, visible, 0.3)
    monkeypatch.setattr(chosen, "MASK", 3000)
    parts = attend_chosen(made, q, index, visible, 0.3)
    monkeypatch.setattr(chosen, "MANY", 1000)
    monkeypatch.setattr(chosen, "_masked", None)
    want = attend_chosen(made, q, index, visible, 0.3)
    for x in (found, parts):
        torch.testing.assert_close(x.o, want.o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.lse, want.lse, rtol=1e-5, atol=1e-5)
