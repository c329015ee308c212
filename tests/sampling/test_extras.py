"""Changes to a pipeline: schedulers by name, LoRA weights, compiled blocks."""

import re

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_accel import SparseWanPipeline
from dit_accel.files import asset
from dit_accel.models import Family, family_of
from dit_accel.sampling.extras import check_extras, prepare, scheduler_class
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.outline import read_outline

from .. import random_pipelines

FLOW = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)
NOISY = ("FlowMatchLCMScheduler", "SASolverScheduler")


@pytest.fixture(scope="module")
def outline(wan_repository):
    return read_outline(wan_repository)


@pytest.fixture
def lora(wan_repository, tmp_path):
    """Return a function that writes LoRA weights for the tiny Wan."""

    def write(name="style.safetensors", rank=2):
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for i in range(3):
            for part in ("to_q", "to_v"):
                where = f"transformer.blocks.{i}.attn1.{part}"
                weights[f"{where}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
                weights[f"{where}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(weights, tmp_path / name)
        return tmp_path / name

    return write


def sample(pipe, steps):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a red circle moving right", height=32, width=32, num_frames=5, guidance_scale=2.0,
        num_inference_steps=steps, max_sequence_length=16, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return load_pipeline(asset("tiny-wan"), sla=None)


@pytest.fixture(scope="module")
def reference(trained):
    return sample(trained, 16)


def restored(monkeypatch, pipe):
    """Restore the scheduler of a pipeline at the end of the test."""
    monkeypatch.setitem(pipe.config, "scheduler", pipe.config["scheduler"])
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)


@pytest.mark.parametrize("name", [*FLOW, *NOISY])
def test_schedulers_follow_the_same_flow(name, reference, trained, monkeypatch):
    # Solvers differ in their error, which vanishes with many steps; a wrong flow or shift does not.
    pipe = trained
    restored(monkeypatch, pipe)
    done = prepare(pipe, check_extras(read_outline(asset("tiny-wan")), scheduler=name))
    assert done == {"scheduler": name}
    assert type(pipe.scheduler).__name__ == name
    if name in NOISY:
        assert np.isfinite(sample(pipe, 2)).all()
        return
    error = np.square(sample(pipe, 16) - reference).mean()
    assert error < 1e-3


@pytest.mark.parametrize("name", FLOW)
def test_an_image_model_changes_its_scheduler_too(name, sd3, monkeypatch):
    pipe = sd3
    restored(monkeypatch, pipe)
    prepare(pipe, check_extras(read_outline(asset("tiny-sd3")), scheduler=name))
    assert getattr(pipe.scheduler.config, "flow_shift", pipe.scheduler.config.get("shift")) == 3.0
    images = pipe(
        "a red circle", height=32, width=32, num_inference_steps=2, output_type="np"
    ).images
    assert np.isfinite(images).all()


@pytest.mark.parametrize(
    ("family", "accepted"),
    [
        (
            "lumina",
            {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"},
        ),
        (
            "lumina2",
            {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"},
        ),
    ],
)
def test_a_scheduler_takes_what_the_pipeline_passes(family, accepted, tmp_path):
    random_pipelines.make(family).save_pretrained(tmp_path)
    outline = read_outline(tmp_path)
    for name in (*FLOW, *NOISY):
        if name in accepted:
            assert scheduler_class(name, outline).__name__ == name
            continue
        with pytest.raises(ValueError, match=f"scheduler='{name}'"):
            scheduler_class(name, outline)


@pytest.mark.parametrize(
    "name",
    ["", "unipc", "UniPC", "DDIMScheduler", "EulerDiscreteScheduler", "HeliosScheduler", "SchedulerMixin",
     "DPMSolverMultistepInverseScheduler", "FlaxDDIMScheduler", "WanPipeline", "__doc__"],
)  # fmt: skip
def test_other_schedulers_are_refused_with_those_that_are_accepted(outline, name):
    with pytest.raises(ValueError, match=rf"scheduler='{name}'.*UniPCMultistepScheduler"):
        scheduler_class(name, outline)


def test_a_model_that_predicts_v_keeps_its_scheduler(tmp_path):
    random_pipelines.make("cogvideox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scheduler='UniPC.*CogVideoXPipeline.*None"):
        scheduler_class("UniPCMultistepScheduler", read_outline(tmp_path))


def test_a_misspelt_scheduler_gets_a_suggestion(outline):
    with pytest.raises(
        ValueError, match=r"scheduler='UniPcMultiStep.*mean 'UniPCMultistepScheduler'"
    ):
        scheduler_class("UniPcMultiStepScheduler", outline)


def test_every_accepted_scheduler_is_tested_here(outline):
    with pytest.raises(ValueError, match="scheduler='x'") as error:
        scheduler_class("x", outline)
    named = re.findall(r"\w+Scheduler", str(error.value))
    assert {x for x in named if hasattr(diffusers, x)} == {*FLOW, *NOISY}


def test_lora_weights_change_the_output_by_their_scale(wan_repository, outline, lora):
    path = lora()

    def output(*loras):
        pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=None)
        prepare(pipe, check_extras(outline, loras=loras))
        return sample(pipe, 2)

    plain = output()
    np.testing.assert_array_equal(output(f"{path}:0"), plain)
    whole = output(str(path))
    assert np.abs(whole - plain).max() > 1e-3
    np.testing.assert_array_equal(output(f"{path}:1.0"), whole)
    np.testing.assert_array_equal(output(str(path.parent)), whole)
    np.testing.assert_allclose(output(f"{path}:0.5", f"{path}:5e-1"), whole, atol=1e-5)


def test_what_was_put_on_is_returned(wan_repository, outline, lora):
    path = lora()
    pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=None)
    done = prepare(pipe, check_extras(outline, loras=[f"{path}:0.25", str(path)]))
    assert done == {
        "lora": [{"source": str(path), "scale": 0.25}, {"source": str(path), "scale": 1.0}]
    }
    assert prepare(pipe, check_extras(outline)) == {}


def test_a_folder_holds_one_file_or_one_of_the_usual_name(outline, lora, tmp_path):
    (tmp_path / "many").mkdir()
    with pytest.raises(ValueError, match=r"lora=.*many"):
        check_extras(outline, loras=[str(tmp_path / "many")])
    lora("many/a.safetensors")
    lora("many/b.safetensors")
    with pytest.raises(ValueError, match=r"lora=.*many.*a\.safetensors, b\.safetensors"):
        check_extras(outline, loras=[str(tmp_path / "many")])
    usual = lora("many/pytorch_lora_weights.safetensors")
    assert check_extras(outline, loras=[str(tmp_path / "many")]).loras[0].source == str(usual)
    colon = lora("odd:0.5")  # a file of that name comes before a scale
    with pytest.raises(ValueError, match=r"lora=.*safetensors"):
        check_extras(outline, loras=[str(colon)])


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello"),
        ("pickle.bin", b"hello"),
        ("other.safetensors", {"blocks.0.weight": torch.zeros(2)}),
        ("none.safetensors", {}),
        ("text_encoder.safetensors", {"text_encoder.a.lora_A.weight": torch.zeros(2, 2)}),
    ],
)
def test_files_that_hold_no_lora_of_the_transformer_are_refused(outline, tmp_path, name, weights):
    path = tmp_path / name
    path.write_bytes(weights) if isinstance(weights, bytes) else save_file(weights, path)
    with pytest.raises(ValueError, match=f"lora='{path}'"):
        check_extras(outline, loras=[str(path)])


