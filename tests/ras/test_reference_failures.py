"""Errors of the published code of the paper, one test for each."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.config import RASConfig
from dit_accel.ras.schedule import plan_steps
from dit_accel.ras.tile_selection import TileSelection
from dit_accel.runtime.install import method_of

from ..random_pipelines import FAMILIES, embeddings, make, relative, run

SPARSE = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (6,)}


def never_updated(config, steps=21):
    """Return how many of 256 tokens with a constant metric are never updated in a run without dense steps."""
    plan = plan_steps(config, steps, 256)
    plan = type(plan)(tiles=(plan.tiles[-1],) * steps, tile=plan.tile, num_tiles=plan.num_tiles)
    selection = TileSelection(config, plan, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    steady = torch.rand(1, plan.num_tiles, generator=generator)
    seen = torch.zeros(plan.num_tiles, dtype=torch.bool)
    for step in range(steps):
        noise = 0.05 * torch.rand(1, plan.num_tiles, generator=generator)
        selection.begin_step(step, steady + noise)
        seen[selection.tiles[0]] = True
    return int((~seen).sum())


def test_01_starvation_prevention_has_the_right_sign():
    common = {
        "ratio": 0.5,
        "region": "token",
        "tail": 0,
        "resets": (),
        "warmup": 1,
        "n_levels": None,
    }
    without = RASConfig(**common, selection="std", max_age=None, starvation_scale=0)
    paper = RASConfig(**common, selection="std", max_age=None)
    assert never_updated(without) > 75
    assert never_updated(paper) == 0  # 75 of 256 there, 128 at scale 1
    assert (
        never_updated(RASConfig(**common, selection="std", max_age=None, starvation_scale=1.0)) == 0
    )
    for selection in ("error", "age", "std", "l2norm", "random"):
        assert never_updated(RASConfig(**common, selection=selection)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_02_non_square_pictures_have_no_token_of_zero_noise(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=SPARSE)
    zeros = []
    pipe.transformer.register_forward_hook(lambda m, a, out: zeros.append((out[0] == 0).sum()))
    run(pipe, family, height=128, width=320)
    assert sum(zeros) == 0
    assert dit_accel.summary(pipe, strict=True).ras.ras_steps == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_03_batches_work_and_each_sample_has_its_own_selection(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras={**SPARSE, "selection": "std"})
    run(pipe, family, (0, 1))
    chosen = [x.tiles for x in method_of(pipe, "ras").steps.values() if x.tiles is not None]
    halves = 1 if family in ("wan", "lumina2") else 2
    assert all(len(tiles) == 2 * halves for tiles in chosen)
    assert all(torch.equal(tiles[:2], tiles[-2:]) for tiles in chosen)
    assert any((tiles[0] != tiles[1]).any() for tiles in chosen)


def test_04_an_interrupted_run_leaves_no_state():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    fresh = run(pipe, "sd3")

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 6
        return kwargs

    run(pipe, "sd3", callback_on_step_end=stop)
    assert len(dit_accel.summary(pipe).ras.steps) == 7
    torch.testing.assert_close(run(pipe, "sd3"), fresh, rtol=0, atol=0)


@pytest.mark.parametrize(
    "ras",
    [
        {"resets": (12, 22)},
        {"resets": ()},
        {"ratio": 0.9},
        {"ratio": [(0, 0.9), (0.5, 0.4)]},
        {"ratio": 0.01},
    ],
    ids=str,
)
def test_05_resets_past_the_end_none_at_all_and_any_ratio(ras):
    pipe = make("sd3")
    dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 2, **ras})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.isfinite(run(pipe, "sd3", steps=14)).all()
    assert ["resets: " in str(x.message) and "22" in str(x.message) for x in seen] == [True] * (
        22 in ras.get("resets", ())
    )
    assert dit_accel.summary(pipe, strict=True).ras.ras_steps > 0


@pytest.mark.parametrize("steps", [1, 5, 9, 33])
def test_06_any_number_of_steps_and_any_size_after_enable(steps):
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reset 6 of a shorter run
        run(pipe, "sd3", steps=steps, height=224, width=160)
    report = dit_accel.summary(pipe).ras
    assert len(report.steps) == steps
    assert {step.tokens for step in report.steps} == {14 * 10}


def test_07_runs_that_begin_late_and_videos_work():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    pipe.scheduler.set_timesteps(16)
    pipe.scheduler.set_begin_index(6)
    text = embeddings("sd3", [0])
    latents = torch.randn(1, 16, 22, 26)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[6:]:
            velocity = pipe.transformer(
                hidden_states=latents,
                timestep=t.expand(1),
                encoder_hidden_states=text["prompt_embeds"],
                pooled_projections=text["pooled_prompt_embeds"],
                return_dict=False,
            )[0]
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    dense = [s.step for s in dit_accel.summary(pipe, strict=True).ras.steps if s.mode == "dense"]
    assert dense == [0, 1, 6, 9]
    video = make("wan")
    dit_accel.enable(video, ras=SPARSE)
    assert run(video, "wan").ndim == 5


def test_08_sd35_caches_the_keys_of_its_second_attention_too():
    pipe = make("sd35")
    dit_accel.enable(pipe, ras=SPARSE)
    lengths = {}

    def look(name):
        store = method_of(pipe, "ras").stores.by_layer[name]
        return lambda module, args, out: lengths.setdefault(name, set()).add(
            None if store.index is None else store.index.numel()
        )

    names = [f"transformer_blocks.{i}.attn2" for i in (0, 1)]
    for name in names:
        pipe.transformer.get_submodule(name).register_forward_hook(look(name))
    run(pipe, "sd35")
    assert lengths == {name: {None, 2 * 48} for name in names}


def test_09_attention_arguments_reach_the_blocks():
    """The published code drops joint_attention_kwargs. See test_features for ControlNet and skip-layer guidance."""
    from peft import LoraConfig

    pipe = make("sd3")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    weak = {"joint_attention_kwargs": {"scale": 0.1}}
    plain = run(pipe, "sd3", **weak)
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    assert relative(run(pipe, "sd3", **weak), plain) < 1e-6
    assert relative(run(pipe, "sd3"), plain) > 1e-4


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_10_every_step_has_its_own_selection_of_whole_tiles(high_ratio, ratio):
    pipe = make("sd3")
    dit_accel.enable(
        pipe, ras={**SPARSE, "ratio": ratio, "selection": "std", "high_ratio": high_ratio}
    )
    run(pipe, "sd3")
    ras = method_of(pipe, "ras")
    chosen = [x for x in ras.steps.values() if x.tiles is not None]
    assert len(chosen) == 6
    assert len({id(x.tiles) for x in chosen}) == 6
    expected = max(1, round(ratio * 9), -(-9 // (ras.config.age_limit + 1)))
    assert {x.tiles.shape[1] for x in chosen} == {expected}
    assert {x.active for x in chosen} == {min(143, expected * 16)}


def test_11_nothing_is_global():
    first, second = make("sd3"), make("lumina")
    dit_accel.enable(first, ras=SPARSE)
    dit_accel.enable(second, ras="paper")
    a, b = run(first, "sd3"), run(second, "lumina")
    dit_accel.disable(second)
    torch.testing.assert_close(run(first, "sd3"), a, rtol=0, atol=0)
    dit_accel.enable(second, ras="paper")
    torch.testing.assert_close(run(second, "lumina"), b, rtol=0, atol=0)


class HostReads(TorchDispatchMode):
    """Mode that counts device syncs: reads of numbers, and sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        self.count += any(name in func.name() for name in waits)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("selection", ["error", "age", "std", "random"])
