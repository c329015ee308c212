"""Sparse attention in every family of models, alone and together with region-adaptive sampling."""

import copy

import pytest
import torch

import dit_accel
from dit_accel.kernels import LinearState
from dit_accel.runtime.install import installation_of, method_of
from dit_accel.sla import tile_order

from ..random_pipelines import (
    FAMILIES,
    embeddings,
    grid_of,
    make,
    randomise,
    relative,
    run,
    state_of,
)
from ..ras.reference import Reference

every_family = pytest.mark.parametrize("family", FAMILIES)
TILE = (2, 2, 4)
MODES = [("none", "complement"), ("shared_softmax", "complement")]
MODES += [(combine, scope) for combine in ("proj", "alpha") for scope in ("marginal", "all")]
RAS = {"ratio": 0.4, "warmup": 2, "tail": 1, "resets": (6,)}


def sla(**changed):
    """Return settings that are sparse in every step and layer."""
    base = {"topk": 0.3, "block_q": 16, "block_k": 16, "order": "raster", "crossover": "never"}
    return {**base, "dense_steps": 0, "dense_layers": 0, **changed}


def sparse(pipe):
    return method_of(pipe, "sla")


@pytest.mark.parametrize(
    ("family", "order", "combine", "scope"),
    [
        *((x, TILE, *m) for x in ("wan", "sd3") for m in MODES if m != ("alpha", "all")),
        *((x, TILE, *m) for x in FAMILIES[2:] for m in MODES[1:3]),
        *((family, "raster", "proj", "marginal") for family in FAMILIES),
    ],
)
@pytest.mark.combines("sla")
def test_reading_everything_equals_plain(family, order, combine, scope):
    pipe = make(family)
    plain = run(pipe, family, steps=2)
    dit_accel.enable(pipe, sla=sla(topk=1.0, order=order, combine=combine, linear_scope=scope))
    assert relative(run(pipe, family, steps=2), plain) < 1e-5
    report = dit_accel.summary(pipe, strict=True)
    assert report.overall_density == 1
    assert not report.dense_calls
    assert all(layer.sparse_calls == report.layers[0].sparse_calls for layer in report.layers)


@pytest.mark.parametrize(
    ("family", "combine", "scope"),
    [
        *(("wan", *mode) for mode in MODES),
        *((x, "shared_softmax", "complement") for x in ("sd3", "lumina")),
        *((x, "proj", "all") for x in ("sd35", "lumina2")),
    ],
)
def test_an_order_of_the_whole_forward_equals_one_around_each_attention(
    family, combine, scope, monkeypatch
):
    pipe = make(family)
    settings = sla(combine=combine, linear_scope=scope)
    dit_accel.enable(pipe, sla={**settings, "order": TILE})
    randomise(pipe)
    latents = run(pipe, family, steps=2)
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, sla=settings)
    randomise(pipe)
    assert relative(run(pipe, family, steps=2), latents) > 1e-4
    order = tile_order(grid_of(family), TILE, torch.device("cpu"))

    def around(forward):
        def reordered(q, k, v, *, text, text_tokens, **options):
            places = torch.arange(len(order.gather))
            first = text_tokens if text == "first" else 0
            every = torch.arange(k.shape[2])
            every[first : first + len(places)] = order.gather + first
            o = forward(
                *(x[:, :, every] for x in (q, k, v)), text=text, text_tokens=text_tokens, **options
            )
            return o[:, :, every.argsort()]

        return reordered

    for module in sparse(pipe).attention.values():
        monkeypatch.setattr(module, "forward", around(module.forward))
    assert relative(run(pipe, family, steps=2), latents) < 1e-5


@pytest.mark.parametrize(
    ("family", "order", "combine", "scope"),
    [
        *((family, TILE, "proj", "all") for family in FAMILIES),
        *((family, "raster", "alpha", "marginal") for family in ("sd35", "lumina2")),
        ("wan", TILE, "shared_softmax", "complement"),
        ("sd3", "raster", "shared_softmax", "complement"),
    ],
)
def test_ratio_one_equals_sparse_attention_alone(family, order, combine, scope):
    pipe = make(family)
    settings = sla(order=order, combine=combine, linear_scope=scope)
    dit_accel.enable(pipe, sla=settings)
    randomise(pipe)
    alone = run(pipe, family, steps=4)
    dit_accel.disable(pipe)
    ras = {"ratio": 1.0, "warmup": 1, "tail": 1, "resets": [], "kv_predictor": "hold"}
    dit_accel.enable(pipe, sla=settings, ras=ras)
    randomise(pipe)
    assert relative(run(pipe, family, steps=4), alone) < 2e-6
    calls = [not step.dense_calls for step in dit_accel.summary(pipe).ras.steps]
    assert calls == [False, *[True] * (len(calls) - 2), False]


