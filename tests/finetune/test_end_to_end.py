"""Whole runs through the real parts, on a random tiny Wan: from prompts to a result that loads."""

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import dit_accel
from dit_accel import SparseWanPipeline
from dit_accel.checkpoint.file import read_checkpoint
from dit_accel.finetune.checkpoints import checkpoints
from dit_accel.finetune.log import read_log
from dit_accel.finetune.stop import Interrupted
from dit_accel.sampling.image_files import read_image
from dit_accel.sampling.load import load_pipeline

from .faults import begin_child, end_child, in_child, in_children, kill

for needed in ("config", "families", "objectives", "data.open", "regression", "annealing"):
    pytest.importorskip(f"dit_accel.finetune.{needed}")
FinetuneConfig = pytest.importorskip("dit_accel.finetune.config").FinetuneConfig
finetune = pytest.importorskip("dit_accel.finetune.trainer").finetune

SPARSE = {
    "combine": "proj",
    "topk": 0.2,
    "block_q": 32,
    "block_k": 32,
    "crossover": "never",
    "dense_layers": 1,
    "dense_steps": 0,
}


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    """Drawing takes longer than these runs; one test looks at the curves."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("dit_accel.finetune.finish.draw_curves", lambda log, picture: picture)


@pytest.fixture(scope="module")
def settings(wan_repository, tmp_path_factory):
    """Settings of a short run; the teacher's samples are made once and then precomputed data."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moving right\na blue square moving up\na green circle\n")
    base = FinetuneConfig(
        pretrained_model_name_or_path=str(wan_repository),
        output_dir=str(folder / "first"),
        prompts=str(prompts),
        num_teacher_samples=6,
        teacher_num_inference_steps=2,
        height=64,
        width=64,
        num_frames=9,
        max_sequence_length=16,
        sla=SPARSE,
        stages=("distillation",),
        max_train_steps=1,
        report_to="none",
        device="cpu",
    )
    finetune(base, progress=False)
    return dataclasses.replace(
        base,
        prompts=None,
        num_teacher_samples=None,
        teacher_num_inference_steps=None,
        height=None,
        width=None,
        num_frames=None,
        max_sequence_length=None,
        precomputed_dir=str(folder / "first/teacher-samples"),
        max_train_steps=4,
        checkpointing_steps=2,
        train_batch_size=2,
        learning_rate=1e-3,
        use_ema=True,
        ema_decay=0.5,
    )


def run(settings, folder, **changed):
    """A run in a folder; the folder."""
    config = dataclasses.replace(settings, output_dir=str(folder), **changed)
    return finetune(config, progress=False)


