"""Sparse attention over texts of different lengths under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ..sla.test_attention import layer
from ..sla.test_text_lengths import LENGTHS, TEXT, batch, inputs


@pytest.mark.parametrize("combine", ["shared_softmax", "proj"])
def test_one_graph_serves_all_lengths(combine):
    module = layer(4, 16, combine=combine)
    image, words = inputs()
    q, k, v = (x.detach().float() for x in batch(image, words, "last"))
    options = {"text": "last", "text_tokens": TEXT}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in (LENGTHS, LENGTHS.flip(0)):
            o = compiled(q, k, v, text_lengths=lengths, **options)
            torch.testing.assert_close(o, module(q, k, v, text_lengths=lengths, **options))
    assert counter.frame_count == 1
