"""Learned router: initialisation, straight-through gradients, saving and loading."""

import copy

import pytest
import torch

import dit_accel
from dit_accel.bench.launches import recording
from dit_accel.config import SLAConfig
from dit_accel.config.sla import COMBINES
from dit_accel.kernels import block_scores
from dit_accel.kernels.router import pool_blocks, soft_topk
from dit_accel.kernels.router.credit import credited
from dit_accel.kernels.router.criteria import criteria_of
from dit_accel.kernels.router.select import select_blocks
from dit_accel.runtime.install import method_of
from dit_accel.sla import SparseLinearAttention
from dit_accel.sla.router import LEAST_ROWS, TEMPERATURE, LearnedRouter

from ..random_pipelines import FAMILIES, make, randomise, relative, run
from ..runtime.own_loops import batch_of
from ..runtime.training_worker import bare_wan, batch
from .test_attention import inputs, layer

SPARSE = {"block_q": 16, "block_k": 16, "crossover": "never", "topk": 0.25, "router": "learned"}
every_combine = pytest.mark.parametrize("combine", COMBINES)


def fresh(heads=4, head_dim=16, **changed):
    return SparseLinearAttention(SLAConfig(**{**SPARSE, **changed}), heads, head_dim)


@every_combine
def test_it_begins_as_the_fixed_router(combine):
    q, k, v = (x.detach().float() for x in inputs(53, 87, 11, heads=(4, 2)))
    outputs = []
    for router in ("learned", "spread"):
        module = fresh(router=router, combine=combine)
        outputs.append(module(q, k, v, text="last", text_tokens=11).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


@every_combine
@pytest.mark.parametrize("where", ["none", "first", "last"])
def test_gradients_of_the_projection_are_straight_through(combine, where):
    """Made by hand from the soft top-k of scores and the credits of blocks; all others are as without a router."""
    text = 0 if where == "none" else 11
    module = layer(4, 16, combine=combine, router="learned")
    with torch.no_grad():
        module.learned_router.weight.mul_(0.1).add_(torch.eye(16))
    q, k, v = inputs(53, 87, text, heads=(4, 2))
    o = module(q, k, v, text=where, text_tokens=text)
    grad = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(o, (q, k, v, *module.parameters()), grad)
    weight = module.learned_router.weight.detach().double().requires_grad_()
    words = slice(text) if where == "first" else slice(o.shape[2] - text, None)
    of_k, of_v = (x[:, :, slice(text) if where == "first" else slice(87, None)] for x in (k, v))
    image = slice(text, None) if where == "first" else slice(0, o.shape[2] - text)
    qi, ki, vi = (x[:, :, image if x is q else slice(text, None) if where == "first" else slice(87)]
                  for x in (q, k, v))  # fmt: skip
    with torch.no_grad():
        scores = block_scores(qi, ki, block_q=16, block_k=16, spread=True, projection=weight)
        every = torch.ones_like(scores, dtype=torch.bool)
        read, _ = select_blocks(scores, every, criteria_of(scores.shape[3], topk=0.3))
        means = pool_blocks(qi, 16), pool_blocks(ki, 16).repeat_interleave(2, 1)
    products = means[0] / 4 @ weight @ means[1].mT
    ranked = scores + products - products.detach()
    weights = soft_topk(ranked, 2, temperature=TEMPERATURE)
    options = {"linear_set": ~read} if combine in ("proj", "alpha") else {}
    if combine == "proj":
        options["proj_weight"] = module.proj_l.weight
    if combine == "alpha":
        options["alpha"] = module.alpha_logit.sigmoid()
    plain = torch.zeros_like(qi).requires_grad_()
    expected = credited(
        plain,
        weights,
        qi,
        ki,
        vi,
        rows=torch.arange(4),
        read=read,
        block_q=16,
        block_k=16,
        scale=0.25,
        text=(of_k, of_v),
        shared_softmax=combine == "shared_softmax",
        **options,
    )
    (wanted,) = torch.autograd.grad(expected, weight, grad[:, :, image])
    names = ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    found = dict(zip(names, got, strict=True))
    torch.testing.assert_close(
        found["learned_router.weight"].double(), wanted, rtol=1e-4, atol=1e-4
    )
    assert wanted.abs().max() > 1e-3
    assert words.stop is None or words.stop == text
    # What a fixed router that ranks alike gives.
    module.learned_router.weight.requires_grad_(False)
    same = module(q, k, v, text=where, text_tokens=text)
    torch.testing.assert_close(same, o, rtol=0, atol=0)
    others = [name for name in names if name != "learned_router.weight"]
    without = torch.autograd.grad(
        same, [q, k, v, *(p for n, p in module.named_parameters() if n in others)], grad
    )
    for name, x in zip(others, without, strict=True):
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-9)