def result_of(folder):
    """All tensors of a result, for a comparison bit for bit."""
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("transformer/*.safetensors")]
    return {f"{x.name}/{k}": t for x in files for k, t in load_file(x).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def losses(folder):
    records = read_log(Path(folder) / "log.jsonl")
    return [x["loss"] for x in records if x["stage"] == "distillation" and "loss" in x]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """`whole(train)`: the folder of an uninterrupted run, made once for each way of training. Tests only read it."""
    folders = {}

    def make(train):
        if train not in folders:
            folders[train] = run(settings, tmp_path_factory.mktemp(train) / "run", **TRAIN[train])
        return folders[train]

    return make


REGRESSION = {"stages": ("regression", "distillation"), "regression_steps": 3}
TRAIN = {
    "sla": {"train": "sla", **REGRESSION},
    "router": {"train": "sla", "router": "learned", **REGRESSION},
    "lora": {"train": "lora", "rank": 2, "gradient_checkpointing": True},
    "all": {"train": "all", "loss": "mix"},
}


def test_curves_and_card(settings, tmp_path):
    folder = run(settings, tmp_path / "run", train="sla", max_train_steps=2)
    assert read_image(folder / "curves.png").std() > 10
    assert "![Training curves](curves.png)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("train", TRAIN)
def test_run(whole, wan_repository, call, train):
    folder = whole(train)
    names = {x.name for x in folder.iterdir()}
    assert {
        "README.md",
        "log.jsonl",
        "sla.safetensors",
        "training_config.json",
    } <= names
    steps = [step for step, _ in checkpoints(folder)]
    assert steps == ([0, 2, 4] if "stages" in TRAIN[train] else [2, 4])
    records = [x for x in read_log(folder / "log.jsonl") if x["stage"] == "distillation"]
    assert [x["step"] for x in records] == [1, 2, 3, 4]
    fitted = [x for x in read_log(folder / "log.jsonl") if "error/after" in x]
    assert len(fitted) == ("stages" in TRAIN[train])
    assert all(x["error/after"] > 0 and x["error/before"] > 0 for x in fitted)
    for record in records:
        assert record["density"] == pytest.approx(1 / 3)  # 2 of 6 blocks
        assert record["tokens_per_second"] > 0
        assert all(x > 0 for name, x in record.items() if name.startswith("update/"))
    more = {}
    if train == "all":
        from diffusers import WanTransformer3DModel

        more["transformer"] = WanTransformer3DModel.from_pretrained(folder / "transformer")
    pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=folder, **more)
    if train == "lora":
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**call()).frames.isfinite().all()
    assert dit_accel.summary(pipe).density == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("train", ["router", "lora", "all"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(settings, whole, tmp_path, train):
    expected = whole(train)

    def killed():
        from dit_accel.finetune.loop import Loop

        step = Loop._step

        def until_third(self, index):
            return kill() if index == 3 else step(self, index)

        Loop._step = until_third
        run(settings, tmp_path / "killed", **TRAIN[train])

    assert in_child(killed) == ("killed", signal.SIGKILL)
    assert not (tmp_path / "killed/sla.safetensors").exists()
    resumed = run(settings, tmp_path / "killed", **TRAIN[train], resume_from_checkpoint="latest")
    assert_same(result_of(expected), result_of(resumed))
    assert losses(expected) == losses(resumed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda x: x.name)
def test_run_that_ends_in_the_regression_begins_it_again_with_the_same_result(
    settings, whole, tmp_path, number
):
    expected = whole("sla")

    def ended():
        from dit_accel.finetune.regression import _Fit

        gradients = _Fit.gradients

        def until_second(self, step, weights):
            if step == 1:
                os.kill(os.getpid(), number)
            return gradients(self, step, weights)

        _Fit.gradients = until_second
        run(settings, tmp_path / "ended", **TRAIN["sla"])

    killed = number == signal.SIGKILL
    assert in_child(ended) == (("killed", number) if killed else ("exited", 0))
    assert checkpoints(tmp_path / "ended") == []
    resumed = run(settings, tmp_path / "ended", **TRAIN["sla"], resume_from_checkpoint="latest")
    assert_same(result_of(expected), result_of(resumed))
    first, second = (read_log(x / "log.jsonl") for x in (expected, resumed))
    assert [(x["stage"], x["step"], x.get("loss")) for x in first] == [
        (x["stage"], x["step"], x.get("loss")) for x in second
    ]


def test_signal_while_samples_of_prompts_are_made(settings, tmp_path):
    options = {
        "precomputed_dir": None,
        "prompts": "demo",
        "num_teacher_samples": 3,
        "teacher_num_inference_steps": 1,
        **{"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
        **{"train_batch_size": 1, "max_train_steps": 1, "sla": SPARSE | {"block_q": 16, "block_k": 16}},
    }  # fmt: skip

    def ended():
        from dit_accel.finetune.data import from_prompts

        made = from_prompts.run_latents

        def with_signal(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return made(*arguments)

        from_prompts.run_latents = with_signal
        run(settings, tmp_path, **options)

    assert in_child(ended) == ("exited", 0)
    [shard] = (tmp_path / "teacher-samples").glob("*.safetensors")
    before = shard.read_bytes()
    run(settings, tmp_path, **options)
    assert shard.read_bytes() == before
    assert len(losses(tmp_path)) == 1


def test_validation(settings, whole, tmp_path):
    options = {
        "validation_prompts": "a red circle moving right",
        "validation_steps": 3,
        "validation_num_inference_steps": 1,
        **TRAIN["sla"],
    }
    folder = run(settings, tmp_path / "run", **options)
    found = [x for x in read_log(folder / "log.jsonl") if "validation/psnr" in x]
    assert [(x["stage"], x["step"]) for x in found] == [
        ("regression", 0), ("distillation", 0), ("distillation", 3), ("distillation", 4),
    ]  # fmt: skip
    assert all(0 < x["validation/latent_error"] < 2 for x in found)
    assert "| before training |" in (folder / "README.md").read_text()
    assert_same(result_of(folder), result_of(whole("sla")))  # looking changes nothing


@pytest.mark.parametrize("combine", ["alpha", "shared_softmax"])
def test_other_combinations(settings, tmp_path, combine):
    folder = run(
        settings, tmp_path, sla=SPARSE | {"combine": combine}, train="all", max_train_steps=2
    )
    assert len(losses(folder)) == 2


def test_annealing(settings, tmp_path):
    folder = run(settings, tmp_path, train="sla", topk_start=1.0, anneal_steps=3)
    records = [x for x in read_log(folder / "log.jsonl") if "topk" in x]
    assert records[0]["density"] == 1.0
    assert records[-1]["density"] == pytest.approx(1 / 3)
    stored = read_checkpoint(folder / "sla.safetensors")
    assert stored.config.topk == 0.2


def test_bf16(settings, tmp_path):
    options = {"train": "lora", "max_train_steps": 2, "loss": "diffusion"}
    whole = run(settings, tmp_path / "fp32", **options)
    half = run(settings, tmp_path / "bf16", **options, mixed_precision="bf16")
    assert losses(half) == pytest.approx(losses(whole), rel=0.02)
    assert losses(half) != losses(whole)
    assert all(x.dtype == torch.float32 for x in result_of(half).values())


def test_tensorboard(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"validation_prompts": "a red circle", "validation_num_inference_steps": 1}
    folder = run(
        settings, tmp_path, train="sla", max_train_steps=2, report_to="tensorboard", **options
    )
    events = EventAccumulator(str(folder / "logs/dit-accel-finetune"))
    events.Reload()
    found = [x.value for x in events.Scalars("distillation/loss")]
    assert found == pytest.approx(losses(folder))
    assert [x.step for x in events.Images("distillation/validation")] == [0, 2]


@pytest.mark.parametrize(
    ("model", "prompts", "precision", "frames"),
    [
        ("tiny-wan", "demo", "no", 9),
        ("tiny-sd3", "demo-images", "bf16", None),
        ("tiny-lumina2", "demo-images", "no", None),
    ],
)
def test_embedded_models(tmp_path, model, prompts, precision, frames):
    config = FinetuneConfig(
        pretrained_model_name_or_path=model,
        output_dir=str(tmp_path / "run"),
        prompts=prompts,
        num_frames=frames,
        num_teacher_samples=2,
        teacher_num_inference_steps=1,
        sla=SPARSE | {"block_q": 16, "block_k": 16, "combine": "alpha"},
        train="all",
        stages=("distillation",),
        max_train_steps=1,
        mixed_precision=precision,
        validation_prompts="a red circle",
        validation_num_inference_steps=1,
        report_to="none",
        device="cpu",
    )
    folder = finetune(config, progress=False)
    pipe = load_pipeline(model, sla=str(folder), device="cpu")
    assert dit_accel.summary(pipe).enabled
    assert len(losses(folder)) == 1


# Refusals ---------------------------------------------------------------------------------------------


def test_folder_of_another_run_is_refused(settings, tmp_path):
    run(settings, tmp_path, train="sla", max_train_steps=2)
    with pytest.raises(ValueError, match=r"output_dir=.*checkpoint-2.*'latest'"):
        run(settings, tmp_path, train="sla")
    with pytest.raises(ValueError, match=r"^learning_rate="):
        run(settings, tmp_path, train="sla", learning_rate=5e-3, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=r"^train_batch_size=1, gradient_accumulation_steps=1, .*: 1 samples"
    ):
        run(settings, tmp_path, train="sla", train_batch_size=1, resume_from_checkpoint="latest")
    other = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    run(settings, tmp_path, train="sla", **other, resume_from_checkpoint="latest")
    assert len(losses(tmp_path)) == 4


def test_dense_by_mistake(settings, tmp_path):
    with pytest.raises(RuntimeError, match=r"sla: no layer ran sparse .*crossover='auto'"):
        run(settings, tmp_path, train="all", sla=SPARSE | {"crossover": "auto"})


# Processes --------------------------------------------------------------------------------------------


def test_two_processes(settings, tmp_path):
    one = run(settings, tmp_path / "one", train_batch_size=4, train="all", **REGRESSION)
    common = {"train_batch_size": 2, "train": "all", **REGRESSION}
    configs = [
        dataclasses.replace(settings, output_dir=str(tmp_path / "ddp"), **common),
        dataclasses.replace(
            settings,
            output_dir=str(tmp_path / "fsdp"),
            fsdp=True,
            validation_prompts="a red circle:::a blue square",
            validation_steps=100,
            validation_num_inference_steps=1,
            **common,
        ),
    ]
    found = in_children(lambda: [str(finetune(x, progress=False)) for x in configs], 2)
    assert found == [("returned", [x.output_dir for x in configs])] * 2
    for kind in ("ddp", "fsdp"):
        assert losses(tmp_path / kind) == pytest.approx(losses(one), rel=1e-5), kind
        for name, x in result_of(one).items():
            torch.testing.assert_close(result_of(tmp_path / kind)[name], x, rtol=1e-4, atol=2e-5)
    found = [x for x in read_log(tmp_path / "fsdp/log.jsonl") if "validation/psnr" in x]
    assert [x["step"] for x in found] == [0, 0, 4]


def test_sigterm_saves_and_exits_with_0_and_nobody_else_may_train_there(settings, tmp_path):
    folder = tmp_path / "run"
    endless = dataclasses.replace(
        settings,
        output_dir=str(folder),
        train="sla",
        max_train_steps=100_000,
        checkpointing_steps=100_000,
    )
    process, outcome = begin_child(lambda: finetune(endless, progress=False))
    try:
        deadline = time.monotonic() + 120
        while not _steps(folder):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"output_dir=.*process {process} "):
            run(endless, folder)
        os.kill(process, signal.SIGTERM)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        ended = end_child(process, outcome)
    assert ended == ("exited", 0)
    [(step, _)] = checkpoints(folder)
    assert step == len(losses(folder))
    run(endless, folder, max_train_steps=step + 1, resume_from_checkpoint="latest")
    assert len(losses(folder)) == step + 1


def test_the_message_of_a_signal_does_not_stand_behind_the_bar(
    settings, tmp_path, monkeypatch, capsys
):
    with tqdm(total=2) as bar:

        def train(*_):
            bar.update()
            raise Interrupted("SIGTERM", tmp_path / "checkpoint-1")

        monkeypatch.setattr("dit_accel.finetune.trainer._train", train)
        with pytest.raises(Interrupted):
            run(settings, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert any(x.strip().startswith("stopped by SIGTERM") for x in lines), lines


def _steps(folder):
    with contextlib.suppress(OSError, ValueError):
        return losses(folder)
    return []