def test_families_without_lora_are_refused(tmp_path, lora):
    random_pipelines.make("lumina").save_pretrained(tmp_path / "lumina")
    outline = read_outline(tmp_path / "lumina")
    with pytest.raises(ValueError, match=r"lora=.*LuminaPipeline"):
        check_extras(outline, loras=[str(lora())])


def test_the_repeated_blocks_are_compiled(wan_repository, outline, monkeypatch):
    pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=None)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    assert prepare(pipe, check_extras(outline, compile=True)) == {"compile": True}
    assert compiled == list(pipe.transformer.blocks)


@pytest.mark.parametrize("name", [*random_pipelines.FAMILIES, *random_pipelines.MORE])
def test_every_family_has_repeated_blocks(name):
    transformer = random_pipelines.make(name).transformer
    more = name in random_pipelines.MORE
    expected = (random_pipelines.more(name).blocks if more else random_pipelines.BLOCKS[name])(
        transformer
    )
    assert {id(x) for x in expected} <= {id(x) for x in family_of(transformer).blocks(transformer)}


def test_blocks_that_are_not_known_are_refused(outline, monkeypatch):
    monkeypatch.setattr(Family, "blocks_of", lambda *_: ())
    with pytest.raises(ValueError, match=r"compile=True: .*WanTransformer3DModel"):
        check_extras(outline, compile=True)


def test_compiling_on_a_cpu_needs_a_compiler(outline, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=True: .*no-such-compiler"):
        check_extras(outline, compile=True, device="cpu")
