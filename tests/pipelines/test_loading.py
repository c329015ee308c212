"""Loading of sparse pipelines: settings in a repository, single files, constructors, AutoPipelines."""

import inspect
import json
import pickle

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dit_accel
from dit_accel import (
    RASConfig,
    SparseLumina2Pipeline,
    SparseStableDiffusion3Pipeline,
    SparseWanImageToVideoPipeline,
    SparseWanPipeline,
)
from dit_accel.checkpoint.ras_file import read_ras

from ..checkpoint.test_save_load import absent
from ..random_pipelines import embeddings, make, relative, run
from ..tiny_wan import random_wan

CLASSES = {
    "wan": SparseWanPipeline,
    "sd3": SparseStableDiffusion3Pipeline,
    "lumina": dit_accel.SparseLuminaPipeline,
    "lumina2": dit_accel.SparseLumina2Pipeline,
    "flux": dit_accel.SparseFluxPipeline,
    "qwenimage": dit_accel.SparseQwenImagePipeline,
}
each_family = pytest.mark.parametrize("family", CLASSES)
SLA = {"topk": 0.4, "block_q": 16, "block_k": 16, "crossover": "never"}
RAS = {"ratio": [[0, 0.5], [0.6, 0.25]], "warmup": 2, "tail": 1, "resets": [], "max_age": None}


