"""Names of methods to ways to sample."""

import json
import types

import diffusers
import pytest
import torch

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import identity_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.runs.caches import CACHES
from dit_accel.eval.runs.methods import AT_EQUAL_TIME, DEFAULT, Method, dense_with, read_methods
from dit_accel.sampling.step_caches import step_cache

from ..random_pipelines import make


def read(names, pipe, **options):
    return read_methods(names, pipe, steps=10, **options)


@pytest.fixture(scope="module")
def wan():
    return make("wan")


@pytest.fixture(scope="module")
def sd3():
    return make("sd3")


def test_the_usual_methods_of_a_video_model(wan):
    methods = read(DEFAULT, wan)
    assert [x.kind for x in methods] == [
        "dense", "fewer_steps", "cache", "cache", "ras", "sla", "ras_sla",
    ]  # fmt: skip
    assert all(x.why is None for x in methods)
    assert [x.name for x in methods[2:]] == [
        "FirstBlockCache",
        "SeaCache",
        "RAS balanced",
        "SLA balanced",
        "RAS + SLA balanced",
    ]
    assert methods[-1].folder == "ras-sla-balanced"
    assert methods[2].tuned is CACHES["first_block_cache"]
    assert [x.value for x in methods[2:4]] == [None, None]
    assert methods[-1].sla == SLAConfig.load("balanced")


@pytest.mark.parametrize("family", ["lumina", "lumina2"])
def test_lumina_has_no_step_caches_in_diffusers(family):
    pipe = make(family)
    caches = read(list(CACHES), pipe)[1:]
    name = type(pipe.transformer).__name__
    assert [x.why for x in caches] == [f"not in diffusers for {name}"] * len(CACHES)
    config = diffusers.FirstBlockCacheConfig()
    with pytest.raises(ValueError, match=rf"cache=FirstBlockCacheConfig.*{name}"):
        step_cache(pipe, config).__enter__()


def test_caches_that_do_not_work_for_a_model_say_why(wan, sd3):
    whys = {x.name: x.why for x in read(list(CACHES), wan)[1:] if x.why}
    assert set(whys) == {"PAB", "FasterCache"}
    assert "one state for both calls of guidance" in whys["PAB"]
    assert "guidance in one batch" in whys["FasterCache"]
    assert [x.why for x in read(list(CACHES), sd3)[1:]] == [None] * len(CACHES)
    guided = CACHES["faster_cache"].why_not(sd3, 1.0)
    assert guided == "needs guidance, which guidance_scale=1.0 switches off"


def test_a_cache_that_this_diffusers_lacks_is_not_available(wan, monkeypatch):
    names = {x: getattr(diffusers, x) for x in ("FirstBlockCacheConfig", "__version__")}
    monkeypatch.setitem(__import__("sys").modules, "diffusers", types.SimpleNamespace(**names))
    first, sea = read(["first_block_cache", "sea_cache"], wan)[1:]
    assert first.why is None
    assert sea.why == f"not in diffusers {diffusers.__version__}"


def test_sea_cache_is_not_for_pictures_to_videos(wan, monkeypatch):
    monkeypatch.setattr(type(wan.transformer), "enable_cache", True)
    config = types.SimpleNamespace(in_channels=8, out_channels=4)
    pipe = types.SimpleNamespace(transformer=types.SimpleNamespace(enable_cache=1, config=config))
    first, sea = read(["first_block_cache", "sea_cache"], pipe)[1:]
    assert first.why is None
    assert "take a picture beside the noise" in sea.why


