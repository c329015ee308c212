"""Sparse attention under torch.compile of the repeated blocks: how many graphs, and the same result and counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.runtime.install import method_of

from ..random_pipelines import compile_blocks, make, randomise, relative, run
from ..runtime.training_worker import bare_wan, batch

# Graphs of the plain pipeline. The blocks of Stable Diffusion 3 are among those of 3.5.
PLAIN = {"wan": 1, "sd35": 2, "lumina": 1, "lumina2": 2, "flux": 3}
RAS = {"ratio": [(0, 0.7), (0.5, 0.3)], "warmup": 2, "tail": 1, "resets": (6,)}
TILE = (1, 4, 4)
ALL_SPARSE = {"dense_steps": 0, "dense_layers": 0}


def sla(family, **changed):
    """Dense and sparse steps and blocks (the first one of Stable Diffusion 3.5 has two attention layers)."""
    base = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never", "order": "raster"}
    return {**base, "dense_steps": 2, "dense_layers": 2 if family == "sd35" else 1, **changed}


def counted(pipe, family, **call):
    """Return latents and all counts."""
    latents = run(pipe, family, **call)
    report = dit_accel.summary(pipe, strict=True).to_dict()
    del report["config"]
    return latents, report


def eagerly(pipe, family, **call):
    with torch.compiler.set_stance("force_eager"):
        return counted(pipe, family, **call)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.combines("sla", "compile")
def test_two_graphs_for_each_of_the_plain_pipeline_serve_both_orders(family):
    pipe = make(family)
    counter = compile_blocks(pipe, family, "eager")
    run(pipe, family, steps=1)
    assert counter.frame_count == PLAIN[family]
    counter.frame_count = 0
    graphs = []
    for order in ("raster", TILE):
        dit_accel.enable(pipe, sla=sla(family, order=order))
        expected, counts = eagerly(pipe, family, steps=4)
        for _ in range(2):
            latents, report = counted(pipe, family, steps=4)
            assert relative(latents, expected) < 1e-5
            assert report == counts
            graphs.append(counter.frame_count)
        dit_accel.disable(pipe)
    assert 0 < graphs[0] <= 2 * PLAIN[family]
    assert graphs == graphs[:1] * 4


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("wan", {"combine": "proj", "order": TILE}),
        ("sd35", ALL_SPARSE),
        ("lumina", {"combine": "proj", **ALL_SPARSE}),
        ("lumina2", {"order": TILE, **ALL_SPARSE}),
        ("flux", {"order": TILE, **ALL_SPARSE}),
    ],
    ids=list(PLAIN),
)
@pytest.mark.combines("sla and ras", "compile")
def test_region_adaptive_sampling_doubles_them_however_many_counts_it_has(family, changed):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(family, **changed), ras={**RAS, "kv_predictor": "hold"})
    randomise(pipe)
    expected, counts = eagerly(pipe, family)
    assert len({step["active"] for step in counts["ras"]["steps"]}) == 3
    # Tracing finds all breaks; AOTAutograd takes as long again, and one family shall do.
    counter = compile_blocks(pipe, family, "aot_eager" if family == "lumina" else "eager")
    graphs = []
    for _ in range(2):
        latents, report = counted(pipe, family)
        assert relative(latents, expected) < 1e-5
        assert report == counts
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1] <= 4 * PLAIN[family]


def test_texts_of_different_lengths_compile():
    """Calls with a mask (the prompts) and without one (the negative prompts) have graphs of their own, and lengths
    become dynamic when they change."""
    pipe = make("lumina2")
    dit_accel.enable(pipe, sla=sla("lumina2", order=TILE, **ALL_SPARSE), ras=RAS)
    counter = compile_blocks(pipe, "lumina2", "eager")
    graphs = []
    for prompts in ((0, 1), (2, 0), (0, 1), (3, 2)):
        latents, report = counted(pipe, "lumina2", prompts=prompts, steps=8)
        graphs.append(counter.frame_count)
        if len(graphs) > 2:
            expected, counts = eagerly(pipe, "lumina2", prompts=prompts, steps=8)
            assert relative(latents, expected) < 1e-5
            assert report == counts
    assert graphs[1:] == graphs[1:2] * 3
    assert graphs[1] <= 4 * 3


def test_a_third_size_needs_no_new_graph():
    pipe = make("wan")
    dit_accel.enable(pipe, sla=sla("wan", **ALL_SPARSE))
    counter = compile_blocks(pipe, "wan", "eager")
    graphs = []
    for height, width in ((112, 144), (128, 176), (208, 240)):
        counted(pipe, "wan", height=height, width=width, steps=1)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2]


def test_shares_are_measured_before_blocks_are_compiled_whole_or_at_a_graph_break():
    def fresh(**options):
        pipe = make("wan")
        dit_accel.enable(pipe, sla=sla("wan", combine="alpha", **ALL_SPARSE))
        return pipe, compile_blocks(pipe, "wan", "eager", **options)

    pipe, counter = fresh()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the pipeline once before"):
        run(pipe, "wan")
    expected, counts = eagerly(pipe, "wan", steps=2)
    latents, report = counted(pipe, "wan", steps=2)
    assert relative(latents, expected) < 1e-5
    assert report == counts
    assert counter.frame_count == 1
    broken, _ = fresh(fullgraph=False)
    assert relative(run(broken, "wan", steps=2), expected) < 1e-5


def test_another_share_of_the_blocks_needs_no_new_graph():
    """Two graphs serve any number of blocks: the first one, and one more at the first change."""
    pipe = make("wan")
    dit_accel.enable(pipe, sla=sla("wan", **ALL_SPARSE, topk=0.9, combine="proj"))
    randomise(pipe)
    attention = method_of(pipe, "sla")
    counter = compile_blocks(pipe, "wan", "eager")
    graphs = []
    for topk in (0.9, 0.6, 0.35, 0.2, 1.0, 0.5):
        attention.set_topk(topk)
        expected, counts = eagerly(pipe, "wan", steps=1)
        latents, report = counted(pipe, "wan", steps=1)
        assert relative(latents, expected) < 1e-5
        assert report == counts
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2, 2]


def test_pauses_share_the_graph_of_dense_steps():
    pipe = make("wan")
    plain = run(pipe, "wan", steps=4)
    dit_accel.enable(pipe, sla=sla("wan"))
    counter = compile_blocks(pipe, "wan", "eager")
    graphs = []
    for _ in range(2):
        counted(pipe, "wan", steps=4)
        graphs.append(counter.frame_count)
        with method_of(pipe, "sla").paused():
            assert relative(run(pipe, "wan", steps=4), plain) < 1e-5
        assert dit_accel.summary(pipe).dense_calls == {"paused": 24}
        graphs.append(counter.frame_count)
    assert graphs == [2] * 4


@pytest.mark.parametrize("family", ["wan", "sd35"])
def test_a_learned_router_adds_no_graph(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(family, router="learned", **ALL_SPARSE))
    randomise(pipe)
    expected, counts = eagerly(pipe, family, steps=2)
    counter = compile_blocks(pipe, family, "eager")
    for _ in range(2):
        latents, report = counted(pipe, family, steps=2)
        assert relative(latents, expected) < 1e-5
        assert report == counts
    assert counter.frame_count == PLAIN[family]


def test_compiled_blocks_train_a_learned_router():
    """Steps with other rows and another share of blocks need no new graph."""
    gradients = {}
    for compiled in (False, True):
        transformer = bare_wan()
        settings = {"topk": 0.5, "block_q": 16, "block_k": 16, "crossover": "never"}
        settings |= {"combine": "proj", "router": "learned", "dense_layers": 0}
        dit_accel.enable(transformer, sla=settings)
        randomise(transformer)
        attention = method_of(transformer, "sla")
        if compiled:
            counter = CompileCounterWithBackend("aot_eager")
            transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        found = gradients[compiled] = []
        for step, topk in enumerate((0.5, 0.3, 0.6)):
            attention.set_learning_step(step)
            attention.set_topk(topk)
            transformer.zero_grad()
            transformer(**batch(), return_dict=False)[0].square().mean().backward()
            found.append([x.grad for x in transformer.parameters()])
    for a, b in zip(gradients[True], gradients[False], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 3


@pytest.mark.combines("sla", "compile")
def test_the_real_compiler():
    pipe = make("wan")
    dit_accel.enable(pipe, sla=sla("wan", **ALL_SPARSE, order=TILE))
    expected, counts = eagerly(pipe, "wan", steps=4)
    counter = compile_blocks(pipe, "wan", "inductor")
    latents, report = counted(pipe, "wan", steps=4)
    assert counter.frame_count == 1
    assert relative(latents, expected) < 1e-5
    assert report == counts
