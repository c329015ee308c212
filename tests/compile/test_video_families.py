"""Both methods in video models whose repeated blocks are compiled: the same result, and no graph for each run."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.models import family_of

from ..random_pipelines import make, relative, run

SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "order": (2, 2, 4), "crossover": "never"}
# Graphs of the plain pipeline.
PLAIN = {"hunyuan_video": 5, "ltx": 1, "cogvideox": 2}
RAS = {"ratio": [(0, 0.7), (0.5, 0.3)], "warmup": 2, "tail": 1, "resets": (6,)}


@pytest.mark.parametrize(
    ("family", "dense_steps"), [("hunyuan_video", 0), ("ltx", 2), ("cogvideox", 0)]
)
def test_compiled_repeated_blocks(family, dense_steps):
    pipe = make(family)
    counter = CompileCounterWithBackend("eager")
    for block in family_of(pipe.transformer).blocks(pipe.transformer):
        block.compile(backend=counter, fullgraph=True)
    dit_accel.enable(pipe, sla={**SLA, "dense_steps": dense_steps, "dense_layers": 0}, ras=RAS)
    with torch.compiler.set_stance("force_eager"):
        expected = run(pipe, family)
    graphs = []
    for _ in range(2):
        assert relative(run(pipe, family), expected) < 1e-5
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1] <= 4 * PLAIN[family]
    report = dit_accel.summary(pipe, strict=True)
    assert len({x.active for x in report.ras.steps}) == 3