def test_settings_after_a_colon(wan, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sla:\n  topk: 0.5\nras:\n  ratio: 0.3\n")
    names = ["fewer_steps:8", "first_block_cache:0.2", "sea_cache:0.4", "ras:fast", "sla:quality"]
    names += [f"sla:{path}", "ras_sla:fast+quality", "ras_sla:fast", f"ras_sla:{path}"]
    found = {x.name: x for x in read(names, wan)}
    assert found["Dense, 8 steps"].num_inference_steps == 8
    assert found["FirstBlockCache 0.2"].value == 0.2
    assert found["SeaCache 0.4"].value == 0.4
    fast = RASConfig.load("fast")
    assert found["RAS fast"].ras == fast
    assert found["SLA quality"].sla.topk == 0.4
    assert found["SLA mine"].sla.topk == 0.5
    both = found["RAS fast + SLA quality"]
    assert (both.ras, both.sla.topk) == (fast, 0.4)
    both = found["RAS + SLA fast"]
    assert (both.ras, both.sla.topk) == (fast, 0.15)
    both = found["RAS + SLA mine"]
    assert (both.ras.ratio, both.sla.topk) == (0.3, 0.5)


def test_settings_of_the_caller_hold_where_a_name_gives_none(wan):
    config = SLAConfig(topk=0.3)
    names = ["sla", "sla:fast", "ras_sla"]
    own, fast, both = read(names, wan, sla=config, ras="paper", crossover="never")[1:]
    assert (own.name, own.sla.topk, own.sla.crossover) == ("SLA", 0.3, "never")
    assert (fast.sla.topk, fast.sla.crossover) == (0.15, "never")
    assert both.name == "RAS paper + SLA"
    assert config.crossover == "auto"


def test_an_sla_checkpoint_keeps_its_weights_under_another_crossover(wan):
    config = SLAConfig(combine="proj")
    base = identity_of(wan.transformer)
    shapes = {f"{x.name}.proj_l.weight": (x.head_dim, x.head_dim) for x in base.layers}
    shapes |= {f"{x.name}.proj_l.bias": (x.head_dim,) for x in base.layers}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    checkpoint = SLACheckpoint(config=config, base=base, weights=weights)
    [_, method] = read(["sla"], wan, sla=checkpoint, crossover="never")
    assert method.name == "SLA with its weights"
    assert method.sla.weights is checkpoint.weights
    assert method.sla.config.crossover == "never"


def test_dense_methods_have_the_name_of_their_steps(wan):
    assert read(["dense", "fewer_steps:7", "fewer_steps"], wan)[1:] == [
        dense_with(7),
        AT_EQUAL_TIME,
    ]
    assert (dense_with(7).name, dense_with(1).name) == ("Dense, 7 steps", "Dense, 1 step")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["slaa"], "methods.*'slaa'.*fewer_steps"),
        (["dense:3"], "methods.*'dense:3'"),
        (["sla:fats"], "'fats'.*'fast'"),
        (["sla:none"], "methods.*'sla:none'"),
        (["ras_sla:fast+none"], "methods.*'ras_sla:fast.none'"),
        (["ras:none"], "methods.*'ras:none'"),
        (["ras:papr"], "'papr'.*'paper'"),
        (["fewer_steps:0"], "methods.*'fewer_steps:0'"),
        (["fewer_steps:few"], "methods.*'fewer_steps:few'"),
        (["fewer_steps:10"], "methods.*10 steps.*num_inference_steps=10"),
        (["sea_cache:x"], "methods.*'sea_cache:x'.*threshold"),
        (["sea_cache:-1"], "methods.*'sea_cache:-1'.*threshold"),
        (["mag_cache:inf"], "methods.*'mag_cache:inf'.*threshold"),
        (["taylorseer:2.5"], "'taylorseer:2.5'.*disable_cache_before_step.*whole"),
        (["sla", "sla"], "methods.*'SLA balanced'.*twice"),
        (["fewer_steps:8", "fewer_steps:8"], "methods.*'Dense, 8 steps'.*twice"),
    ],
    ids=str,
)
def test_bad_names_are_refused(wan, names, message):
    with pytest.raises(ValueError, match=message):
        read(names, wan)


def test_folders_are_plain_whatever_the_name():
    assert Method(name="../Über: x/y", kind="sla").folder == "ber-x-y"
    assert Method(name="...", kind="sla").folder not in ("", ".", "..")
    assert json.dumps(dense_with(9).folder) == '"dense-9-steps"'
