"""Fixtures of every test: one quiet core, no network, and unwritten memory filled with NaN."""

import os

# Before numpy and torch load: they read these once.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    OPENBLAS_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
)

import functools
import gc
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile(
    "dit_accel", deadline=None, max_examples=30, derandomize="CI" in os.environ
)
settings.load_profile("dit_accel")


def pytest_collection_finish(session):
    # Modules stay: garbage collection need not walk through all of them again and again.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _nan_filled(empty):
    """`empty`, but its result is all NaN when code of dit_accel called it."""

    @functools.wraps(empty)
    def wrapper(*args, **kwargs):
        out = empty(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "dit_accel" and out.is_floating_point():
            out.detach().fill_(math.nan)
        return out

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory_is_nan():
    """An output that dit_accel allocates and forgets to write fails every comparison."""
    with torch.device(
        "meta"
    ):  # it notes once which functions make tensors: these, not our wrappers
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _nan_filled(getattr(owner, name)))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked():
    """Switch the shape checks of the test run off: users do without them and need our own errors."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def wan_repository(tmp_path_factory):
    # A machine with a GPU may have torch, Triton, pytest and hypothesis alone, which is enough for the kernels.
    pytest.importorskip("diffusers")
    from diffusers import WanPipeline

    from . import tiny_wan

    folder = tmp_path_factory.mktemp("wan") / "repository"
    WanPipeline(**tiny_wan.random_wan()).save_pretrained(folder)
    return folder


@pytest.fixture
def call():
    """Arguments of a call with 5 x 8 x 8 = 320 latent tokens; a fresh generator each time."""

    def arguments(**changed):
        return {
            "prompt": "a red circle moving right",
            "height": 64,
            "width": 64,
            "num_frames": 17,
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "max_sequence_length": 16,
            "output_type": "latent",  # decoding would be most of the time
            "generator": torch.Generator().manual_seed(1),
            **changed,
        }

    return arguments


@pytest.fixture
def sparse_wan(wan_repository):
    """Loads a fresh sparse pipeline: `sparse_wan(sla=..., **from_pretrained arguments)`."""
    from dit_accel import SparseWanPipeline

    def load(sla="balanced", **kwargs):
        if isinstance(sla, dict):
            sla = {"block_q": 32, "block_k": 32, "crossover": "never", **sla}
        pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=sla, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def stills():
    """`stills(count, seed)`: pictures of the demo `[n, 64, 64, 3]` in bytes, and their captions."""
    from dit_accel.demo.clips import STILL, draw_clips, render_stills

    def draw(count, seed=0):
        described = draw_clips(count, torch.Generator().manual_seed(seed), placement=STILL)
        images = (render_stills(described) + 1) * 127.5
        return images.round().byte().permute(0, 2, 3, 1).numpy(), described.captions(False)

    return draw


@pytest.fixture
def write_images():
    """`write_images(folder, images)`: one png an image, named 00000, 00001, ...; returns the folder."""
    from PIL import Image

    def write(folder, images):
        folder.mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
        return folder

    return write


@pytest.fixture(scope="module")
def wan(wan_repository):
    """A tiny Wan with random weights, dense."""
    from dit_accel import SparseWanPipeline

    pipe = SparseWanPipeline.from_pretrained(wan_repository, sla=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd3():
    """The embedded tiny-sd3, dense."""
    from dit_accel import SparseStableDiffusion3Pipeline
    from dit_accel.files import asset

    pipe = SparseStableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"), sla=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
