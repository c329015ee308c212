"""Invariants of region-adaptive sampling for every family and scheduler."""

import contextlib
import copy
import gc
import math
import weakref

import pytest
import torch

import dit_accel
from dit_accel.ras import tile_selection
from dit_accel.ras.selection import band_score, tile_tokens
from dit_accel.runtime.install import installation_of, method_of

from ..random_pipelines import FAMILIES, grid_of, make, relative, run, state_of
from .reference import Reference

# Every family, and every scheduler.
PAIRS = [
    *((family, "euler") for family in FAMILIES),
    *(("wan", "unipc"), ("lumina", "dpm++"), ("sd3", "heun")),
]
every_pair = pytest.mark.parametrize(("family", "solver"), PAIRS)
every_family = pytest.mark.parametrize("family", FAMILIES)

# Few dense steps, so that ten steps show much of it.
SPARSE = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (6,), "kv_predictor": "linear"}
# Dense, partial and forecast steps.
MIXED = {"budget": 0.65, "ratio": 0.2, "warmup": 2, "tail": 1, "kv_predictor": "linear"}
FORECAST = {"budget": 0.6, "warmup": 2, "tail": 1}
SCHEDULES = {"partial": SPARSE, "mixed": MIXED, "forecast": FORECAST}
every_family_and_schedule = pytest.mark.parametrize(
    ("family", "ras"),
    [*((x, "mixed") for x in FAMILIES), ("sd3", "partial"), ("wan", "forecast")],
)


def engine(pipe):
    return method_of(pipe, "ras")


def masks(pipe, tokens):
    """Return the active tokens in each step of the last run, bool `[S, N]`."""
    ras = engine(pipe)
    members = tile_tokens(tokens, ras.plan.schedule.tile, torch.device("cpu"))
    result = {}
    for step, record in ras.steps.items():
        samples = 1 if record.tiles is None else len(record.tiles)
        mask = torch.full((samples, tokens), record.tiles is None)
        if record.tiles is not None:
            mask.scatter_(1, members[record.tiles].flatten(1), True)
        result[step] = mask
    return result


@every_pair
@pytest.mark.combines("ras partial")
def test_ratio_one_equals_plain(family, solver):
    pipe = make(family, solver)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras={"ratio": 1.0, "warmup": 1, "tail": 1, "resets": []})
    assert relative(run(pipe, family), plain) < 1e-6
    calls = [not step.dense_calls for step in dit_accel.summary(pipe).ras.steps]
    assert calls == [False, *[True] * (len(calls) - 2), False]


def pipe_summary(pipe):
    return dit_accel.summary(pipe, strict=True)


@every_pair
@pytest.mark.parametrize(
    ("ras", "predictor"),
    [(SPARSE, "linear"), (SPARSE, "hold"), (MIXED, "linear")],
    ids=["partial-linear", "partial-hold", "mixed-linear"],
)
@pytest.mark.combines("ras partial")
def test_equals_the_reference_without_gathering(family, solver, predictor, ras):
    pipe = make(family, solver)
    tokens = math.prod(grid_of(family))
    ras = {**ras, "predictor": predictor, "kv_predictor": predictor, "correction": 0}
    dit_accel.enable(pipe, ras=ras)
    latents = run(pipe, family, prompts=(0, 1))
    chosen = masks(pipe, tokens)
    assert any(not mask.all() for mask in chosen.values())
    dit_accel.disable(pipe)
    linear = predictor == "linear"
    Reference(pipe, chosen, linear=linear, linear_kv=linear)
    assert relative(run(pipe, family, prompts=(0, 1)), latents) < 2e-5


@pytest.mark.parametrize(
    ("family", "solver", "selection"),
    [
        *((*pair, "error") for pair in PAIRS),
        *((family, "euler", "std") for family in ("wan", "sd3", "lumina2")),
        *(("wan", "unipc", "age"), ("sd3", "euler", "random")),
    ],
)
@pytest.mark.combines("ras partial", "batch > 1")
def test_a_batch_of_two_equals_two_batches_of_one(family, solver, selection, monkeypatch):
    pipe = make(family, solver)
    plain = run(pipe, family, (0, 1))
    own = max(relative(run(pipe, family, (i,))[0], plain[i]) for i in (0, 1))
    dit_accel.enable(pipe, ras={**SPARSE, "selection": selection})
    gaps = []

    def noting(metric, count, high_ratio):
        # How far apart the scores of the last chosen and the first rejected tile are.
        ordered = metric.sort(dim=1).values
        gaps.append((ordered[:, count] - ordered[:, count - 1]).tolist())
        return band_score(metric, count, high_ratio)

    monkeypatch.setattr(tile_selection, "band_score", noting)
    both = run(pipe, family, (0, 1))
    tiles = {step: x.tiles for step, x in engine(pipe).steps.items() if x.tiles is not None}
    clear = dict(zip(tiles, gaps, strict=True)) if selection == "std" else None
    for i in (0, 1):
        one = run(pipe, family, (i,))[0]
        for step, expected in tiles.items():
            if clear is not None and clear[step][i] <= 1e-5:
                break  # a tie may fall either way, and what follows is another run
            torch.testing.assert_close(expected[i], engine(pipe).steps[step].tiles[0])
        else:
            assert relative(one, both[i]) < max(10 * own, 1e-6)


