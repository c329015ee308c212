"""Stage (a): weights of sparse attention fitted to the dense attention of the frozen model."""

import threading
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

import dit_accel
from dit_accel.finetune.batch import Batch
from dit_accel.finetune.dense_pass import dense_pass, noisy_samples, squared_error
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.regression import regress
from dit_accel.runtime.install import method_of

from ..random_pipelines import make, relative
from ..runtime.own_loops import batch_of as arguments
from ..runtime.training_worker import bare_wan

SPARSE = {"topk": 0.25, "block_q": 16, "block_k": 16, "crossover": "never", "order": (1, 4, 4)}


@dataclass
class Settings:
    regression_steps: int = 12
    regression_learning_rate: float = 0.02
    regression_topk: list = field(default_factory=list)
    seed: int = 3


class Trainable:
    """The part of a family that the regression uses, for Wan."""

    flow_shift = 3.0

    def __init__(self, transformer):
        self.transformer = transformer
        self.calls = []

    def velocity(self, model, noisy_latents, sigmas, conditions):
        assert not torch.is_grad_enabled()
        self.calls.append((noisy_latents, sigmas))
        return model(noisy_latents, 1000 * sigmas, **conditions, return_dict=False)[0]


def batches(step, rows=4, size=8):
    generator = torch.Generator().manual_seed(100 + step)
    latents = torch.randn(rows, 4, 3, size, size, generator=generator)
    # Smooth in space, so that attention has something to find.
    latents = torch.nn.functional.avg_pool3d(latents, (1, 3, 3), 1, (0, 1, 1)) * 3
    text = torch.randn(rows, 12, 24, generator=generator)
    return Batch(latents, {"encoder_hidden_states": text}, tuple(map(str, range(rows))))


def enabled(**changed):
    transformer = bare_wan().eval()
    for block in transformer.blocks:  # attention of random weights is nearly even
        block.attn1.norm_q.weight.data.mul_(3)
        block.attn1.norm_k.weight.data.mul_(2)
    dit_accel.enable(transformer, sla={**SPARSE, "dense_layers": 1, **changed})
    return Trainable(transformer), method_of(transformer, "sla")


@pytest.mark.parametrize(
    ("combine", "router"),
    [
        ("none", "spread"),
        ("none", "learned"),
        ("shared_softmax", "learned"),
        ("proj", "spread"),
        ("alpha", "spread"),
        ("alpha", "learned"),
    ],
)
def test_errors_fall_in_every_mode_that_has_weights(combine, router):
    trainable, sla = enabled(combine=combine, router=router)
    if not sla.config.has_weights:
        with pytest.warns(UserWarning, match="regression: .*no weights"):
            result = regress(trainable, sla, batches, Settings(), progress=False)
        assert result.losses == []
        assert result.after == result.before
        reasons = dict(result.untrained)
        assert reasons.pop("blocks.0.attn1") == "dense layer"
        assert set(reasons) == {"blocks.1.attn1", "blocks.2.attn1"}
        assert all(x.startswith("no weights") for x in reasons.values())
        return
    result = regress(trainable, sla, batches, Settings(), progress=False)
    assert len(result.losses) == 12
    assert result.untrained == {"blocks.0.attn1": "dense layer"}
    assert result.before.keys() == result.after.keys() == {"blocks.1.attn1", "blocks.2.attn1"}
    # A router of 12 blocks has little to gain where their means stand for the others.
    most = 1.005 if combine == "shared_softmax" else 0.998
    assert sum(result.after.values()) < most * sum(result.before.values())


