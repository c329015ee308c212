"""A method written with the public interface: attached, told about calls, summarised, detached."""

import json

import pytest
import torch

import dit_accel
from dit_accel.runtime.method import Method

from ..random_pipelines import FAMILIES, make, relative, run, state_of


class Scale(Method):
    """Scale the output by a constant on odd steps."""

    name = "scale"

    def __init__(self, factor):
        self.factor, self.attached = factor, False

    def attach(self, host):
        self.attached = True

    def detach(self):
        self.attached = False

    def begin_run(self, run):
        run.states[self.name] = {"scaled": 0, "plain": 0}

    def end_call(self, run, call, output):
        if output is None or run.step % 2 == 0:
            run.states[self.name]["plain"] += 1
            return None
        run.states[self.name]["scaled"] += 1
        return (output[0] * self.factor, *output[1:])

    def rows(self, host, run):
        return Rows(run.states[self.name] if run else {})

    def idle(self, run):
        return None if run.states[self.name]["scaled"] else "no odd step"


class Rows(dict):
    def to_dict(self):
        return dict(self)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_plugs_in(family):
    pipe = make(family)
    plain = run(pipe, family, steps=4)
    before = state_of(pipe.transformer)
    method = Scale(0.5)
    dit_accel.enable(pipe, scale=method)
    assert method.attached
    assert relative(run(pipe, family, steps=4), plain) > 1e-2
    contexts = 2 if family in ("wan", "lumina2") else 1
    report = dit_accel.summary(pipe)
    assert report.methods["scale"] == {"scaled": 2 * contexts, "plain": 2 * contexts}
    assert json.loads(json.dumps(report.to_dict()))["scale"]["scaled"] == 2 * contexts
    assert "scaled" in str(report)
    dit_accel.disable(pipe)
    assert not method.attached
    assert state_of(pipe.transformer) == before
    torch.testing.assert_close(run(pipe, family, steps=4), plain, rtol=0, atol=0)


def test_a_method_works_beside_the_others():
    pipe = make("sd3")
    settings = {"block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 1}
    dit_accel.enable(pipe, sla=settings, ras={"ratio": 0.5, "warmup": 2, "tail": 1})
    both = run(pipe, "sd3")
    dit_accel.enable(pipe, scale=Scale(1.0))
    assert set(dit_accel.summary(pipe).methods) == {"ras", "sla", "scale"}
    torch.testing.assert_close(run(pipe, "sd3"), both, rtol=0, atol=0)
    assert dit_accel.summary(pipe).ras.ras_steps > 0


def test_a_run_without_an_odd_step_says_so():
    pipe = make("sd3")
    dit_accel.enable(pipe, scale=Scale(2.0))
    with pytest.warns(UserWarning, match="no odd step"):
        run(pipe, "sd3", steps=1)


@pytest.mark.parametrize(
    "methods", [{"scale": 2.0}, {"other": Scale(2.0)}, {"rass": "balanced"}, {"scale": Scale}]
)
def test_what_is_no_method_is_refused(methods):
    pipe = make("sd3")
    before = state_of(pipe.transformer)
    with pytest.raises(ValueError, match=next(iter(methods))):
        dit_accel.enable(pipe, **methods)
    assert state_of(pipe.transformer) == before


def test_runtime_names_no_method():
    import io
    import tokenize
    from pathlib import Path

    for path in (Path(dit_accel.__file__).parent / "runtime").glob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        names = {x.string.lower() for x in tokens if x.type == tokenize.NAME}
        assert not [x for x in names if {"ras", "sla"} & set(x.split("_"))], path
