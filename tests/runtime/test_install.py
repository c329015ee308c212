"""`disable` removes everything that `enable` installed, whatever happened in between."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch

import dit_accel
from dit_accel.runtime.caller import calling_driver
from dit_accel.runtime.install import installation_of, method_of

from ..random_pipelines import FAMILIES, make, relative, run, state_of

RAS = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": ()}
SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 1}
BOTH = {"ras": RAS, "sla": SLA}


class Wrapper(torch.nn.Module):
    """Wrapper like DistributedDataParallel: the model is `.module`."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, module.config
        self.dtype, self.device = module.dtype, module.device

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def peft(module):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(module, LoraConfig(r=2, target_modules=["to_q"]))


WRAPPERS = {
    "module": Wrapper,
    "twice": lambda x: Wrapper(Wrapper(x)),
    "peft": peft,
}


@pytest.mark.parametrize(
    ("family", "on"),
    [*((x, BOTH) for x in FAMILIES), ("wan", {"ras": RAS}), ("sd3", {"sla": SLA})],
    ids=[*FAMILIES, "wan-ras", "sd3-sla"],
)
def test_a_bare_transformer_is_as_before(family, on):
    pipe = make(family)
    plain, before = run(pipe, family), state_of(pipe.transformer)
    dit_accel.enable(pipe.transformer, **on)
    accelerated = run(pipe, family)
    assert relative(accelerated, plain) > 1e-5
    dit_accel.disable(pipe.transformer)
    assert state_of(pipe.transformer) == before
    torch.testing.assert_close(run(pipe, family), plain, rtol=0, atol=0)
    # It makes no difference whether the pipeline or the transformer was enabled.
    dit_accel.enable(pipe, **on)
    torch.testing.assert_close(run(pipe, family), accelerated, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_put_around_afterwards_hide_nothing(wrap):
    pipe = make("sd3")
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, **BOTH)
    accelerated = run(pipe, "sd3")
    inner, pipe.transformer = pipe.transformer, WRAPPERS[wrap](pipe.transformer)
    assert relative(run(pipe, "sd3"), accelerated) < 1e-5
    for target in (pipe, pipe.transformer):
        assert dit_accel.summary(target, strict=True).enabled
    dit_accel.enable(pipe, ras={**RAS, "ratio": 1.0})
    assert dit_accel.summary(inner).ras.config["ratio"] == 1.0
    dit_accel.disable(pipe.transformer)
    assert not dit_accel.summary(inner).enabled
    assert relative(run(pipe, "sd3"), plain) < 1e-5


@pytest.mark.parametrize("wrap", ["module", "twice"])
def test_wrapped_transformers_can_be_enabled(wrap):
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    accelerated = run(pipe, "sd3")
    dit_accel.disable(pipe)
    pipe.transformer = WRAPPERS[wrap](pipe.transformer)
    dit_accel.enable(pipe, **BOTH)
    assert relative(run(pipe, "sd3"), accelerated) < 1e-5


def unfuse_after(pipe):
    pipe.transformer.fuse_qkv_projections()
    dit_accel.disable(pipe)
    pipe.transformer.unfuse_qkv_projections()


def put_back_what_was_seen(pipe):
    seen = pipe.transformer.attn_processors
    dit_accel.disable(pipe)
    pipe.transformer.set_attn_processor(seen)


def fuse_twice(pipe):
    for _ in range(2):
        pipe.transformer.fuse_qkv_projections()
        pipe.transformer.unfuse_qkv_projections()
    dit_accel.disable(pipe)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()


