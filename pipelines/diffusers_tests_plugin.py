"""Pytest plugin that `diffusers_tests.py` copies beside diffusers' tests; it is loaded with `-p`.

It fills a local Hugging Face cache (diffusers_tests_hub.py), accelerates the pipelines of the tests as the environment
variable DIT_ACCEL_VARIANT says, and writes one JSON line per test to DIT_ACCEL_REPORT.
"""

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import pytest
from diffusers_tests_hub import fill_hub_cache

from dit_accel.bench.diffusers_tests import VARIANTS, Variant

# The inputs of the tests have 2 steps and mostly 3 to 16 tokens: nothing to accelerate. Sizes of a folder, and what
# one of its files needs beside them.
LARGE = {
    "wan": {"height": 64, "width": 64, "num_inference_steps": 4},
    "stable_diffusion_3": {"num_inference_steps": 4},
    "lumina": {"height": 128, "width": 128, "num_inference_steps": 4},
    "lumina2": {"height": 128, "width": 128, "num_inference_steps": 4},
    "flux": {"height": 32, "width": 32, "num_inference_steps": 4},
    "flux.test_pipeline_flux_kontext": {"max_area": 32 * 32},
    "flux.test_pipeline_flux_kontext_inpaint": {"max_area": 32 * 32},
    "qwenimage": {"height": 96, "width": 96, "num_inference_steps": 4},
    "hunyuan_video": {"height": 64, "width": 64, "num_inference_steps": 4},
    "ltx": {"num_inference_steps": 4},  # 192 tokens
}
OURS = {
    "WanPipeline": "SparseWanPipeline",
    "WanImageToVideoPipeline": "SparseWanImageToVideoPipeline",
    "WanVACEPipeline": "SparseWanVACEPipeline",
    "StableDiffusion3Pipeline": "SparseStableDiffusion3Pipeline",
    "LuminaPipeline": "SparseLuminaPipeline",
    "Lumina2Pipeline": "SparseLumina2Pipeline",
    "FluxPipeline": "SparseFluxPipeline",
    "QwenImagePipeline": "SparseQwenImagePipeline",
    "HunyuanVideoPipeline": "SparseHunyuanVideoPipeline",
    "LTXPipeline": "SparseLTXPipeline",
}

_counts = {"pipelines": 0, "sparse_calls": 0, "ras_steps": 0}
_loading = 0


def _accelerate(cls: type, settings: dict) -> None:
    """Enable every pipeline of this class that a test constructs."""
    import dit_accel

    init = cls.__init__

    @functools.wraps(init)
    def accelerated_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        # Our classes enable what they load; a test of text encoders alone has no transformer; pipelines
        # may share a transformer.
        held = [getattr(self, x, None) for x in ("transformer", "transformer_2")]
        wanted = not _loading and any(x is not None for x in held)
        if wanted and not dit_accel.summary(self).enabled:
            dit_accel.enable(self, **settings)
            _counts["pipelines"] += 1

    cls.__init__ = accelerated_init


def _count(cls: type) -> None:
    """Count the accelerated part of every call."""
    import dit_accel

    call = cls.__call__

    @functools.wraps(call)
    def counted_call(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        done = dit_accel.summary(self)
        _counts["sparse_calls"] += sum(x.sparse_calls for x in done.layers)
        _counts["ras_steps"] += done.ras.ras_steps if done.ras is not None else 0
        return result

    cls.__call__ = counted_call


def _follow_loading(cls: type) -> None:
    """Let this class enable what it loads: it reads the settings from the files."""
    for name in ("from_pretrained", "from_pipe"):
        load = getattr(cls, name).__func__

        def loading(cls, *args, _load=load, **kwargs):
            global _loading
            _loading += 1
            try:
                return _load(cls, *args, **kwargs)
            finally:
                _loading -= 1

        setattr(cls, name, classmethod(functools.wraps(load)(loading)))


def _install(items: list, variant: Variant) -> None:
    """Replace and wrap the pipeline classes of the collected tests."""
    import diffusers

    import dit_accel

    classes: dict[type, type] = {}
    for test_class in {item.cls for item in items if item.cls is not None}:
        plain = getattr(test_class, "pipeline_class", None)
        if not isinstance(plain, type) or (variant.ours and plain.__name__ not in OURS):
            continue
        if plain not in classes:
            cls = classes[plain] = (
                getattr(dit_accel, OURS[plain.__name__]) if variant.ours else plain
            )
            # diffusers' test tools read sources of classes that they look up there by name.
            setattr(diffusers.pipelines, cls.__name__, cls)
            if variant.ours:
                _follow_loading(cls)
            _count(cls)
            if variant.settings is not None:
                _accelerate(cls, variant.settings)
        test_class.pipeline_class = classes[plain]
    for module in {item.module for item in items}:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in classes:
                setattr(module, name, classes[value])


def _enlarge(items: list) -> None:
    """Run every call of the tests with the sizes of LARGE."""
    for test_class in {item.cls for item in items if hasattr(item.cls, "get_dummy_inputs")}:
        folder, file = test_class.__module__.split(".")[2:4]
        larger = {**LARGE[folder], **LARGE.get(f"{folder}.{file}", {})}
        inputs = test_class.get_dummy_inputs

        def enlarged(self, *args, _inputs=inputs, _larger=larger, **kwargs):
            return {**_inputs(self, *args, **kwargs), **_larger}

        test_class.get_dummy_inputs = enlarged


def pytest_configure(config):
    sys.path.append(os.environ["DIT_ACCEL_STAND_INS"])  # last: an installed package comes first
    fill_hub_cache()


def pytest_collection_finish(session):
    variant = VARIANTS[os.environ["DIT_ACCEL_VARIANT"]]
    if variant.ours or variant.settings is not None:
        _install(session.items, variant)
    if variant.large:
        _enlarge(session.items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before = dict(_counts)
    item.user_properties.append(("before", before))
    return (yield)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        before = dict(report.user_properties)["before"]
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
        message = crash or (str(report.longrepr) if report.longrepr else "")
        record = {
            "test": report.nodeid,
            "when": report.when,
            "outcome": report.outcome,
            "message": message,
            **{k: _counts[k] - n for k, n in before.items()},
        }
        with Path(os.environ["DIT_ACCEL_REPORT"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def pytest_collectreport(report):
    if report.failed:
        with contextlib.suppress(KeyError), Path(os.environ["DIT_ACCEL_REPORT"]).open("a") as file:
            record = {"test": report.nodeid, "when": "collect", "outcome": "failed"}
            file.write(json.dumps(record | {"message": str(report.longrepr)}) + "\n")