def load(family, folder, **arguments):
    pipe = CLASSES[family].from_pretrained(folder, **absent(family), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ras_of(pipe):
    ras = dit_accel.summary(pipe).ras
    return None if ras is None else RASConfig.from_dict(ras.config)


def topk_of(pipe):
    return dit_accel.summary(pipe).config.get("topk")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Save repositories with plain diffusers."""
    folders = {}
    for family in CLASSES:
        folders[family] = tmp_path_factory.mktemp(family) / "plain"
        make(family).save_pretrained(folders[family])
    return folders


# What a repository keeps


@each_family
@pytest.mark.parametrize("sla", [None, SLA], ids=["ras", "both"])
def test_settings_come_back_and_give_the_same_output(family, sla, plain, tmp_path):
    pipe = load(family, plain[family], sla=sla, ras=RAS)
    expected = run(pipe, family, steps=6)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(family, tmp_path / "saved", **({} if sla else {"sla": None}))
    assert ras_of(again) == RASConfig(**RAS)
    assert topk_of(again) == topk_of(pipe)
    assert torch.equal(run(again, family, steps=6), expected)
    assert again.summary(strict=True).ras.ras_steps == 3
    vanilla = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", **absent(family))
    assert type(vanilla) is getattr(diffusers, CLASSES[family]._parent)
    vanilla.set_progress_bar_config(disable=True)
    # Weights from files lie at other addresses, and products then round otherwise.
    assert relative(run(vanilla, family, steps=2), run(make(family), family, steps=2)) < 1e-6


def test_explicit_settings_win_over_those_of_the_repository(plain, tmp_path):
    load("wan", plain["wan"], sla=SLA, ras=RAS).save_pretrained(tmp_path)
    for ras, expected in (("fast", RASConfig.load("fast")), ({"ratio": 0.75}, RASConfig(ratio=0.75)),
                          (None, None), ("none", None)):  # fmt: skip
        assert ras_of(load("wan", tmp_path, ras=ras)) == expected
    for sla, expected in (("fast", 0.15), ({"topk": 0.6}, 0.6), (None, None), ("none", None)):
        pipe = load("wan", tmp_path, sla=sla)
        assert topk_of(pipe) == expected
        assert ras_of(pipe) == RASConfig(**RAS)
    assert not load("wan", tmp_path, sla=None, ras=None).summary().enabled


@pytest.mark.parametrize("file", ["ras.json", "sla.safetensors"])
def test_damaged_settings_are_refused_before_weights_are_read(file, plain, tmp_path, monkeypatch):
    load("wan", plain["wan"], sla=SLA, ras=RAS).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"{")
    assert load("wan", tmp_path, **{file[:3]: None}).summary().enabled

    def must_not_load(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "from_pretrained", must_not_load)
    with pytest.raises(ValueError, match=file):
        load("wan", tmp_path)


@pytest.mark.parametrize(("file", "off"), [("ras.json", "ras"), ("sla.safetensors", "sla")])
def test_a_folder_with_settings_of_a_method_that_is_off_is_left_as_it_is(
    file, off, plain, tmp_path
):
    load("wan", plain["wan"], sla=SLA, ras=RAS).save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    pipe = load("wan", plain["wan"], **{"sla": {"topk": 0.9}, "ras": "fast"} | {off: None})
    with pytest.raises(ValueError, match=rf"save_directory=.*{file}"):
        pipe.save_pretrained(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_settings_that_are_on_replace_those_in_the_folder(plain, tmp_path):
    load("wan", plain["wan"], sla=None, ras=RAS).save_pretrained(tmp_path)
    load("wan", plain["wan"], sla=None, ras="fast").save_pretrained(tmp_path)
    assert read_ras(tmp_path / "ras.json") == RASConfig.load("fast")
    assert not (tmp_path / "sla.safetensors").exists()


def test_without_ras_there_is_no_file(plain, tmp_path):
    load("wan", plain["wan"], sla=SLA).save_pretrained(tmp_path)
    assert not (tmp_path / "ras.json").exists()
    assert ras_of(load("wan", tmp_path)) is None


@pytest.mark.parametrize("given", [{}, {"ras": None}, {"sla": "fast", "ras": "fast"}], ids=str)
def test_repositories_on_the_hub_keep_them_too(given, plain, tmp_path, monkeypatch):
    """Each settings file is read only if the caller passed no settings for its method."""
    load("wan", plain["wan"], sla=SLA, ras=RAS).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, file_name, **hub):
        asked.append((repo_id, file_name, hub))
        return str(tmp_path / file_name)

    cls, local = diffusers.DiffusionPipeline, diffusers.DiffusionPipeline.from_pretrained.__func__
    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    index = json.loads((tmp_path / "model_index.json").read_text())
    monkeypatch.setattr(cls, "load_config", classmethod(lambda cls, source, **hub: dict(index)))

    def from_pretrained(cls, source, **kwargs):
        assert source == "org/model"
        kwargs.pop("revision")
        return local(cls, tmp_path, **kwargs)

    monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
    # The keyword of the test's own from_pretrained; diffusers' code has it as a constant.
    monkeypatch.setattr("dit_accel.pipelines.base.check_keywords", lambda *args, **kwargs: None)
    pipe = load("wan", "org/model", revision="v1", **given)
    expected = {"sla": "sla.safetensors", "ras": "ras.json"}
    assert asked == [("org/model", expected[x], {"revision": "v1"}) for x in expected if x not in given]  # fmt: skip
    assert topk_of(pipe) == (0.15 if "sla" in given else 0.4)
    assert (ras_of(pipe) is None) == ("ras" in given and given["ras"] is None)


# Embedded models


@pytest.mark.parametrize(
    ("name", "cls", "other"),
    [("tiny-wan", SparseWanPipeline, SparseStableDiffusion3Pipeline),
     ("tiny-sd3", SparseStableDiffusion3Pipeline, SparseWanPipeline),
     ("tiny-lumina2", SparseLumina2Pipeline, SparseStableDiffusion3Pipeline)],
)  # fmt: skip
def test_embedded_models_load_by_name_without_the_hub(name, cls, other, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise AssertionError("the hub was asked")

    for place in ("dit_accel.checkpoint.save_load.hf_hub_download", "diffusers.configuration_utils.hf_hub_download"):  # fmt: skip
        monkeypatch.setattr(place, no_network)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", no_network)
    assert cls.from_pretrained(name).summary().enabled
    with pytest.raises(ValueError, match=cls._parent):
        other.from_pretrained(name)
    (tmp_path / name).mkdir()  # results of an evaluation, say
    monkeypatch.chdir(tmp_path)
    assert cls.from_pretrained(name).summary().enabled
    (tmp_path / name / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="pretrained_model_name_or_path='tiny"):
        cls.from_pretrained(name)


# Single files


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """`single_file(**arguments)`: a pipeline from a file that only names the model, with all components given."""
    path = tmp_path_factory.mktemp("file") / "sd3.safetensors"
    folder = path.parent / "repository"
    key = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    save_file({key: torch.zeros(9216)}, path)
    make("sd3").save_pretrained(folder)

    def load(pipe=None, **arguments):
        return SparseStableDiffusion3Pipeline.from_single_file(
            path,
            config=str(folder),
            local_files_only=True,
            **(pipe or make("sd3")).components,
            **arguments,
        )

    return load


def test_single_files_are_accelerated_as_repositories_are(single_file):
    assert topk_of(single_file()) == 0.25
    assert ras_of(single_file()) is None
    assert topk_of(single_file(sla="fast")) == 0.15
    pipe = single_file(sla={"topk": 0.6}, ras="fast")
    assert (topk_of(pipe), ras_of(pipe)) == (0.6, RASConfig.load("fast"))
    pipe = single_file(sla=None, ras=RAS)
    assert (topk_of(pipe), ras_of(pipe)) == (None, RASConfig(**RAS))
    for off in (None, "none"):
        assert not single_file(sla=off).summary().enabled
    assert type(pipe) is SparseStableDiffusion3Pipeline


def test_components_that_are_accelerated_already_stay_so_unless_settings_are_given(single_file):
    shared = single_file(sla={"topk": 0.6}, ras="fast")
    again = single_file(shared)
    assert (topk_of(again), ras_of(again)) == (0.6, RASConfig.load("fast"))
    again = single_file(shared, sla="fast")
    assert (topk_of(shared), ras_of(shared)) == (0.15, RASConfig.load("fast"))


@pytest.mark.parametrize("family", ["wan", "lumina", "lumina2", "qwenimage"])
def test_parents_without_single_files_say_so(family):
    with pytest.raises(NotImplementedError, match=CLASSES[family]._parent):
        CLASSES[family].from_single_file("model.safetensors", sla="fast")


# Constructors


@each_family
def test_constructors_take_settings_and_are_dense_without(family):
    cls = CLASSES[family]
    assert not cls(**make(family).components).summary().enabled
    assert not cls(**make(family).components, sla="none", ras=None).summary().enabled
    pipe = cls(**make(family).components, sla=SLA, ras="fast")
    assert (topk_of(pipe), ras_of(pipe)) == (0.4, RASConfig.load("fast"))
    with pytest.raises(ValueError, match="sla='fats'"):
        cls(**make(family).components, sla="fats")
    with pytest.raises(TypeError, match="slaa"):
        cls(**make(family).components, slaa="fast")
    assert set(pipe.components) == set(make(family).components)


def test_image_to_video_has_the_same_constructor():
    pipe = SparseWanImageToVideoPipeline(**random_wan(image_to_video=True), sla=SLA)
    assert topk_of(pipe) == 0.4
    parent = inspect.signature(diffusers.WanImageToVideoPipeline).parameters
    assert [*inspect.signature(SparseWanImageToVideoPipeline).parameters] == [*parent, "sla", "ras"]


# Names, and AutoPipelines


@each_family
def test_classes_are_found_by_the_name_of_their_parent_and_pickled_by_their_own(family):
    cls = CLASSES[family]
    assert cls.__name__ == cls._parent
    assert repr(cls).endswith(f".{cls.__qualname__}'>")
    assert cls.__qualname__.startswith("Sparse")
    assert pickle.loads(pickle.dumps(cls)) is cls

    pipe = cls.from_pipe(make(family))
    assert repr(pipe).startswith(f"{cls.__qualname__} {{")

    class Own(cls):
        pass

    index = json.loads(Own.from_pipe(make(family)).to_json_string())
    assert index["_class_name"] == cls._parent


AUTO = [
    ("sd3", "Text2Image", "StableDiffusion3Pipeline"),
    ("sd3", "Image2Image", "StableDiffusion3Img2ImgPipeline"),
    ("sd3", "Inpainting", "StableDiffusion3InpaintPipeline"),
    ("lumina", "Text2Image", "LuminaPipeline"),
    ("lumina2", "Text2Image", "Lumina2Pipeline"),
    ("flux", "Text2Image", "FluxPipeline"),
    ("flux", "Image2Image", "FluxImg2ImgPipeline"),
    ("flux", "Inpainting", "FluxInpaintPipeline"),
    ("qwenimage", "Text2Image", "QwenImagePipeline"),
    ("qwenimage", "Image2Image", "QwenImageImg2ImgPipeline"),
    ("qwenimage", "Inpainting", "QwenImageInpaintPipeline"),
]


@pytest.mark.parametrize(("family", "task", "expected"), AUTO)
def test_auto_pipelines_take_sparse_pipelines_and_share_the_transformer(family, task, expected):
    pipe = CLASSES[family].from_pipe(make(family), sla=SLA, ras="fast")
    auto = getattr(diffusers, f"AutoPipelineFor{task}").from_pipe(pipe)
    assert type(auto) is getattr(diffusers, expected)
    assert auto.transformer is pipe.transformer
    assert (topk_of(auto), ras_of(auto)) == (0.4, RASConfig.load("fast"))
    assert type(CLASSES[family].from_pipe(auto)) is CLASSES[family]


def test_an_auto_pipeline_runs_sparse():
    pipe = SparseStableDiffusion3Pipeline.from_pipe(make("sd3"), sla={**SLA, "dense_steps": 0})
    auto = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    auto.set_progress_bar_config(disable=True)
    negative = {f"negative_{name}": x for name, x in embeddings("sd3", [-3]).items()}
    auto(
        image=Image.new("RGB", (128, 128), (200, 30, 30)),
        height=128,
        width=128,
        strength=0.5,
        num_inference_steps=4,
        output_type="latent",
        **embeddings("sd3", [0]),
        **negative,
    )
    assert dit_accel.summary(auto, strict=True).sparse_calls
