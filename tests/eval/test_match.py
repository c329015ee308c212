"""Step caches at the cost of our row: counted FLOPs, the search, what is kept, and a fine reference."""

import contextlib
import types

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dit_accel.config import RASConfig
from dit_accel.eval.results.store import read_results, validate
from dit_accel.eval.runs import rivals
from dit_accel.eval.runs.caches import CACHES, StepCache
from dit_accel.eval.runs.match import Probes, counted_cost, match_cost
from dit_accel.eval.runs.methods import read_methods
from dit_accel.eval.runs.rivals import MATCHES, TARGET, choose_settings, probe_samples
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.step_caches import step_cache

from ..random_pipelines import make, run
from .run_worker import PROMPTS, SAMPLING, evaluate

STEPS = 6


class Toy(nn.Module):
    """A linear layer and attention: 7 tokens of 8 numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, fail=False):
        if fail:
            raise KeyError("failed")
        x = self.linear(x).view(1, 2, 7, 4)
        return F.scaled_dot_product_attention(x, x, x)


def probes_of(family, rows=range(1)):
    pipe = make(family)
    return Probes(
        pipe, lambda rows: run(pipe, family, [7 + i for i in rows], steps=STEPS), rows
    ), pipe


def test_cost_counts_products_and_attention_of_the_transformer_alone():
    pipe = types.SimpleNamespace(transformer=Toy())
    x = torch.randn(7, 8)

    def call():
        pipe.transformer(x)
        pipe.transformer(x)
        torch.ones(50, 50) @ torch.ones(50, 50)  # not the transformer's

    with torch.no_grad():
        attention = 2 * (2 * 2 * 7 * 7 * 4)  # two products, of two heads
        assert counted_cost(pipe, call) == 2 * (2 * 7 * 8 * 8 + attention)
        with pytest.raises(KeyError):
            counted_cost(pipe, lambda: pipe.transformer(x, fail=True))
    assert _get_current_dispatch_mode() is None
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_transformer_costs_what_it_costs_eagerly(wrap):
    pipe = types.SimpleNamespace(transformer=Toy())
    x = torch.randn(7, 8)
    with torch.no_grad():
        eager = counted_cost(pipe, lambda: pipe.transformer(x))
        pipe.transformer = wrap(pipe.transformer)
        assert counted_cost(pipe, lambda: pipe.transformer(x)) == eager > 0


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_a_wrapped_transformer_takes_the_same_caches(family):
    pipe = make(family)
    whys = [x.why_not(pipe) for x in CACHES.values()]
    cache = CACHES["taylorseer"].config(pipe, STEPS, 3.0)
    with step_cache(pipe, cache):
        expected = run(pipe, family, steps=STEPS)
    pipe.transformer = torch.compile(pipe.transformer)
    assert [x.why_not(pipe) for x in CACHES.values()] == whys
    with torch.compiler.set_stance("force_eager"), step_cache(pipe, cache):
        assert torch.equal(run(pipe, family, steps=STEPS), expected)


@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_found_that_costs_no_more_than_the_target(family, name):
    probes, pipe = probes_of(family)
    cache, before = CACHES[name], run(pipe, family, steps=STEPS)
    if cache.why_not(pipe) is not None:
        with pytest.raises(ValueError, match=cache.why_not(pipe)):
            match_cost(probes, cache, 0.8)
        return
    found = match_cost(probes, cache, 0.8)
    assert 0.6 < found.cost <= 0.8 * 1.02
    assert found.note is None
    counts = [counted_cost(pipe, lambda: run(pipe, family, (7,), steps=STEPS))]
    with step_cache(pipe, found.config):
        counts.append(counted_cost(pipe, lambda: run(pipe, family, (7,), steps=STEPS)))
        cached = run(pipe, family, steps=STEPS)
    assert counts[1] / counts[0] == pytest.approx(found.cost)
    assert not torch.equal(cached, before)
    assert torch.equal(run(pipe, family, steps=STEPS), before)
    if cache.calibrated:
        assert len(found.ratios) == STEPS
        assert found.config.mag_ratios.tolist() == pytest.approx(found.ratios)


def test_diffusers_broadcasts_attention_from_one_call_of_guidance_to_the_other():
    """The reason why PAB is refused for Wan; the refusal can go when this fails."""
    pipe = make("wan")
    config = CACHES["pab"].config(pipe, STEPS, 1001.0)
    config.spatial_attention_timestep_skip_range = (-1, 1001)
    ran, block = [], pipe.transformer.blocks[0].attn1
    processor = block.processor

    def counting(*args, **kwargs):
        ran.append(pipe.transformer._diffusers_hook)
        return processor(*args, **kwargs)

    with step_cache(pipe, config):
        block.processor = counting
        run(pipe, "wan", steps=STEPS, guidance=2.0)
        block.processor = processor
    assert len(ran) == STEPS  # of twice as many calls: the text's only


@pytest.fixture
def stairs(monkeypatch):
    """Probes whose cost is a function of stage and setting, in place of a model's."""
    monkeypatch.setattr(StepCache, "why_not", lambda *_: None)
    monkeypatch.setattr(
        StepCache, "config", lambda self, pipe, steps, value, **more: (more["stage"], value)
    )
    monkeypatch.setattr(
        "dit_accel.eval.runs.match.step_cache",
        lambda pipe, config: contextlib.nullcontext(config),
    )

    def made(of):
        pipe = types.SimpleNamespace(transformer=object())
        probes = Probes(pipe, lambda rows: None)
        probes._dense = [1], 20
        probes.asked = []

        def cost(on):
            with on() as config:
                probes.asked.append(config)
                return of(*config)

        probes.cost = cost
        return probes

    return made


