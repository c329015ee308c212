"""Arguments of the loading functions are checked before files are read."""

import inspect
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin

import dit_accel
from dit_accel import SparseStableDiffusion3Pipeline, SparseWanPipeline
from dit_accel.pipelines.arguments import DTYPES, check_keywords, with_dtypes

from ..random_pipelines import make

PIPELINES = [getattr(dit_accel, name) for name in dit_accel.__all__ if name.startswith("Sparse")]
each_pipeline = pytest.mark.parametrize("cls", PIPELINES, ids=lambda x: x.__qualname__)

# There is no such folder or file: only a check that comes first can name something else.
LOADERS = {
    "from_pretrained": lambda **k: SparseWanPipeline.from_pretrained("/none", **k),
    "from_single_file": lambda **k: SparseStableDiffusion3Pipeline.from_single_file("/none", **k),
    "from_pipe": lambda **k: SparseWanPipeline.from_pipe(make("wan"), **k),
}
each_loader = pytest.mark.parametrize("loader", LOADERS)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("slaa", "sla"), ("raas", "ras"), ("SLA", None), ("dtyp", "dtype"), ("revison", "revision"),
     ("transfomer", "transformer"), ("num_inference_steps", None), ("device", None)],
)  # fmt: skip
@each_pipeline
def test_unknown_keywords_are_refused_with_a_suggestion(cls, wrong, meant):
    with pytest.raises(ValueError, match=rf"^{wrong}='x+…?'?.*keyword") as error:
        cls.from_pretrained("/none", **{wrong: "x"})
    if meant:
        assert f"{meant!r}" in str(error.value)


@each_loader
def test_each_loading_function_refuses_unknown_keywords(loader):
    # from_pipe gives them to the constructor, which refuses them.
    with pytest.raises((ValueError, TypeError), match="slaa"):
        LOADERS[loader](slaa="fast")


@each_loader
@pytest.mark.parametrize(
    ("argument", "value"),
    [("sla", "fats"), ("sla", "/no/such.yaml"), ("sla", 3), ("sla", {"topc": 1}), ("ras", "papre"),
     ("ras", {"ratio": 2}), ("ras", [])],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(unchecked, loader, argument, value):
    with pytest.raises(ValueError, match=r"topc|ratio=2|" + re.escape(f"{argument}={value!r}")):
        LOADERS[loader](**{argument: value})


@each_loader
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bf61", "auto", "int8", "BF16", "", 16, [torch.float16], {"vae": "half"}])  # fmt: skip
def test_bad_dtypes_are_refused(loader, argument, value):
    named = f"{argument}['vae']='half'" if isinstance(value, dict) else f"{argument}={value!r}"
    with pytest.raises(ValueError, match="^" + re.escape(named) + ".*bf16"):
        LOADERS[loader](**{argument: value})


def test_one_dtype_is_enough():
    with pytest.raises(ValueError, match="dtype='bf16', torch_dtype='fp16'"):
        with_dtypes({"dtype": "bf16", "torch_dtype": "fp16"})


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_what_diffusers_accepts_is_passed_on(argument):
    for value in (None, torch.float16, torch.float64, {"default": torch.float16, "vae": torch.float32}):  # fmt: skip
        assert with_dtypes({argument: value, "variant": "fp16"}) == {argument: value, "variant": "fp16"}  # fmt: skip
    mixed = {"default": "bf16", "vae": torch.float32}
    assert with_dtypes({argument: mixed})[argument] == {"default": torch.bfloat16, "vae": torch.float32}  # fmt: skip
    assert mixed["default"] == "bf16"  # the caller's dict is not changed


@pytest.mark.parametrize("name", DTYPES)
def test_names_of_dtypes_load_in_that_dtype(name, sparse_wan):
    expected = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name))  # fmt: skip
    pipe = sparse_wan(sla=None, dtype=name)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == expected
    assert SparseWanPipeline.from_pipe(pipe, sla=None, dtype=name).transformer.dtype == expected


@each_pipeline
def test_keywords_that_diffusers_reads_are_accepted(cls):
    """Keywords that from_pretrained of diffusers reads from **kwargs."""
    for loaders in (
        [DiffusionPipeline.from_pretrained],
        [FromSingleFileMixin.from_single_file, FromOriginalModelMixin.from_single_file],
    ):
        source = "".join(inspect.getsource(inspect.unwrap(x.__func__)) for x in loaders)
        names = re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source)
        assert {"dtype", "token", "revision"} <= set(names)
        components = inspect.signature(cls).parameters
        assert {"transformer", "vae", "scheduler"} <= set(components)
        check_keywords(cls, dict.fromkeys([*names, *components]), *loaders)
