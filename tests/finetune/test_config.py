"""`FinetuneConfig`: every field checked, contradictions refused, plain values and back."""

import dataclasses
import itertools
import json
import os
from types import SimpleNamespace

import pytest

from dit_accel.config.sla import ROUTERS
from dit_accel.finetune.checks import bucket_sizes
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.sampling.outline import read_outline

# A config comes from people, whose wrong types have to reach our own messages.
pytestmark = pytest.mark.usefixtures("unchecked")

NAN, INF = float("nan"), float("inf")
COUNT = [0, -1, 1.5, "2", True]
TEXT = ["", "  ", 3, True]
SHARE = [0, 1, -0.1, NAN, "half", True]
ABOVE_0 = [0, -1, NAN, INF, "1", True]
FLAG = ["yes", 1, 0, None]
CHOICE = ["other", "", None, 3]
BAD_VALUES = {
    "family": ["flux", "", 3],
    "pretrained_model_name_or_path": [*TEXT, None],
    "revision": TEXT,
    "variant": TEXT,
    "cache_dir": TEXT,
    "output_dir": [*TEXT, None],
    "sla": ["balanced", None, []],
    "router": CHOICE,
    "instance_data_dir": TEXT,
    "precomputed_dir": TEXT,
    "prompts": TEXT,
    "num_teacher_samples": COUNT,
    "teacher_num_inference_steps": COUNT,
    "teacher_guidance_scale": [-1, NAN, "2"],
    "caption_column": [*TEXT, None],
    "video_column": [*TEXT, None],
    "height": [*COUNT, 10**6],
    "width": [*COUNT, 10**6],
    "num_frames": [*COUNT, 10**6],
    "fps": [0, -1, NAN, "16"],
    "buckets": [
        "",
        "33,64",
        "33,64,64;",
        "33,64,64;33,64,64",
        "0,64,64",
        "a,b,c",
        "33,64,-64",
        3,
        "33,64,99999999",
    ],
    "max_sequence_length": [*COUNT, 10**6],
    "stages": [
        (),
        (1,),
        "regression",
        ("distillation", "regression"),
        ("a",),
        ("regression",) * 2,
        None,
    ],
    "regression_steps": [*COUNT, None],
    "regression_learning_rate": ABOVE_0,
    "regression_topk": [(0,), (1.5,), ("a",), 0.5, None, (True,)],
    "loss": CHOICE,
    "diffusion_weight": SHARE,
    "targets": CHOICE,
    "guidance_scale": [1, 0.5, -1, NAN, INF, "4"],
    "caption_dropout": SHARE,
    "weighting_scheme": CHOICE,
    "logit_mean": [NAN, INF, "0", None],
    "logit_std": ABOVE_0,
    "mode_scale": [-1, NAN, "1", None],
    "flow_shift": ABOVE_0,
    "train": CHOICE,
    "rank": [*COUNT, None],
    "lora_alpha": COUNT,
    "lora_layers": TEXT,
    "topk_start": [0, 1.5, NAN, "1"],
    "anneal_steps": COUNT,
    "train_batch_size": [*COUNT, None],
    "gradient_accumulation_steps": [*COUNT, None],
    "max_train_steps": [*COUNT, None],
    "learning_rate": [*ABOVE_0, None],
    "sla_learning_rate": ABOVE_0,
    "lr_scheduler": [*CHOICE, "piecewise_constant"],
    "lr_warmup_steps": [-1, 1.5, "2", None],
    "optimizer": CHOICE,
    "use_8bit_adam": FLAG,
    "adam_beta1": [1, -0.1, NAN, None],
    "adam_beta2": [1, -0.1, NAN, None],
    "adam_weight_decay": [-0.1, NAN, None],
    "adam_epsilon": [*ABOVE_0, None],
    "max_grad_norm": [-1, NAN, None],
    "mixed_precision": CHOICE,
    "gradient_checkpointing": FLAG,
    "use_ema": FLAG,
    "ema_decay": [*SHARE, None],
    "max_nonfinite": [-1, 1.5, None],
    "seed": [-1, 1.5, 2**63, None],
    "allow_tf32": FLAG,
    "device": [*TEXT, None],
    "fsdp": FLAG,
    "checkpointing_steps": [*COUNT, None],
    "checkpointing_minutes": ABOVE_0,
    "checkpoints_total_limit": COUNT,
    "resume_from_checkpoint": TEXT,
    "validation_prompts": TEXT,
    "validation_steps": COUNT,
    "num_validation_videos": [*COUNT, None],
    "validation_num_inference_steps": COUNT,
    "validation_guidance_scale": [-1, NAN, "2"],
    "report_to": [*CHOICE, "all"],
    "tracker_name": [*TEXT, None],
    "logging_dir": [*TEXT, None],
    "merge": FLAG,
    "push_to_hub": FLAG,
    "hub_model_id": TEXT,
    "hub_token": TEXT,
}
FULL = {
    "family": "wan",
    "pretrained_model_name_or_path": "owner/model",
    "revision": "main",
    "sla": {"topk": 0.05, "combine": "proj", "order": [2, 4, 8], "dense_layers": [0, -1]},
    "prompts": "demo",
    "num_teacher_samples": 8,
    "teacher_num_inference_steps": 3,
    "teacher_guidance_scale": 2,
    "buckets": "33,64,64; 17,96,64",
    "stages": ["regression", "distillation"],
    "regression_topk": [0.05, 0.1],
    "loss": "mix",
    "diffusion_weight": 0.3,
    "caption_dropout": 0.2,
    "train": "lora",
    "rank": 4,
    "lora_alpha": 8,
    "lora_layers": "to_q,to_v",
    "topk_start": 0.4,
    "anneal_steps": 100,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 5,
    "checkpointing_minutes": 15,
    "validation_prompts": "a:::b",
    "validation_steps": 50,
    "fps": 16,
    "merge": True,
    "push_to_hub": True,
    "hub_model_id": "owner/name",
    "hub_token": "hf_secret",
}