@every_family
@pytest.mark.parametrize(
    ("order", "kv_predictor"), [(TILE, "linear"), ("raster", "hold")], ids=["tiles", "raster"]
)
@pytest.mark.combines("sla and ras")
def test_reading_everything_equals_region_adaptive_sampling_alone(family, order, kv_predictor):
    pipe = make(family)
    dit_accel.enable(
        pipe,
        sla=sla(topk=1.0, order=order),
        ras={**RAS, "kv_predictor": kv_predictor, "correction": 0},
    )
    latents = run(pipe, family, prompts=(0, 1))
    session = installation_of(pipe)
    report = dit_accel.summary(pipe)
    assert report.ras.ras_steps > 0
    tokens = report.ras.steps[0].tokens
    masks = {step.step: torch.ones(1, tokens, dtype=torch.bool) for step in report.ras.steps}
    for sample in range(2):
        for step, mask in session.methods["ras"].masks(sample).items():
            if sample == 0:
                masks[step] = mask.view(1, tokens)
            else:
                masks[step] = torch.cat([masks[step], mask.view(1, tokens)])
    dit_accel.disable(pipe)
    Reference(pipe, masks, linear=True, linear_kv=kv_predictor == "linear")
    assert relative(run(pipe, family, prompts=(0, 1)), latents) < 2e-5


@pytest.mark.parametrize(
    ("family", "order", "scope", "steps"),
    [
        ("wan", TILE, "complement", 20),
        ("wan", "raster", "marginal", 6),
        *((family, TILE, "complement", 6) for family in FAMILIES[1:]),
        ("lumina2", "raster", "all", 6),
        ("sd3", "raster", "all", 6),
    ],
)
def test_totals_of_many_steps_equal_sums_over_all_keys(family, order, scope, steps, monkeypatch):
    pipe = make(family)
    ras = {**RAS, "resets": [], "kv_predictor": "hold", "predictor": "hold"}
    settings = sla(combine="proj", linear_scope=scope, order=order)
    dit_accel.enable(pipe, sla=settings, ras=ras)
    randomise(pipe)
    errors = []

    def checked(forward):
        def attend(q, k, v, *, text, text_tokens, state=None, **options):
            if state is not None:
                image = k.shape[2] - text_tokens
                first = text_tokens if text == "first" else 0
                part = slice(first, first + image)
                exact = LinearState.from_keys(k[:, :, part], v[:, :, part])
                errors.append(max(relative(state.kv, exact.kv), relative(state.k, exact.k)))
            return forward(q, k, v, text=text, text_tokens=text_tokens, state=state, **options)

        return attend

    for module in sparse(pipe).attention.values():
        monkeypatch.setattr(module, "forward", checked(module.forward))
    latents = run(pipe, family, steps=steps)
    report = dit_accel.summary(pipe, strict=True)
    assert len(errors) == report.sparse_calls >= steps * len(report.layers)
    assert max(errors) < 1e-5
    for store in method_of(pipe, "ras").stores.by_layer.values():
        store.feature_map = None  # nobody keeps totals now
    assert relative(run(pipe, family, steps=steps), latents) < 1e-4


@pytest.mark.parametrize(
    ("family", "order"),
    [*((x, TILE) for x in FAMILIES), ("wan", "raster"), ("lumina2", "raster")],
)
def test_active_tokens_are_whole_query_blocks_of_the_order(family, order):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(order=order), ras=RAS)
    run(pipe, family)
    session = installation_of(pipe)
    grid = session.methods["ras"].plan.key[1]
    tokens = grid[0] * grid[1] * grid[2]
    places = torch.arange(tokens)
    if order != "raster":
        places = tile_order(grid, order, torch.device("cpu")).gather
    masks = session.methods["ras"].masks()
    assert masks
    for mask in masks.values():
        blocks = mask.flatten()[places].split(16)
        assert all(bool(x.all()) or not bool(x.any()) for x in blocks)
    assert dit_accel.summary(pipe, strict=True).density < 0.6


@every_family
@pytest.mark.combines("sla and ras", "batch > 1")
def test_both_methods_in_a_batch_equal_single_runs(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(order=TILE), ras=RAS)
    both = run(pipe, family, (0, 1), steps=7)
    assert dit_accel.summary(pipe, strict=True).density is not None
    for i in (0, 1):
        assert relative(run(pipe, family, (i,), steps=7)[0], both[i]) < 1e-5


@pytest.mark.parametrize(
    ("order", "combine", "scope", "ras"),
    [
        ("raster", "shared_softmax", "complement", None),
        (TILE, "alpha", "marginal", None),
        ("raster", "proj", "all", {**RAS, "resets": (), "kv_predictor": "hold"}),
        (TILE, "shared_softmax", "complement", {**RAS, "resets": (), "kv_predictor": "linear"}),
    ],
    ids=["raster", "tiles", "ras-raster", "ras-tiles"],
)
def test_texts_of_different_lengths_in_a_batch_equal_single_runs(order, combine, scope, ras):
    """Images of Lumina-Image 2.0 then begin at different positions in their rows."""
    prompts = (4, 0)
    pipe = make("lumina2")
    dit_accel.enable(pipe, sla=sla(order=order, combine=combine, linear_scope=scope), ras=ras)
    randomise(pipe)
    together = run(pipe, "lumina2", prompts, steps=5)
    report = dit_accel.summary(pipe, strict=True)
    assert not report.dense_calls
    assert report.density < 0.6
    for i, prompt in enumerate(prompts):
        assert relative(run(pipe, "lumina2", (prompt,), steps=5)[0], together[i]) < 2e-5