@pytest.mark.parametrize("on", [{"ras": RAS}, {"sla": SLA}, BOTH], ids=["ras", "sla", "both"])
@pytest.mark.parametrize("what", [unfuse_after, put_back_what_was_seen, fuse_twice])
def test_processors_that_come_back_later_are_harmless(what, on):
    pipe = make("sd3")
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, **on)
    run(pipe, "sd3")
    what(pipe)
    assert not dit_accel.summary(pipe).enabled
    assert relative(run(pipe, "sd3"), plain) < 1e-6
    dit_accel.enable(pipe, **on)  # and it can be switched on again
    assert relative(run(pipe, "sd3"), plain) > 1e-5
    dit_accel.summary(pipe, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_of_deleted_pipelines_is_free_at_once(family):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    run(pipe, family)
    gone = [weakref.ref(x) for x in (pipe.transformer, next(pipe.transformer.parameters()))]
    vars(pipe.transformer).pop("_diffusers_hook", None)  # diffusers' own circle of references
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert [x() for x in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("save", [pickle.dumps, lambda x: torch.save(x, "/dev/null")])
def test_pickling_says_what_to_do(save):
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    with pytest.raises(TypeError, match=r"disable\(\)"):
        save(pipe.transformer)
    state = pipe.transformer.state_dict()
    dit_accel.disable(pipe)
    assert state.keys() == pipe.transformer.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_copies_stand_on_their_own(family):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, family)
    other = copy.deepcopy(pipe)
    dit_accel.disable(pipe)
    torch.testing.assert_close(run(other, family), expected, rtol=0, atol=0)
    assert dit_accel.summary(other, strict=True).ras.ras_steps > 0
    assert not dit_accel.summary(pipe).enabled
    dit_accel.disable(other)
    torch.testing.assert_close(run(other, family), run(pipe, family), rtol=0, atol=0)


# Threads --------------------------------------------------------------------------------------------


def in_threads(functions):
    """Run functions in threads at the same time. Return results or errors."""
    results = [None] * len(functions)

    def work(i):
        try:
            results[i] = functions[i]()
        except RuntimeError as error:
            results[i] = error

    threads = [
        threading.Thread(target=work, args=(i,), name=f"worker-{i}") for i in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return results


def test_two_threads_on_one_transformer_get_one_clear_error_and_never_a_wrong_output():
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    refused, once = threading.Event(), set()

    def wait(module, args):  # until both threads are in a call, or one was refused
        name = threading.current_thread().name
        if name.startswith("worker") and name not in once:
            once.add(name)
            for _ in range(600):
                if refused.wait(0.1) or len(once) == 2:
                    break

    def work(other):
        try:
            return run(other, "sd3")
        except RuntimeError:
            refused.set()
            raise

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(wait)
    others = [
        type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        for _ in range(2)
    ]
    for other in others:
        other.set_progress_bar_config(disable=True)
    results = in_threads([lambda x=x: work(x) for x in others])
    handle.remove()
    errors = [x for x in results if isinstance(x, RuntimeError)]
    assert len(errors) == 1
    assert "worker" in str(errors[0])
    [finished] = [x for x in results if isinstance(x, torch.Tensor)]
    torch.testing.assert_close(finished, expected, rtol=0, atol=0)
    torch.testing.assert_close(run(pipe, "sd3"), expected, rtol=0, atol=0)


def test_threads_with_transformers_of_their_own_do_not_meet():
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    others = [copy.deepcopy(pipe) for _ in range(2)]
    for result in in_threads([lambda x=x: run(x, "sd3") for x in others]):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_threads_that_wait_for_each_other_share_a_transformer(monkeypatch):
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    turn = threading.Lock()
    call = type(pipe.transformer).__call__

    def in_turn(self, *args, **kwargs):
        with turn:
            return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "__call__", in_turn)
    others = [copy.copy(pipe) for _ in range(2)]
    for other in others:
        other.scheduler = copy.deepcopy(pipe.scheduler)
    for result in in_threads([lambda x=x: run(x, "sd3") for x in others]):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_call_after_an_interrupted_one_goes_through():
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    installation = installation_of(pipe)
    installation._one_call.enter(
        pipe.transformer
    )  # as if Ctrl-C had skipped the hook that ends a call
    torch.testing.assert_close(run(pipe, "sd3"), expected, rtol=0, atol=0)
    in_threads(
        [lambda: installation._one_call.enter(pipe.transformer)]
    )  # and of a thread that is gone
    torch.testing.assert_close(run(pipe, "sd3"), expected, rtol=0, atol=0)


def test_a_run_that_could_not_begin_begins_with_the_next_call():
    """A run continues its steps after acceleration was switched, because no new timesteps are set."""
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    module = next(iter(control_layers(pipe))).module
    ours = module.processor
    pipe.scheduler.set_timesteps(6)
    call = {
        "hidden_states": torch.zeros(1, 16, 22, 26),
        "timestep": pipe.scheduler.timesteps[0].expand(1),
        "encoder_hidden_states": torch.zeros(1, 12, 24),
        "pooled_projections": torch.zeros(1, 16),
    }
    with torch.no_grad():
        module.set_processor(ours.stock)
        with pytest.raises(RuntimeError, match="changed"):
            pipe.transformer(**call)
        module.set_processor(ours)
        pipe.transformer(**call)
    assert len(dit_accel.summary(pipe).ras.steps) == 1


def control_layers(pipe):
    return installation_of(pipe).layers.values()


def test_a_debugger_keeps_the_variables_of_the_function_that_it_stopped_in():
    transformer = torch.nn.Identity()

    def stopped():
        kept = 1
        kept += 1
        return kept

    def trace(frame, event, arg):
        if frame.f_code is stopped.__code__ and event == "line":
            calling_driver(
                transformer, torch.zeros(1), [], pipelines=True
            )  # as typed at its prompt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert stopped() == 2
    finally:
        sys.settrace(before)


# Settings -------------------------------------------------------------------------------------------


def test_other_settings_replace_those_that_are_on():
    pipe = make("sd3")
    dit_accel.enable(pipe, sla=SLA)
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.5})
    assert dit_accel.summary(pipe).config["topk"] == 0.5
    dit_accel.enable(pipe, ras=RAS)
    dit_accel.enable(pipe, ras={**RAS, "ratio": 0.5})
    report = dit_accel.summary(pipe)
    assert (report.ras.config["ratio"], report.config["topk"]) == (0.5, 0.5)
    again = make("sd3")
    dit_accel.enable(again, sla={**SLA, "topk": 0.5}, ras={**RAS, "ratio": 0.5})
    torch.testing.assert_close(run(pipe, "sd3"), run(again, "sd3"), rtol=0, atol=0)