def steps_down(stage, x):
    """1, then .9, .7, .5 at thresholds .1, .3, .6."""
    return 1.0 - sum(drop * (x >= at) for at, drop in ((0.1, 0.1), (0.3, 0.2), (0.6, 0.2)))


@pytest.mark.parametrize(
    ("target", "cost"), [(0.9, 0.9), (0.87, 0.7), (0.71, 0.7), (0.69, 0.7), (0.6, 0.5)]
)
def test_the_nearest_cost_below_the_target_is_found(stairs, target, cost):
    """.7 exceeds .69 by less than the slack."""
    probes = stairs(steps_down)
    assert match_cost(probes, CACHES["sea_cache"], target).cost == pytest.approx(cost)
    assert len(set(probes.asked)) == len(probes.asked) <= 10


def test_a_target_that_no_setting_reaches_is_noted(stairs):
    found = match_cost(stairs(steps_down), CACHES["sea_cache"], 0.4)
    assert found.cost == pytest.approx(0.5)
    assert "0.400" in found.note
    assert "0.500" in found.note


def test_a_target_close_to_dense_sampling_caches_nothing(stairs):
    found = match_cost(stairs(steps_down), CACHES["sea_cache"], 0.99)
    assert (found.value, found.cost) == (0.0, 1.0)


def test_the_next_stage_is_taken_where_one_does_not_suffice(stairs):
    """Stage n of TaylorSeer runs one step of n + 2 after `value` steps of 20."""

    def cost(stage, before):
        return (before + (20 - before) / (stage + 2)) / 20

    found = match_cost(stairs(cost), CACHES["taylorseer"], 0.5)
    assert found.stage == 1  # stage 0 costs .575 at least
    assert 0.49 <= found.cost <= 0.51
    assert found.value == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": 0.0}, r"target=0\.0.*\(0, 1\]"),
        ({"target": 1.5}, r"target=1\.5.*\(0, 1\]"),
    ],
)
def test_bad_targets_are_refused(stairs, changed, message):
    with pytest.raises(ValueError, match=message):
        match_cost(stairs(steps_down), CACHES["sea_cache"], **changed)


def test_a_transformer_without_flops_is_refused():
    pipe = types.SimpleNamespace(transformer=nn.Identity(), scheduler=None)
    with pytest.raises(RuntimeError, match=r"pipe.*FLOPs"):
        Probes(pipe, lambda rows: pipe.transformer(1)).cost()


def test_a_cache_on_stable_diffusion_3_leaves_no_trace():
    pipe = make("sd3")
    last, config = pipe.transformer.transformer_blocks[-1], diffusers.FirstBlockCacheConfig(0.1)
    with step_cache(pipe, config):
        assert pipe.transformer.is_cache_enabled
        with pytest.raises(ValueError, match=r"cache=FirstBlockCacheConfig.*disable_cache"):
            step_cache(pipe, config).__enter__()
    assert "forward" not in vars(last)
    assert not {"is_cache_enabled", "_cache_config", "_reset_stateful_cache"} & set(
        vars(pipe.transformer)
    )
    assert not pipe.transformer._forward_pre_hooks
    assert not pipe.transformer._forward_hooks