def test_texts_of_different_lengths_train_as_single_ones():
    pipe = make("lumina2")
    dit_accel.enable(pipe, sla=sla(combine="proj", order=TILE))
    randomise(pipe)
    text = embeddings("lumina2", (4, 0))
    arguments = {
        "hidden_states": torch.randn(2, 4, 22, 26, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((2,), 0.3),
        "encoder_hidden_states": text["prompt_embeds"],
        "encoder_attention_mask": text["prompt_attention_mask"],
    }
    parameters = [x for m in sparse(pipe).attention.values() for x in m.parameters()]
    parameters += [x.to_q.weight for x in sparse(pipe)._attention.values()]

    def gradients(*rows):
        found = []
        for row in rows:
            out = pipe.transformer(**{name: x[row] for name, x in arguments.items()})[0]
            found.append(torch.autograd.grad(out.square().sum(), parameters))
        return [sum(x) for x in zip(*found, strict=True)]

    for a, b in zip(gradients(slice(0, 2)), gradients([0], [1]), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(
    ("family", "combine", "ras"),
    [
        *((x, "proj", RAS) for x in FAMILIES),
        *(("wan", "alpha", None), ("sd3", "shared_softmax", RAS)),
    ],
)
def test_disable_restores_every_module(family, combine, ras):
    pipe = make(family)
    plain = run(pipe, family, steps=5)
    before = state_of(pipe.transformer)
    names = list(pipe.transformer.state_dict())
    dit_accel.enable(pipe, sla=sla(order=TILE, combine=combine), ras=ras)
    weights = [x for x in pipe.transformer.state_dict() if x not in names]
    assert bool(weights) == (combine != "shared_softmax")
    assert all(".sla." in x for x in weights)
    run(pipe, family, steps=5)
    dit_accel.disable(pipe)
    after = state_of(pipe.transformer)
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert old.keys() == after[name].keys()
        assert all(old[k] is after[name][k] or old[k] == after[name][k] for k in old)
    torch.testing.assert_close(run(pipe, family, steps=5), plain, rtol=0, atol=0)


@every_family
def test_weights_move_with_the_pipeline_and_stay_in_fp32(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(combine="proj"))
    pipe.transformer.to(torch.bfloat16)
    for name, parameter in pipe.transformer.named_parameters():
        assert (parameter.dtype == torch.float32) == (".sla." in name), name


@every_family
def test_the_projection_gets_a_gradient_and_learns(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(combine="proj", order=TILE))
    seen = {}

    def keep(module, args, kwargs):
        seen.update(args=args, kwargs=kwargs)

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run(pipe, family, steps=1)
    hook.remove()
    out = pipe.transformer(*seen["args"], **seen["kwargs"])[0]
    out.float().square().mean().backward()
    for name, module in sparse(pipe).attention.items():
        assert module.proj_l.weight.grad is not None, name
    grads = [m.proj_l.weight.grad.abs().max() for m in sparse(pipe).attention.values()]
    assert max(grads) > 0


@every_family
def test_a_deep_copy_is_its_own(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(combine="proj", order=TILE), ras=RAS)
    randomise(pipe)
    latents = run(pipe, family, steps=5)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(run(twin, family, steps=5), latents, rtol=0, atol=0)
    report = dit_accel.summary(twin, strict=True)
    assert report.ras.ras_steps > 0
    dit_accel.disable(twin)
    assert not any(".sla." in name for name in twin.transformer.state_dict())


def test_a_cache_of_bytes_is_refused_by_name():
    pipe = make("sd3")
    with pytest.raises(ValueError, match="kv_cache='fp8'"):
        dit_accel.enable(pipe, sla=sla(), ras={"ratio": 0.5, "kv_cache": "fp8"})
    assert not dit_accel.summary(pipe).enabled
    dit_accel.enable(pipe, ras={"ratio": 0.5, "kv_cache": "fp8"})
    with pytest.raises(ValueError, match="kv_cache='fp8'"):
        dit_accel.enable(pipe, sla=sla())
    assert dit_accel.summary(pipe).ras is not None


@every_family
def test_a_run_that_broke_off_leaves_no_trace(family):
    pipe = make(family)
    dit_accel.enable(pipe, sla=sla(order=TILE))
    fresh = run(pipe, family, steps=3)

    def fail(*_):
        raise KeyboardInterrupt

    hook = list(installation_of(pipe).layers.values())[1].module.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, family, (1,), steps=3)
    hook.remove()
    torch.testing.assert_close(run(pipe, family, steps=3), fresh, rtol=0, atol=0)