def test_none_as_a_word_switches_a_method_off():
    pipe = make("sd3")
    before = state_of(pipe.transformer)
    dit_accel.enable(pipe, **BOTH)
    dit_accel.enable(pipe, sla="none")
    assert set(dit_accel.summary(pipe).methods) == {"ras"}
    dit_accel.enable(pipe, ras="none")
    assert state_of(pipe.transformer) == before
    dit_accel.enable(pipe, ras="none", sla="none")
    assert state_of(pipe.transformer) == before


def test_learned_weights_outlive_other_settings_of_their_kind():
    pipe = make("sd3")
    dit_accel.enable(pipe, sla={**SLA, "combine": "proj"})
    modules = method_of(pipe, "sla").attention
    for module in modules.values():
        torch.nn.init.normal_(module.proj_l.weight)
    dit_accel.enable(pipe, sla={**SLA, "combine": "proj", "topk": 0.6})
    for name, module in method_of(pipe, "sla").attention.items():
        assert module.topk == 0.6
        torch.testing.assert_close(module.proj_l.weight, modules[name].proj_l.weight)


@pytest.mark.parametrize(
    "bad", [{"ras": {"ratio": 2}}, {"sla": {"dense_layers": 99}}, {"sla": "fsat"}]
)
def test_what_was_on_stays_on_after_bad_settings(bad):
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    with pytest.raises(ValueError, match=next(iter(bad))[:3] + "|ratio|dense_layers"):
        dit_accel.enable(pipe, **bad)
    torch.testing.assert_close(run(pipe, "sd3"), expected, rtol=0, atol=0)
    dit_accel.summary(pipe, strict=True)


@pytest.mark.parametrize("target", [None, 3, torch.nn.Linear(2, 2), object()])
def test_targets_without_a_transformer_are_refused(target):
    with pytest.raises(ValueError, match=type(target).__name__):
        dit_accel.enable(target, ras="fast")
    assert not dit_accel.summary(target).enabled
    dit_accel.disable(target)