@pytest.mark.parametrize(
    ("family", "solver", "ras"),
    [
        *((*pair, "mixed") for pair in PAIRS),
        *(("sd3", "euler", "partial"), ("wan", "unipc", "forecast")),
    ],
)
def test_interrupting_and_running_again_equals_a_fresh_run(family, solver, ras):
    pipe = make(family, solver)
    dit_accel.enable(pipe, ras=SCHEDULES[ras])
    fresh = run(pipe, family)

    class Stop(Exception):
        pass

    def stop_at(wanted):
        def callback(pipe, step, timestep, kwargs):
            if step == wanted:
                raise Stop
            return kwargs

        return callback

    for step in (0, 5):
        with pytest.raises(Stop):
            run(pipe, family, prompts=(1,), callback_on_step_end=stop_at(step))
        torch.testing.assert_close(run(pipe, family), fresh, rtol=0, atol=0)


@every_pair
def test_scheduler_object_and_config_stay(family, solver):
    pipe = make(family, solver)
    before, config = pipe.scheduler, dict(pipe.scheduler.config)
    step = type(before).step
    dit_accel.enable(pipe, ras=SPARSE)
    run(pipe, family)
    assert pipe.scheduler is before
    assert dict(before.config) == config
    assert before.step.__func__ is step


@every_family
def test_disable_restores_every_module(family):
    pipe = make(family)
    plain = run(pipe, family)
    before = state_of(pipe.transformer)
    dit_accel.enable(pipe, ras=SPARSE)
    run(pipe, family)
    dit_accel.disable(pipe)
    after = state_of(pipe.transformer)
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert old.keys() == after[name].keys()
        assert all(old[k] is after[name][k] or old[k] == after[name][k] for k in old)
    torch.testing.assert_close(run(pipe, family), plain, rtol=0, atol=0)


def buffers(pipe):
    """Return weak references to all cached keys of the current run."""
    return [
        weakref.ref(k.last.data)
        for context in installation_of(pipe).clock.run.contexts.values()
        if context.states.get("ras") is not None
        for k, _ in context.states["ras"].kv.values()
    ]


@pytest.mark.parametrize(
    ("family", "ras"),
    [*((x, MIXED) for x in FAMILIES), ("sd3", SPARSE)],
    ids=[*FAMILIES, "sd3-partial"],
)
@pytest.mark.parametrize("how", ["end", "interrupt", "disable"])
def test_memory_returns(family, how, ras):
    pipe = make(family)
    dit_accel.enable(pipe, ras=ras)
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.extend(buffers(pipe))
        if step == 4 and how != "end":
            raise KeyboardInterrupt
        return kwargs

    gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            run(pipe, family, callback_on_step_end=look)
        if how == "disable":
            dit_accel.disable(pipe)
        assert seen
        assert not [x for x in seen if x() is not None]
    finally:
        gc.enable()


@every_family
def test_two_pipelines_do_not_touch_each_other(family):
    first, second = make(family), make(family)
    plain = run(second, family)
    dit_accel.enable(first, ras=SPARSE)
    alone = run(first, family)
    results = []

    def between(pipe, step, timestep, kwargs):
        if step == 5:
            results.append(run(second, family))
        return kwargs

    torch.testing.assert_close(
        run(first, family, callback_on_step_end=between), alone, rtol=0, atol=0
    )
    for result in results:
        torch.testing.assert_close(result, plain, rtol=0, atol=0)
    assert not dit_accel.summary(second).enabled


@every_family_and_schedule
def test_a_deep_copy_works_and_is_its_own(family, ras):
    pipe = make(family)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras=SCHEDULES[ras])
    accelerated = run(pipe, family)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(run(twin, family), accelerated, rtol=0, atol=0)
    assert dit_accel.summary(twin).ras.ras_steps > 0
    dit_accel.disable(twin)
    torch.testing.assert_close(run(twin, family), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "enable_first"),
    [*((x, False) for x in FAMILIES), ("wan", True), ("lumina2", True)],
)
@pytest.mark.combines("ras partial", "model offload")
def test_offload_before_and_after_enable(family, enable_first):
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = make(family)
    dit_accel.enable(pipe, ras=SPARSE)
    expected = run(pipe, family)
    if not enable_first:
        dit_accel.disable(pipe)
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    if not enable_first:
        dit_accel.enable(pipe, ras=SPARSE)
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family), expected, rtol=0, atol=0)
        assert pipe_summary(pipe).ras.ras_steps > 0
    remove_hook_from_module(pipe.transformer)
    torch.testing.assert_close(run(pipe, family), expected, rtol=0, atol=0)


@every_family
@pytest.mark.parametrize("size", [(160, 272), (176, 112)], ids=str)
def test_every_token_is_filled_on_odd_and_non_square_grids(family, size):
    height, width = size
    pipe = make(family)
    dit_accel.enable(pipe, ras={**SPARSE, "kv_predictor": "hold", "predictor": "hold"})
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: seen.append(out[0].clone()))
    latents = run(pipe, family, height=height, width=width)
    hook.remove()
    assert torch.isfinite(latents).all()
    grid = engine(pipe).plan.key[1]
    assert grid[1:] == (height // 16, width // 16)
    # Output of an untouched token would be the buffer's zeros, equal over all steps.
    for out in seen:
        cells = out[0].float().unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).abs().sum((-1, -3))
        assert (cells.sum(0) > 0).all()
    report = pipe_summary(pipe).ras
    assert all(step.tokens == grid[0] * grid[1] * grid[2] for step in report.steps)


@every_family_and_schedule
def test_changing_the_size_between_calls_works(family, ras):
    pipe = make(family)
    dit_accel.enable(pipe, ras=SCHEDULES[ras])
    small = run(pipe, family)
    large = run(pipe, family, height=208, width=240)
    torch.testing.assert_close(run(pipe, family), small, rtol=0, atol=0)
    torch.testing.assert_close(run(pipe, family, height=208, width=240), large, rtol=0, atol=0)
    steps = run(pipe, family, steps=7)
    assert torch.isfinite(steps).all()
    assert len(pipe_summary(pipe).ras.steps) == 7