def chosen(pipe, names, folder=None, prompts=PROMPTS, **options):
    """Methods with settings, by name."""
    samples = plan_samples(prompts, SAMPLING, seed=3, count=1, layout="ids")
    ras = RASConfig(warmup=1, tail=1, resets=())
    steps = SAMPLING.num_inference_steps
    methods = [x.tried(pipe, steps) for x in read_methods(names, pipe, steps=steps, ras=ras)]
    return {x.name: x for x in choose_settings(methods, pipe, samples, folder=folder, **options)}


def test_found_settings_are_kept(wan, tmp_path, monkeypatch):
    names = ["sea_cache", "taylorseer", "first_block_cache:0.3", "ras"]
    rows = chosen(wan, names, tmp_path / "new")
    sea, fixed = rows["SeaCache"], rows["FirstBlockCache 0.3"]
    matched = sea.settings["matched"]
    assert (sea.tuned, sea.value, sea.cost) == (None, matched["value"], matched["cost"])
    assert sea.cache.threshold == sea.value
    assert f"threshold {sea.value:.4g}" in sea.settings["note"]
    assert f"{sea.cost:.3f}" in sea.settings["note"]
    assert fixed.cache.threshold == 0.3
    assert f"{fixed.cost:.3f}" in fixed.settings["note"]
    assert rows["TaylorSeer"].settings["cache"]["cache_interval"] >= 2
    assert 0.3 < matched["target"] < 1  # what region-adaptive sampling costs
    monkeypatch.setattr(rivals, "match_cost", lambda *_, **__: pytest.fail("searched again"))
    monkeypatch.setattr(rivals, "run_latents", lambda *_: pytest.fail("sampled again"))
    assert chosen(wan, names, tmp_path / "new") == rows
    assert (tmp_path / "new" / MATCHES).is_file()


def test_without_a_row_of_ours_the_target_is_the_usual_cost(wan):
    assert chosen(wan, ["sea_cache"])["SeaCache"].settings["matched"]["target"] == TARGET


def test_costs_are_counted_on_samples_that_are_not_compared():
    samples = plan_samples(PROMPTS, SAMPLING, seed=3, count=1, layout="ids")
    more = [PROMPTS[0], PromptRecord("c", "a cross")]
    probes = probe_samples(samples, more, 3)
    prompts = [x.record.prompt for x in probes]
    assert prompts[0] == "a cross"
    assert len(set(prompts)) == 3
    assert not set(prompts) & {x.prompt for x in PROMPTS}
    assert [x.seed for x in probes] == [5, 6, 7]
    assert {x.sampling for x in probes} == {samples[0].sampling}


def test_a_fine_run_is_a_second_reference(wan, tmp_path):
    results = evaluate(wan, tmp_path, methods=["fewer_steps:1", "ras"], repeats=1, fine_steps=5)
    assert results["fine"] == {"num_inference_steps": 5, "folder": "dense-5-steps"}
    rows = {x["name"]: x for x in results["rows"]}
    assert "Dense, 5 steps" not in rows
    assert set(rows["Dense"]["metrics"]) == {"psnr_fine", "ssim_fine", "flicker"}
    assert {"psnr", "psnr_fine", "ssim", "ssim_fine"} < set(rows["RAS"]["metrics"])
    assert rows["RAS"]["metrics"]["psnr"] != rows["RAS"]["metrics"]["psnr_fine"]
    table = (tmp_path / "table.md").read_text()
    assert "PSNR to fine run" in table
    assert "fine run of 5 steps" in table
    old = {k: x for k, x in read_results(tmp_path).items() if k != "fine"}  # an earlier version's
    validate(old)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fine_steps": 3}, "fine_steps=3.*more than 3"),
        ({"fine_steps": 0}, "fine_steps=0"),
        ({"fine_steps": 5, "metrics": ["flicker"]}, "fine_steps.*psnr"),
    ],
)
def test_a_bad_fine_run_is_refused(wan, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate(wan, tmp_path, methods=["ras"], **changed)
    assert not any(tmp_path.iterdir())