@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
def test_12_the_loop_waits_for_no_device(family, selection):
    """Kinds of graphs are tested in tests/compile."""
    reads = []
    for ras in (None, {**SPARSE, "selection": selection, "kv_predictor": "linear"}):
        pipe = make(family)
        if ras is not None:
            dit_accel.enable(pipe, ras=ras)
        with HostReads() as mode:
            run(pipe, family)
        reads.append(mode.count)
    assert reads[1] <= reads[0]


@pytest.mark.parametrize("family", ["lumina", "lumina2"])
def test_13_text_masks_are_kept(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=SPARSE)
    both = run(pipe, family, (0, 4))  # 5 and 9 of 12 text tokens
    for i, prompt in enumerate((0, 4)):
        assert relative(run(pipe, family, (prompt,))[0], both[i]) < 1e-5


def test_14_keys_rotated_with_another_table_are_not_used():
    pipe = make("lumina")
    call = {"scaling_watershed": 0.4, "height": 208, "width": 272}
    plain = run(pipe, "lumina", **call)
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    assert relative(run(pipe, "lumina", **call), plain) < 1e-6
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras=SPARSE)
    run(pipe, "lumina", **call)
    steps = dit_accel.summary(pipe, strict=True).ras.steps
    stale = [s.step for s in steps if "first call of a context" in s.dense_calls]
    assert len(stale) == 1