def test_it_learns_to_read_the_blocks_that_a_mean_cannot_stand_for(generator):
    """Half of the key blocks hold equal tokens, which their means replace exactly. One channel tells them apart."""
    varied = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0]).repeat_interleave(16)[:, None]

    def tokens(width):
        equal = torch.randn(2, 2, 12, width, generator=generator).repeat_interleave(16, 2)
        return equal + varied * torch.randn(2, 2, 192, width, generator=generator)

    q = torch.randn(2, 2, 192, 16, generator=generator)
    q[..., 0], k, v = 2, tokens(16), tokens(16)
    k[..., 0] = 0.2 * varied[:, 0] - 0.1
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    module = fresh(heads=2, combine="shared_softmax", topk=0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (module(q, k, v) - exact).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    scores = block_scores(
        q, k, block_q=16, block_k=16, spread=True, projection=module.learned_router.weight
    )
    best = scores.topk(6).indices.sort().values
    assert (best == torch.tensor([0, 2, 3, 6, 9, 10])).float().mean() > 0.95


@pytest.mark.parametrize("count", [5, 40, 100])
def test_some_rows_teach_in_each_step_and_all_in_turn(count):
    router = LearnedRouter(2, 8)
    assert router.rows(count, 0.1).tolist() == list(range(count))
    router.every_row = False
    seen = set()
    for step in range(-(-count // LEAST_ROWS)):
        router.step.fill_(step)
        rows = router.rows(count, 0.1).tolist()
        assert len(set(rows)) == len(rows) == min(count, max(LEAST_ROWS, -(-count // 10)))
        assert 0 <= min(rows) <= max(rows) < count
        seen |= set(rows)
    assert seen == set(range(count))


def test_the_gradient_of_some_rows_is_on_average_that_of_all():
    q, k, v = (x.detach() for x in inputs(16 * 24, 87, 0, heads=(4, 2)))
    module = layer(4, 16, router="learned", combine="shared_softmax")
    grad = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(3))

    def gradient():
        return torch.autograd.grad(module(q, k, v), module.learned_router.weight, grad)[0]

    every = gradient()
    module.learned_router.every_row = False
    some = []
    for step in range(3):  # 8 of 24 rows
        module.learned_router.step.fill_(step)
        some.append(gradient())
    assert relative(some[0], some[1]) > 0.1
    torch.testing.assert_close(torch.stack(some).mean(0), every, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_stay_in_fp32_and_half_inputs_teach(dtype):
    module = torch.nn.Sequential(fresh(combine="proj")).to(dtype)[0]
    assert {x.dtype for x in module.parameters()} == {torch.float32}
    q, k, v = (x.detach().to(dtype) for x in inputs(53, 87, 0, heads=(4, 2)))
    o = module(q, k, v)
    assert o.dtype == dtype
    o.float().square().mean().backward()
    assert module.learned_router.weight.grad.any()
    assert module.learned_router.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("where", ["none", "last"])
def test_inference_costs_one_product_more_and_waits_for_nothing(where):
    text = 0 if where == "none" else 11
    found = {}
    for router in ("spread", "spread", "learned"):  # the first call makes the geometry
        module = fresh(combine="none", router=router).to("meta")
        q, k, v = (x.detach().half().to("meta")[:1] for x in inputs(53, 87, text, heads=(4, 2)))
        with recording() as started, torch.no_grad():
            module(q, k, v, text=where, text_tokens=text)
        assert started.syncs == []
        found[router] = started
    assert found["learned"].launches == found["spread"].launches
    ops = list(found["learned"].ops)
    ops.remove("bmm")
    assert ops == found["spread"].ops


@every_combine
def test_training_on_a_gpu_waits_for_nothing(combine):
    module = fresh(combine=combine).to("meta")
    module.calibrated = True
    module.learned_router.every_row = False
    q, k, v = (x.detach().to("meta") for x in inputs(53, 87, 11, heads=(4, 2)))
    with recording() as started:
        module(q.half(), k.half(), v.half(), text="last", text_tokens=11)
    assert started.syncs == []
    assert "select_kernel" in started.launches


# In models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("combine", ["shared_softmax", "alpha"])
def test_it_learns_in_every_family(family, combine):
    pipe = make(family)
    dit_accel.enable(pipe.transformer, sla={**SPARSE, "combine": combine, "dense_layers": 0})
    output = pipe.transformer(**batch_of(family), return_dict=False)[0]
    output.square().mean().backward()
    for module in method_of(pipe.transformer, "sla").attention.values():
        assert module.learned_router.weight.grad.any()


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina"])
def test_it_ranks_the_same_under_region_adaptive_sampling(family):
    """Ratio 1 selects every token, so that only the way there differs."""
    ras = {"ratio": 1.0, "warmup": 1, "tail": 1, "resets": [], "kv_predictor": "hold"}
    latents = []
    for settings in ({}, {"ras": ras}):
        pipe = make(family)
        dit_accel.enable(pipe, sla={**SPARSE, "combine": "proj", "dense_steps": 0}, **settings)
        randomise(pipe)
        latents.append(run(pipe, family, steps=4))
    assert relative(latents[1], latents[0]) < 1e-5


def test_checkpointed_gradients_are_the_same():
    grads = []
    for checkpointed in (False, True):
        transformer = bare_wan().train()
        dit_accel.enable(transformer, sla={**SPARSE, "combine": "alpha", "dense_layers": 0})
        randomise(transformer)
        method_of(transformer, "sla").set_learning_step(3)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        transformer(**batch(), return_dict=False)[0].square().mean().backward()
        grads.append([x.grad for x in transformer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# Weights ------------------------------------------------------------------------------------------


def with_router(combine="shared_softmax", **changed):
    transformer = bare_wan().eval()
    dit_accel.enable(transformer, sla={**SPARSE, "combine": combine, **changed})
    randomise(transformer)
    return transformer


def output(transformer):
    with torch.no_grad():
        return transformer(**batch(), return_dict=False)[0]


@every_combine
def test_what_is_saved_comes_back(combine, tmp_path):
    transformer = with_router(combine)
    expected = output(transformer)
    path = dit_accel.save_sla(transformer, tmp_path)
    assert path.is_file()
    for load in (dit_accel.load_sla, lambda other, path: dit_accel.enable(other, sla=path)):
        other = bare_wan().eval()
        load(other, tmp_path)
        sla = method_of(other, "sla")
        assert sla.config.router == "learned"
        torch.testing.assert_close(output(other), expected, rtol=0, atol=0)
        dit_accel.disable(other)
        assert not any(".sla." in name for name in other.state_dict())


def test_a_checkpoint_without_the_weights_of_its_router_is_refused():
    from dit_accel.checkpoint.file import SLACheckpoint
    from dit_accel.checkpoint.save_load import checkpoint_of

    good = checkpoint_of(with_router("proj"))
    short = {n: x for n, x in good.weights.items() if "blocks.1.attn1.learned_router" not in n}
    with pytest.raises(ValueError, match=r"missing.*blocks\.1\.attn1\.learned_router\.weight"):
        SLACheckpoint(config=good.config, base=good.base, weights=short)
    fixed = SLAConfig(**{**good.config.to_dict(), "router": "spread"})
    with pytest.raises(ValueError, match=r"not expected.*blocks\.0\.attn1\.learned_router"):
        SLACheckpoint(config=fixed, base=good.base, weights=good.weights)


def test_merged_repositories_keep_it(sparse_wan, wan_repository, tmp_path):
    from dit_accel.checkpoint.merge import merge

    pipe = sparse_wan({"router": "learned", "combine": "proj"})
    randomise(pipe)
    sla = method_of(pipe, "sla")
    expected = {name: x.learned_router.weight.clone() for name, x in sla.attention.items()}
    dit_accel.save_sla(pipe, tmp_path / "sla")
    dit_accel.disable(pipe)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    merged = merge(
        wan_repository,
        tmp_path / "transformer",
        tmp_path / "merged",
        sla_checkpoint=tmp_path / "sla",
    )
    loaded = type(pipe).from_pretrained(merged)
    for name, module in method_of(loaded, "sla").attention.items():
        torch.testing.assert_close(module.learned_router.weight, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"topk": 0.5}, {"proj_l", "learned_router"}),
        ({"router": "spread"}, {"proj_l"}),
        ({"combine": "shared_softmax"}, {"learned_router"}),
        ({"combine": "alpha"}, {"learned_router"}),
        ({"combine": "none", "router": "mean"}, set()),
    ],
    # The printed order of a set differs between processes, and workers must agree on names.
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_other_settings_keep_what_they_have_in_common(changed, kept):
    transformer = with_router("proj")
    before = copy.deepcopy(method_of(transformer, "sla").attention["blocks.1.attn1"].state_dict())
    dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj", **changed})
    module = method_of(transformer, "sla").attention["blocks.1.attn1"]
    for name, x in module.state_dict().items():
        same = name in before and torch.equal(x, before[name])
        assert same == (name.split(".")[0] in kept), name
    assert {name.split(".")[0] for name in module.state_dict()} >= kept
    assert module.calibrated == (changed.get("combine") != "alpha")


def test_a_router_is_added_to_weights_that_are_there():
    transformer = with_router("proj", router="spread")
    weight = method_of(transformer, "sla").attention["blocks.1.attn1"].proj_l.weight.clone()
    expected = output(transformer)
    dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj"})
    module = method_of(transformer, "sla").attention["blocks.1.attn1"]
    torch.testing.assert_close(module.proj_l.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(output(transformer), expected, rtol=0, atol=0)


def test_unknown_weights_are_refused():
    from dit_accel.sla import SparseAttention

    from .test_schedule import layers

    attention = SparseAttention(SLAConfig(), {"blocks.0": {"router": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"weights: layer blocks\.0 .*router"):
        attention.make_layers(layers(1))