def test_only_the_weights_of_scheduled_layers_change():
    trainable, sla = enabled(combine="alpha", router="learned")
    transformer = trainable.transformer
    transformer.requires_grad_(False)
    sla.attention["blocks.1.attn1"].learned_router.weight.requires_grad_(True)
    before = {name: x.clone() for name, x in transformer.state_dict().items()}
    flags = {name: x.requires_grad for name, x in transformer.named_parameters()}
    regress(trainable, sla, batches, Settings(regression_steps=2), progress=False)
    changed = {n for n, x in transformer.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {
        f"blocks.{i}.attn1.sla.{name}"
        for i in (1, 2)
        for name in ("alpha_logit", "learned_router.weight")
    }
    assert {name: x.requires_grad for name, x in transformer.named_parameters()} == flags
    assert all(x.grad is None for x in transformer.parameters())
    # What was measured first does not come back with the next call.
    trained = transformer.blocks[1].attn1.sla.alpha_logit.clone()
    with torch.no_grad():
        trainable.velocity(transformer, *trainable.calls[-1], batches(0).conditions)
    assert torch.equal(transformer.blocks[1].attn1.sla.alpha_logit, trained)


def test_shares_of_the_exact_branch_take_larger_steps():
    """The first step of Adam is as long as the learning rate, whatever the gradient."""
    trainable, sla = enabled(combine="alpha", router="learned")
    module = sla.attention["blocks.1.attn1"]
    settings = Settings(regression_steps=1, regression_learning_rate=0.01)
    with torch.no_grad():  # measures the shares
        trainable.velocity(
            trainable.transformer, batches(0).latents, torch.rand(4), batches(0).conditions
        )
    before = {name: x.clone() for name, x in module.state_dict().items()}
    regress(trainable, sla, batches, settings, progress=False)
    moved = {n: float((x - before[n]).abs().max()) for n, x in module.state_dict().items()}
    assert moved == pytest.approx({"alpha_logit": 0.1, "learned_router.weight": 0.01}, rel=0.02)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    found = []
    for seed in (3, 3, 4):
        trainable, sla = enabled(combine="proj", router="learned")
        settings = Settings(regression_steps=1, seed=seed)
        result = regress(trainable, sla, batches, settings, progress=False)
        found.append((result.losses, sla.attention["blocks.2.attn1"].proj_l.weight.detach()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_each_step_takes_one_of_several_values_of_topk():
    trainable, sla = enabled(combine="proj")
    steps = []
    result = regress(
        trainable,
        sla,
        batches,
        Settings(regression_topk=[0.5, 0.25, 1 / 12], regression_steps=9),
        progress=False,
        on_step=lambda step, scalars: steps.append((step, scalars)),
    )
    assert [step for step, _ in steps] == list(range(9))
    assert [scalars["loss"] for _, scalars in steps] == result.losses
    assert {scalars["topk"] for _, scalars in steps} == {0.5, 0.25, 1 / 12}
    assert sla.config.topk == 0.25
    assert {x.topk for x in sla.attention.values()} == {0.25}


def test_layers_see_dense_inputs_in_the_order_that_they_run_in():
    trainable, sla = enabled(combine="none", dense_layers=0)
    transformer = trainable.transformer
    seen = {}

    def visit(name, module, q, k, v, **options):
        seen[name] = (q, k, v)
        assert options == {"text": "none", "text_tokens": 0, "scale": None}

    batch = batches(0)
    dense_pass(trainable, sla, batch, visit, names=sla.layers, seed=3, step=0)
    assert list(seen) == list(sla.layers)
    (noisy, sigmas), grabbed = trainable.calls[0], {}
    dit_accel.disable(transformer)

    def grab(name):
        def hook(module, args, kwargs):
            grabbed[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    for name in seen:
        transformer.get_submodule(name).register_forward_pre_hook(grab(name), with_kwargs=True)
    with torch.no_grad():
        transformer(noisy, 1000 * sigmas, **batch.conditions)
    order = sla.order((3, 8, 8), torch.device("cpu"))
    for name, (_, _, v) in seen.items():
        attn = transformer.get_submodule(name)
        expected = attn.to_v(order.apply(grabbed[name])).unflatten(2, (2, 16)).transpose(1, 2)
        assert relative(v, expected) < 1e-5


def test_the_error_is_over_image_queries_and_of_each_sample():
    _, sla = enabled(combine="none")
    module = sla.attention["blocks.1.attn1"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 96 + 7, 16, generator=generator) for _ in range(3))
    for text, image in (("last", slice(0, 96)), ("first", slice(7, None))):
        found = squared_error(module, q, k, v, text=text, text_tokens=7, scale=0.4)
        sparse = module(q, k, v, text=text, text_tokens=7, scale=0.4)[:, :, image].double()
        dense = torch.softmax(0.4 * q @ k.mT, -1)[:, :, image].double() @ v.double()
        expected = ((sparse - dense) ** 2).sum((1, 2, 3)) / (dense**2).sum((1, 2, 3))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_noise_is_a_function_of_seed_step_and_sample_alone():
    latents = torch.zeros(4, 4, 3, 8, 8)
    noisy, sigmas = noisy_samples(latents, 3, 7, 3.0)
    again, same = noisy_samples(latents[:2], 3, 7, 3.0)
    assert torch.equal(again, noisy[:2])
    assert torch.equal(same, sigmas[:2])
    others = [noisy_samples(latents, *other, 3.0)[0] for other in ((4, 7), (3, 8))]
    assert not any(torch.equal(x, noisy) for x in others)
    assert len({float(x) for x in sigmas}) == 4
    assert ((sigmas > 0) & (sigmas < 1)).all()
    many = noisy_samples(torch.zeros(400, 1, 1), 0, 0, 3.0)[1]
    assert float(many.mean()) == pytest.approx(0.676, abs=0.03)  # of 3u / (1 + 2u)


@pytest.mark.parametrize("family", ["sd3", "lumina2"])
def test_joint_attention_is_fitted_too(family):
    pipe = make(family)
    sparse = {**SPARSE, "order": "raster", "dense_layers": 0, "combine": "proj"}
    dit_accel.enable(pipe.transformer, sla={**sparse, "router": "learned"})
    given = arguments(family)

    class Joint(Trainable):
        def velocity(self, model, noisy_latents, sigmas, conditions):
            inputs = {**given, **conditions, "hidden_states": noisy_latents}
            return model(**inputs, return_dict=False)[0]

    def joint(step):
        return Batch(given["hidden_states"], {}, ("a", "b"))

    sla = method_of(pipe.transformer, "sla")
    settings = Settings(regression_steps=4, regression_learning_rate=0.01)
    result = regress(Joint(pipe.transformer), sla, joint, settings, progress=False)
    assert result.losses
    assert sum(result.after.values()) < sum(result.before.values())


def test_samples_that_run_dense_are_refused():
    trainable, sla = enabled(combine="proj", crossover="auto")
    with pytest.raises(ValueError, match=r"regression: no layer runs sparse .*\(4, 3, 8, 8\)"):
        regress(trainable, sla, batches, Settings(), progress=False)


@pytest.mark.parametrize(
    ("settings", "sparse", "message"),
    [
        ({"regression_steps": -1}, {}, "regression_steps=-1: .*0"),
        ({"regression_learning_rate": -0.1}, {}, "regression_learning_rate=-0.1"),
        ({"regression_topk": [0.1, 2]}, {}, r"regression_topk=\[0.1, 2\]: .*\(0, 1\]"),
        (
            {"regression_topk": [0.1]},
            {"topk": None, "top_p": 0.5},
            r"regression_topk=\[0.1\]: .*sla.topk",
        ),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, sparse, message):
    trainable, sla = enabled(combine="proj", **sparse)
    with pytest.raises(ValueError, match=message):
        regress(trainable, sla, batches, Settings(**settings), progress=False)
    assert not trainable.calls


def test_no_steps_measure_the_errors():
    trainable, sla = enabled(combine="proj")
    result = regress(trainable, sla, batches, Settings(regression_steps=0), progress=False)
    assert result.losses == []
    assert result.before == result.after


class ThreadProcesses(Processes):
    """Thread that stands for one of two processes."""

    def __init__(self, rank, slots, barrier):
        super().__init__()
        self.rank, self.count, self.slots, self.barrier = rank, 2, slots, barrier

    def sum(self, values):
        self.slots[self.rank] = values.clone()
        self.barrier.wait()
        total = self.slots[0] + self.slots[1]
        self.barrier.wait()
        return total


def test_two_processes_fit_what_one_fits():
    """Each process has half of the samples."""
    slots, barrier = [None, None], threading.Barrier(2, timeout=60)

    def half(rank, step):
        batch, some = batches(step), slice(2 * rank, 2 * rank + 2)
        conditions = {name: x[some] for name, x in batch.conditions.items()}
        return Batch(batch.latents[some], conditions, batch.ids[some])

    models = [enabled(combine="alpha", router="learned") for _ in range(3)]
    settings = Settings(regression_steps=4, regression_topk=[0.25, 0.5])
    alone = regress(*models[2], batches, settings, progress=False)
    results = [None, None]

    def work(rank):
        results[rank] = regress(
            *models[rank],
            partial(half, rank),
            settings,
            processes=ThreadProcesses(rank, slots, barrier),
            progress=False,
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].losses == results[1].losses
    assert results[0].before == results[1].before
    first, second = (sla.attention["blocks.1.attn1"].state_dict() for _, sla in models[:2])
    for name, x in first.items():
        torch.testing.assert_close(x, second[name], rtol=0, atol=0)
    assert results[0].losses == pytest.approx(alone.losses, rel=1e-4)
    assert results[0].after == pytest.approx(alone.after, rel=1e-3)
