"""Outline of a repository, compared with the pipeline that is loaded from it."""

import functools
import json
import shutil

import diffusers
import pytest

from dit_accel.files import EMBEDDED_MODELS, asset
from dit_accel.sampling.call import media_kind
from dit_accel.sampling.outline import read_outline
from dit_accel.sampling.settings import Sampling

from .. import random_pipelines, tiny_wan


@pytest.fixture(
    params=["wan", "i2v", "lumina", "lumina2", "sd3", *random_pipelines.MORE, *EMBEDDED_MODELS]
)
def saved(request, tmp_path):
    """A repository and its diffusers pipeline."""
    if request.param.startswith("tiny"):
        model = asset(request.param)
        return model, diffusers.DiffusionPipeline.from_pretrained(model)
    if request.param == "i2v":
        pipe = diffusers.WanImageToVideoPipeline(**tiny_wan.random_wan(image_to_video=True))
    else:
        pipe = random_pipelines.make(request.param)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model", pipe


SIZES = [
    {"height": h, "width": w, "num_frames": n}
    for h in (None, 8, 24, 32, 50)
    for w in (None, 40)
    for n in (None, 1, 4, 5)
]


def problem(check, arguments):
    try:
        check(**{k: x for k, x in arguments.items() if x is not None})
    except ValueError as error:
        return str(error)
    return None


def test_it_accepts_what_the_loaded_pipeline_accepts(saved):
    model, pipe = saved
    outline = read_outline(model)
    assert outline.pipeline._parent == type(pipe).__name__
    assert outline.transformer_class is type(pipe.transformer)
    assert {x: getattr(pipe, x) for x in outline.facts} == outline.facts
    assert outline.makes_clips == (media_kind(pipe) == "clips")
    found = [problem(outline.check_sizes, x) for x in SIZES]
    loaded = functools.partial(outline.pipeline.check_sizes, pipe)
    assert found == [problem(loaded, x) for x in SIZES]
    assert None in found
    assert len(set(found)) > 2
    for key, value in pipe.transformer.config.items():
        if not key.startswith("_"):
            assert json.dumps(getattr(outline.transformer.config, key)) == json.dumps(value)


def test_values_that_a_configuration_leaves_out_are_the_defaults(wan_repository, tmp_path):
    model = shutil.copytree(wan_repository, tmp_path / "model")
    path = model / "vae" / "config.json"
    config = json.loads(path.read_text())
    for name in ("scale_factor_temporal", "scale_factor_spatial"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    assert read_outline(model).facts == read_outline(wan_repository).facts


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("text", [None, "{", ""])
def test_an_unreadable_configuration_is_refused_by_model_and_part(
    wan_repository, tmp_path, part, text
):
    model = shutil.copytree(wan_repository, tmp_path / "model")
    path = model / part / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=rf"^model='{model}'.*{part}"):
        read_outline(model)


@pytest.mark.parametrize("entry", [["diffusers", "NoSuchModel"], [None, None], None])
def test_a_part_of_an_unknown_class_is_refused(wan_repository, tmp_path, entry):
    model = shutil.copytree(wan_repository, tmp_path / "model")
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformer": entry}))
    with pytest.raises(ValueError, match="transformer="):
        read_outline(model)


def test_a_picture_belongs_to_image_to_video_models(tmp_path):
    parts = tiny_wan.random_wan(image_to_video=True)
    diffusers.WanImageToVideoPipeline(**parts).save_pretrained(tmp_path)
    outline, size = read_outline(tmp_path), {"height": 32, "width": 32, "num_frames": 5}
    outline.check(Sampling(image="x.png", **size))
    with pytest.raises(ValueError, match="image=None"):
        outline.check(Sampling(**size))
    with pytest.raises(ValueError, match=r"image='x\.png'"):
        read_outline(asset("tiny-wan")).check(Sampling(image="x.png"))


def test_text_is_limited_where_diffusers_limits_it():
    for name, most in (("tiny-sd3", 512), ("tiny-lumina2", 512), ("tiny-wan", 4096)):
        outline = read_outline(asset(name))
        outline.check(Sampling(max_sequence_length=most))
    with pytest.raises(ValueError, match="max_sequence_length=513"):
        read_outline(asset("tiny-sd3")).check(Sampling(max_sequence_length=513))


def test_lumina_makes_no_size_that_diffusers_refuses():
    outline = read_outline(asset("tiny-lumina2"))
    pipe = diffusers.Lumina2Pipeline.from_pretrained(asset("tiny-lumina2"))
    outline.check_sizes(height=48, width=32)
    with pytest.raises(ValueError, match=r"height=40.*16"):
        outline.check_sizes(height=40, width=32)
    with pytest.raises(ValueError, match="divisible by 16"):
        pipe("a red circle", height=40, width=32, num_inference_steps=1)
