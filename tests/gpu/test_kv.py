"""Key-value caches on a GPU: the same logits as on a CPU, with and without a second stream."""

import pytest
import torch

pytest.importorskip("transformers")

from dit_accel import llm
from dit_accel.llm.kvcache.cache import KVCache

from ..llm.models import make, prompt

pytestmark = pytest.mark.gpu

KINDS = {
    "dense": {},
    "int4": {"store": "int", "store_options": {"bits": 4, "group": 8}},
    "wave": {"select": "wave", "select_options": {"retrieve": 0.2}},
    "graph": {"select": "retrieval", "select_options": {"index": "graph", "topk": 32}},
    "memory of the CPU": {"store": "int", "store_options": {"group": 8}, "tier": "cpu"},
}


def logits(model, kv, device):
    """Return the logits of a text that is read token by token after a prompt, with crops and forks between."""
    model = llm.enable(model.to(device), kv=kv)
    ids, cache, found = prompt(length=400).to(device), KVCache(model, kv), []
    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache)
        for i in range(300, 380):
            found.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
            if i == 350:
                cache.crop(-20)
                cache = cache.fork()
    llm.disable(model)
    return torch.cat(found, 1).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_what_a_cpu_gives(kind):
    kv = {"sink": 4, "recent": 16, "flush": 8, **KINDS[kind]}
    model = make("Llama")
    want = logits(model, kv, "cpu")
    for overlap in (False, True):
        found = logits(model, {**kv, "overlap": overlap}, "cuda")
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