def test_every_field_has_bad_values_here():
    assert set(BAD_VALUES) == {x.name for x in dataclasses.fields(FinetuneConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_refused_by_field_name_and_accepted_values(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=") as error:
        FinetuneConfig(**{name: value})
    assert "\n" not in str(error.value)
    if name != "hub_token":
        assert repr(value) in str(error.value)


def test_every_field_is_documented():
    import ast
    import inspect

    body = ast.parse(inspect.getsource(FinetuneConfig)).body[0].body
    documented = set()
    for item, after in itertools.pairwise(body):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
            documented.add(item.target.id)
    assert documented == {x.name for x in dataclasses.fields(FinetuneConfig)}


def test_plain_values_and_back_without_secrets():
    config = FinetuneConfig.from_dict(FULL)
    values = json.loads(json.dumps(config.to_dict()))
    assert "hf_secret" not in json.dumps(values)
    assert "hf_secret" not in repr(config)
    assert FinetuneConfig.from_dict(values) == dataclasses.replace(config, hub_token=None)
    assert config.sizes == [(33, 64, 64), (17, 96, 64)]
    assert config.regression_topk == (0.05, 0.1)
    assert FinetuneConfig.from_dict(FinetuneConfig().to_dict()) == FinetuneConfig()


def test_fields_of_sparse_attention():
    default = FinetuneConfig().sla_config
    assert (default.topk, default.combine, default.crossover) == (0.1, "shared_softmax", "never")
    config = FinetuneConfig(sla={"topk": 0.05, "dense_layers": [0, -1]}).sla_config
    assert (config.topk, config.dense_layers, config.combine) == (
        0.05,
        (0, -1),
        "shared_softmax",
    )
    with pytest.raises(ValueError, match=r"^sla: unknown key 'topkk' \(did you mean 'topk'\?\)"):
        FinetuneConfig(sla={"topkk": 0.1})
    with pytest.raises(ValueError, match=r"^sla.topk=2: accepted: a fraction"):
        FinetuneConfig(sla={"topk": 2})


def test_the_router_is_an_option_of_its_own():
    with pytest.raises(ValueError, match=r"^sla.router='learned': accepted is router='learned'"):
        FinetuneConfig(sla={"router": "learned"})
    with pytest.raises(ValueError, match=r"^sla.router='mean': accepted without router='learned'"):
        FinetuneConfig(router="learned", sla={"router": "mean"})
    assert FinetuneConfig(sla={"router": "mean"}).sla_config.router == "mean"


@pytest.mark.skipif("learned" not in ROUTERS, reason="SLAConfig has no learned router")
def test_a_learned_router_is_written_into_sparse_attention():
    config = FinetuneConfig(router="learned", train="sla", sla={"combine": "none"})
    assert config.sla_config.router == "learned"
    assert config.has_sla_weights
    assert FinetuneConfig.from_dict(config.to_dict()) == config
    fixed = dataclasses.replace(config, router="fixed", train="all")
    assert fixed.sla_config.router == "spread"
    assert dataclasses.replace(fixed, router="learned", train="sla") == config


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"^unknown key 'learningrate' \(did you mean 'learning_rate'\?\)"
    ):
        FinetuneConfig.from_dict({"learningrate": 1e-4})


ALPHA = {"sla": {"combine": "alpha"}}
BOTH = {"stages": ("regression", "distillation")}
CONTRADICTIONS = [
    ({"train": "sla"}, "train='sla': nothing would train"),
    ({"train": "sla", "sla": {"combine": "none"}}, "train='sla': nothing would train"),
    (BOTH, "stages="),
    ({"regression_topk": (0.1,)}, "regression_topk=(0.1,)"),
    ({"train": "lora", "rank": 0}, "rank=0"),
    ({"lora_alpha": 8}, "lora_alpha=8: accepted with train='lora'"),
    (
        {"lora_layers": "to_q", "train": "sla", **ALPHA},
        "lora_layers='to_q': accepted with train='lora'",
    ),
    ({"sla_learning_rate": 1e-3}, "sla_learning_rate=0.001"),
    ({"targets": "guided", "guidance_scale": 4, "loss": "diffusion"}, "targets='guided'"),
    ({"targets": "guided", "guidance_scale": 4, "loss": "mix"}, "targets='guided'"),
    ({"targets": "guided"}, "guidance_scale=None: targets='guided' needs one"),
    ({"guidance_scale": 4}, "guidance_scale=4: accepted with targets='guided'"),
    ({"diffusion_weight": 0.5}, "diffusion_weight=0.5: accepted with loss='mix'"),
    ({"caption_dropout": 0.2, "targets": "conditional"}, "caption_dropout=0.2"),
    (
        {"instance_data_dir": "a", "precomputed_dir": "b"},
        "instance_data_dir='a', precomputed_dir='b'",
    ),
    ({"prompts": "demo", "precomputed_dir": "b"}, "precomputed_dir='b', prompts='demo'"),
    ({"num_teacher_samples": 3}, "num_teacher_samples=3: accepted with prompts"),
    ({"teacher_guidance_scale": 3.0, "precomputed_dir": "b"}, "teacher_guidance_scale=3.0"),
    ({"buckets": "33,64,64", "num_frames": 9}, "num_frames=9: accepted with buckets=None"),
    ({"height": 64}, "height=64, width=None: accepted are both or neither"),
    ({"precomputed_dir": "b", "buckets": "33,64,64"}, "buckets='33,64,64'"),
    ({"precomputed_dir": "b", "num_frames": 33}, "num_frames=33"),
    ({"prompts": "demo", "fps": 16}, "fps=16: accepted with instance_data_dir"),
    ({"topk_start": 0.5}, "topk_start=0.5, anneal_steps=None: accepted together"),
    ({"anneal_steps": 5}, "topk_start=None, anneal_steps=5: accepted together"),
    ({"topk_start": 0.1, "anneal_steps": 5}, "topk_start=0.1: accepted is a fraction above"),
    ({"topk_start": 0.5, "anneal_steps": 5000}, "anneal_steps=5000"),
    (
        {"topk_start": 0.5, "anneal_steps": 5, "stages": ("regression",), **ALPHA},
        "topk_start=0.5: accepted with the stage distillation",
    ),
    ({"merge": True, "train": "sla", **ALPHA}, "merge=True: train='sla'"),
    ({"lr_warmup_steps": 5}, "lr_warmup_steps=5: lr_scheduler='constant'"),
    ({"lr_warmup_steps": 5000, "lr_scheduler": "cosine"}, "lr_warmup_steps=5000"),
    ({"use_8bit_adam": True, "optimizer": "prodigy"}, "use_8bit_adam=True"),
    ({"fsdp": True, "train": "lora"}, "fsdp=True: train='lora'"),
    ({"fsdp": True, "train": "sla", **ALPHA}, "fsdp=True: train='sla'"),
    ({"fsdp": True, "use_8bit_adam": True}, "fsdp=True, use_8bit_adam=True"),
    ({"fsdp": True, "mixed_precision": "fp16"}, "fsdp=True, mixed_precision='fp16'"),
    ({"validation_steps": 5}, "validation_steps=5: accepted with validation_prompts"),
    ({"validation_guidance_scale": 5}, "validation_guidance_scale=5"),
    (
        {"push_to_hub": True, "report_to": "wandb", "hub_token": "hf_secret"},
        "hub_token, report_to='wandb'",
    ),
    ({"hub_model_id": "a/b"}, "hub_model_id='a/b': accepted with push_to_hub=True"),
    ({"hub_token": "hf_secret"}, "hub_token=...: accepted with push_to_hub=True"),
]


@pytest.mark.parametrize(("given", "begins"), CONTRADICTIONS, ids=lambda x: str(x)[:50])
def test_contradictions_are_refused(given, begins):
    with pytest.raises(ValueError, match=r"^\w+[=,]") as error:
        FinetuneConfig(**given)
    assert str(error.value).startswith(begins)
    assert "hf_secret" not in str(error.value)


def test_what_looks_like_a_contradiction_and_is_none():
    FinetuneConfig(train="sla", **ALPHA)
    FinetuneConfig(targets="guided", guidance_scale=4)
    FinetuneConfig(stages=("regression",), regression_topk=(0.1, 0.2), **ALPHA)
    FinetuneConfig(prompts="demo", validation_prompts="a", fps=24)
    FinetuneConfig(precomputed_dir="x", max_sequence_length=64)
    FinetuneConfig(push_to_hub=True, report_to="wandb")
    FinetuneConfig(sla={"top_p": 0.9, "topk": None})


@pytest.mark.parametrize(
    ("train", "precision", "dtype"),
    [
        ("all", "bf16", "fp32"),
        ("all", "no", "fp32"),
        ("lora", "bf16", "bf16"),
        ("sla", "fp16", "fp16"),
        ("lora", "no", "fp32"),
    ],
)
def test_the_dtype_that_weights_are_loaded_in(train, precision, dtype):
    assert FinetuneConfig(train=train, mixed_precision=precision, **ALPHA).weights_dtype == dtype


def test_sizes():
    assert FinetuneConfig().sizes == [(None, None, None)]
    assert FinetuneConfig(height=64, width=96).sizes == [(None, 64, 96)]
    assert bucket_sizes("33,64,64;1,128,128") == [(33, 64, 64), (1, 128, 128)]


# With a model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outlines():
    from dit_accel.files import asset

    return {name: read_outline(asset(name)) for name in ("tiny-wan", "tiny-sd3")}


def outline_of(parent, transformer_class, **config):
    """A stand-in for the outline of a model that is not at hand."""
    return SimpleNamespace(
        pipeline=SimpleNamespace(_parent=parent),
        transformer=SimpleNamespace(config=SimpleNamespace(**config)),
        transformer_class=transformer_class,
        transformer_2=None,
        expand_timesteps=False,
        check_sizes=lambda **_: None,
    )


def test_a_config_that_fits_its_model_passes(outlines, tmp_path):
    FinetuneConfig(prompts="demo", family="wan").check_early(outlines["tiny-wan"])
    FinetuneConfig(instance_data_dir=str(tmp_path), height=64, width=96).check_early(
        outlines["tiny-sd3"]
    )
    FinetuneConfig(prompts="smoke", buckets="33,64,64;17,96,64", train="lora").check_early(
        outlines["tiny-wan"]
    )
    FinetuneConfig(prompts="smoke", buckets="1,64,64;1,96,64").check_early(outlines["tiny-sd3"])


@pytest.mark.parametrize(
    ("model", "given", "begins"),
    [
        ("tiny-sd3", {"family": "wan"}, "family='wan': these settings are for another family"),
        ("tiny-wan", {"prompts": None}, "instance_data_dir=None, precomputed_dir=None, prompts=None: no data"),
        ("tiny-wan", {"prompts": "no-such.txt"}, "prompts='no-such.txt': no such file"),
        ("tiny-wan", {"prompts": None, "instance_data_dir": "nowhere"}, "instance_data_dir='nowhere': no such"),
        ("tiny-wan", {"prompts": None, "precomputed_dir": "nowhere"}, "precomputed_dir='nowhere': no such"),
        ("tiny-wan", {"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere': no such"),
        ("tiny-wan", {"height": 50, "width": 64}, "height=50: accepted are multiples of 16"),
        ("tiny-wan", {"num_frames": 10}, "num_frames=10: accepted is 2k+1"),
        ("tiny-wan", {"buckets": "33,64,64;10,64,64"}, "buckets='33,64,64;10,64,64': num_frames=10"),
        ("tiny-sd3", {"num_frames": 9}, "num_frames=9: this model makes images"),
        ("tiny-sd3", {"buckets": "9,64,64"}, "buckets='9,64,64': num_frames=9"),
        ("tiny-sd3", {"max_sequence_length": 600}, "max_sequence_length=600: "),
        ("tiny-wan", {"sla": {"dense_layers": 9}}, "sla.dense_layers=9"),
        ("tiny-wan", {"sla": {"topk_by_layer": {7: 0.1}}}, "sla.topk_by_layer=7"),
        ("tiny-wan", {"fsdp": True}, "fsdp=True: one process"),
        ("tiny-wan", {"output_dir": __file__}, f"output_dir={__file__!r}: is a file"),
    ],
)  # fmt: skip
def test_what_the_model_or_machine_does_not_accept_is_refused(
    model, given, begins, outlines, monkeypatch
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = FinetuneConfig(**{"prompts": "demo", "report_to": "none", **given})
    with pytest.raises(ValueError, match=r"^\w") as error:
        config.check_early(outlines[model])
    assert str(error.value).startswith(begins)
    assert "\n" not in str(error.value)


def test_a_dry_run_needs_neither_data_nor_processes(outlines):
    FinetuneConfig(fsdp=True).check_early(outlines["tiny-wan"], dry_run=True)


def test_processes_are_counted(outlines, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    FinetuneConfig(prompts="demo", fsdp=True).check_early(outlines["tiny-wan"])


def test_missing_packages_are_named_with_their_extra(outlines, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    for package, given in (
        ("peft", {"train": "lora"}),
        ("tensorboard", {"report_to": "tensorboard"}),
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("prodigyopt", {"optimizer": "prodigy"}),
        ("wandb", {"report_to": "wandb"}),
    ):
        monkeypatch.setattr(
            "dit_accel.finetune.model_checks.importlib.util.find_spec",
            lambda name, package=package: None if name == package else found("json"),
        )
        config = FinetuneConfig(**{"prompts": "demo", "report_to": "none", **given})
        with pytest.raises(ValueError, match=rf"needs the package {package} \(pip install"):
            config.check_early(outlines["tiny-wan"])


def test_models_without_adapters_or_checkpointing_are_named():
    from diffusers import LuminaNextDiT2DModel

    lumina = outline_of("LuminaPipeline", LuminaNextDiT2DModel, num_layers=3)
    FinetuneConfig(prompts="demo").check_early(lumina)
    for given, begins in (
        ({"train": "lora"}, "train='lora': LuminaNextDiT2DModel"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True: LuminaNextDiT2DModel"),
    ):
        with pytest.raises(ValueError, match=begins):
            FinetuneConfig(prompts="demo", **given).check_early(lumina)
    with pytest.raises(
        ValueError, match=r"holds a WanImageToVideoPipeline, which cannot be fine-tuned"
    ):
        FinetuneConfig(prompts="demo").check_early(outline_of("WanImageToVideoPipeline", None))
