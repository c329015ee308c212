"""The steps of training: killed, interrupted, resumed, skipped, and with nothing that trains."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from dit_accel.finetune.checkpoints import checkpoints, find_latest
from dit_accel.finetune.guards import NonFiniteError
from dit_accel.finetune.log import read_log
from dit_accel.finetune.stop import Interrupted, StopRequest

from .fakes import FakeConfig, make_loop, values_of
from .faults import Writes, in_child, kill

CONFIG = FakeConfig()
MEASURED = ("seconds", "tokens_per_second", "memory_gib")


@pytest.fixture
def quick(tmp_path):
    """A folder in memory, where syncing takes no time; on the disk if there is none."""
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    except OSError:
        yield tmp_path


def train(folder, config=CONFIG, **more):
    """Train to the end from the newest checkpoint; the final values and the log."""
    loop = make_loop(config, folder, checkpoint=find_latest(folder)[0], **more)
    loop.run()
    loop.parts.log.close()
    return values_of(loop.parts.state), log_of(folder)


def log_of(folder):
    return [
        {k: x for k, x in record.items() if k not in MEASURED}
        for record in read_log(folder / "log.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_loss_falls():
    config = dataclasses.replace(
        CONFIG, train_batch_size=12, max_train_steps=100, checkpointing_steps=1000
    )
    with tempfile.TemporaryDirectory() as folder:
        (_, numbers), log = train(Path(folder), config)
    first, last = (sum(x["loss"] for x in part) for part in (log[:20], log[-20:]))
    assert last < 0.95 * first
    assert log[-1]["probe_loss"] < 0.9 * numbers["counters"]["first_loss"]


def test_log_has_every_step_once(uninterrupted):
    log = uninterrupted[1]
    assert [x["step"] for x in log] == list(range(1, 9))
    for name in ("loss", "gradient_norm", "sigma", "density", "learning_rate", "update/weights"):
        assert all(math.isfinite(x[name]) for x in log)
    assert [x["density"] for x in log] == [0.25] * 8
    assert log[0]["update/weights"] == 0
    assert log[1]["update/weights"] > 0


def test_checkpoints_by_steps_and_at_the_end(tmp_path):
    train(tmp_path)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 6, 8]


def test_checkpoints_by_minutes(tmp_path):
    train(tmp_path, dataclasses.replace(CONFIG, checkpointing_minutes=1e-9, max_train_steps=3))
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "cosine"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, precision, schedule):
    config = dataclasses.replace(CONFIG, mixed_precision=precision, lr_scheduler=schedule)
    whole = train(tmp_path / "whole" if (tmp_path / "whole").mkdir() is None else None, config)
    for step in (3, 6):
        part = tmp_path / f"from-{step}"
        part.mkdir()
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", part / f"checkpoint-{step}")
        lines = (tmp_path / "whole/log.jsonl").read_text().splitlines(keepends=True)
        (part / "log.jsonl").write_text("".join(lines[: step + 1]) + '{"stage": "distil')
        values, log = train(part, config)
        assert values == whole[0]
        details = {"update/weights", "update/others"}  # measured more often after a start
        assert [{k: v for k, v in x.items() if k not in details} for x in log] == [
            {k: v for k, v in x.items() if k not in details} for x in whole[1]
        ]


def test_sigkill_at_any_write_of_a_run(quick, uninterrupted):
    config = dataclasses.replace(CONFIG, checkpoints_total_limit=1)

    def points(at, folder):
        writes = Writes(folder, at, kill)
        result = train(folder, config)
        return writes.count, result

    (quick / "count").mkdir()
    _, (count, _) = in_child(lambda: points(0, quick / "count"))
    for at in range(1, count + 1, 11):
        folder = quick / f"run-{at}"
        folder.mkdir()
        assert in_child(lambda at=at, folder=folder: points(at, folder))[0] == "killed"
        kind, (values, log) = in_child(lambda folder=folder: train(folder, config))
        assert kind == "returned"
        assert values == uninterrupted[0]
        assert [x["step"] for x in log] == list(range(1, 9))
        assert [x["loss"] for x in log] == [x["loss"] for x in uninterrupted[1]]
        assert sorted(x.name for x in folder.iterdir()) == ["checkpoint-8", "log.jsonl"]
        shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda x: x.name)
def test_signal_saves_and_exits_with_0(tmp_path, uninterrupted, number):
    def interrupted():
        signal.signal(number, signal.default_int_handler)  # not ignored, as in a background job
        with StopRequest() as stop:
            loop = make_loop(CONFIG, tmp_path, stop=stop)
            objective = loop.parts.objective

            def signalled(model, batch, *, step, first):
                if step == 4:
                    os.kill(os.getpid(), number)
                return objective(model, batch, step=step, first=first)

            loop.parts.objective = signalled
            loop.run()

    assert in_child(interrupted) == ("exited", 0)
    assert checkpoints(tmp_path)[-1][0] == 5
    values, log = train(tmp_path)
    assert values == uninterrupted[0]
    assert [x["step"] for x in log] == list(range(1, 9))


def test_interrupted_names_signal_and_checkpoint(tmp_path):
    stop = StopRequest()
    stop.name = "SIGTERM"
    with pytest.raises(Interrupted) as caught:
        make_loop(CONFIG, tmp_path, stop=stop).run()
    assert caught.value.code == 0
    assert (caught.value.signal_name, caught.value.checkpoint) == (
        "SIGTERM",
        tmp_path / "checkpoint-1",
    )


@pytest.fixture
def sigint():
    """Set the handler of SIGINT, which a test run in the background of a shell ignores, and put it back."""
    before = signal.getsignal(signal.SIGINT)
    yield functools.partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_second_sigint_interrupts_at_once(sigint):
    sigint(signal.default_int_handler)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signal_stays_ignored(sigint):
    sigint(signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, uninterrupted):
    loop = make_loop(CONFIG, tmp_path, spoil={2: math.nan, 5: math.inf})
    loop.run()
    counters = loop.parts.state.counters
    assert counters["skipped_steps"] == [2, 5]
    log = read_log(tmp_path / "log.jsonl")
    assert (log[2]["loss"], log[5]["loss"]) == ("nan", "inf")
    assert log[5]["skipped_steps"] == 2
    assert all(x.isfinite().all() for x in loop.parts.state.named.values())
    # The steps before are those of a run without the fault, and its learning rates stay.
    for name in ("loss", "learning_rate"):
        assert [x[name] for x in log[:2]] == [x[name] for x in uninterrupted[1][:2]]
    assert log[7]["learning_rate"] == uninterrupted[1][7]["learning_rate"]


def test_skipped_step_changes_no_weight_and_no_average(tmp_path):
    loop = make_loop(CONFIG, tmp_path, spoil={0: math.nan})
    before, _ = values_of(loop.parts.state)
    loop._step(0)
    after, _ = values_of(loop.parts.state)
    assert before == after


def test_too_many_end_the_run_with_a_dump(tmp_path):
    loop = make_loop(CONFIG, tmp_path, spoil={1: math.nan, 3: math.nan, 4: math.nan})
    with pytest.raises(
        NonFiniteError, match=r"not finite in 3 steps.*max_nonfinite=2.* 4 .*nonfinite-4.json"
    ):
        loop.run()
    dump = json.loads((tmp_path / "nonfinite-4.json").read_text())
    assert dump["step"] == 4
    assert dump["loss"] == "nan"
    assert dump["skipped_steps"] == [1, 3, 4]
    [process] = dump["processes"]
    batch = loop.parts.feed.micro(4, 0)
    assert process["ids"] == list(batch.ids)
    sigmas = loop.parts.objective.draw(batch.latents, 4, 0)[0]
    assert process["noise_levels"] == sigmas.tolist()
    assert dump["groups"]["weights"]["gradients"] == "nan"
    assert dump["groups"]["weights"]["weights"] > 0
    assert "head.weight" in dump["not_finite"]
    assert checkpoints(tmp_path)[-1][0] == 3  # what was saved before stays


def test_counters_survive_a_resume(tmp_path):
    with pytest.raises(NonFiniteError, match="in 3 steps"):
        make_loop(CONFIG, tmp_path, spoil={1: math.nan, 4: math.nan, 5: math.nan}).run()
    with pytest.raises(NonFiniteError, match="in 3 steps"):
        train(tmp_path, spoil={1: math.nan, 4: math.nan, 5: math.nan})


def test_nothing_trains_is_an_error(tmp_path):
    def detach(model):
        model.forward = lambda x, sigmas: (
            model.sla.note(x) or (x + 0 * model.scale).detach() + 0 * model.scale
        )

    config = dataclasses.replace(CONFIG, adam_weight_decay=0.0)
    loop = make_loop(config, tmp_path, change=detach)
    for group in loop.groups:
        group["weight_decay"] = 0.0
    with pytest.raises(
        RuntimeError,
        match=r"nothing trains: step 1 .*weights, others",
    ):
        loop.run()


def test_group_that_does_not_train_is_named(tmp_path):
    config = dataclasses.replace(CONFIG, lr_warmup_steps=0, max_train_steps=2)

    def cut(model):
        forward = type(model).forward

        def without_scales(x, sigmas):
            with torch.no_grad():
                biases = [p for n, p in model.named_parameters() if not n.endswith("weight")]
            flags = [p.requires_grad_(False) for p in biases]
            out = forward(model, x, sigmas)
            for p in flags:
                p.requires_grad_(True)
            return out

        model.forward = without_scales

    loop = make_loop(config, tmp_path, change=cut)
    for group in loop.groups:
        group["weight_decay"] = 0.0
    with pytest.warns(UserWarning, match="parameter group 'others' .*step 0"):
        loop.run()


def test_dense_by_mistake_is_an_error(tmp_path):
    def dense(model):
        model.sla.sparse = False

    with pytest.raises(RuntimeError, match="sla: no layer ran sparse"):
        make_loop(CONFIG, tmp_path, change=dense).run()


@pytest.mark.filterwarnings("ignore:the parameter group")
def test_loss_that_does_not_move_is_noticed(tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e-12, max_train_steps=3)
    with pytest.warns(UserWarning, match="loss on the first batch .* 3 steps"):
        make_loop(config, tmp_path).run()


def test_annealing_sets_topk_and_measures_density(tmp_path):
    config = dataclasses.replace(CONFIG, max_train_steps=4)
    make_loop(config, tmp_path, topk_at=lambda step: max(0.25, 1.0 - 0.25 * step)).run()
    log = read_log(tmp_path / "log.jsonl")
    assert [x["topk"] for x in log] == [1.0, 0.75, 0.5, 0.25]
    assert [x["density"] for x in log] == [1.0, 0.75, 0.5, 0.25]


def test_validation_comes_before_the_first_step_and_its_calls_do_not_count(tmp_path):
    asked = []

    def validate(done):
        asked.append(done)
        loop.parts.sla.layers["a"].tally += 1000
        return True

    loop = make_loop(dataclasses.replace(CONFIG, max_train_steps=2), tmp_path, validate=validate)
    loop.run()
    assert asked == [0, 1, 2]
    assert [x["density"] for x in read_log(tmp_path / "log.jsonl")] == [0.25, 0.25]


def test_signal_during_validation_saves(tmp_path):
    loop = make_loop(CONFIG, tmp_path, validate=lambda done: done != 2)
    with pytest.raises(Interrupted):
        loop.run()
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_accumulation_changes_nothing(tmp_path):
    losses = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        config = dataclasses.replace(
            CONFIG, train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        losses.append([x["loss"] for x in train(folder, config)[1]])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_without_average_and_clipping(tmp_path):
    config = dataclasses.replace(CONFIG, use_ema=False, max_grad_norm=0.0)
    values, _ = train(tmp_path, config)
    assert not any(name.startswith("ema/") for name in values[0])


def test_averaged_weights_and_back(tmp_path):
    loop = make_loop(CONFIG, tmp_path)
    loop.run()
    state = loop.parts.state
    before = {name: x.detach().clone() for name, x in state.named.items()}
    with state.averaged():
        for x, average in zip(state.named.values(), state.ema.shadow_params, strict=True):
            assert torch.equal(x, average)
    for name, x in state.named.items():
        assert torch.equal(x, before[name])
    assert not torch.equal(state.ema.shadow_params[0], next(iter(state.named.values())))


def test_no_warning_in_a_plain_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path)


class TestHalf:
    """fp16 with its gradient scaler, which accelerate has on GPUs only."""

    @pytest.fixture
    def half_loop(self, tmp_path, monkeypatch):
        def make(scale, **more):
            from dit_accel.finetune import engine

            def with_scaler(self, config, folder, init=engine.Engine.__init__):
                init(self, config, folder)
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                self.accelerator.native_amp = True
                self.accelerator.state._mixed_precision = "fp16"

            monkeypatch.setattr(engine.Engine, "__init__", with_scaler)
            config = dataclasses.replace(CONFIG, lr_warmup_steps=0, max_train_steps=4)
            return make_loop(config, tmp_path, checkpoint=find_latest(tmp_path)[0], **more)

        return make

    def test_overflows_lower_the_scale_and_are_no_fault(self, half_loop, tmp_path):
        loop = half_loop(2.0**18)
        loop.run()
        counters = loop.parts.state.counters
        log = read_log(tmp_path / "log.jsonl")
        assert counters["overflows"] >= 1
        assert counters["skipped_steps"] == []
        assert log[0]["loss_scale"] == 2.0**18
        assert log[-1]["loss_scale"] < 2.0**18
        assert math.isfinite(log[-1]["gradient_norm"])
        assert "update/weights" not in log[0]

    def test_faults_are_counted(self, half_loop):
        loop = half_loop(4.0, spoil={1: math.nan})
        loop.run()
        assert loop.parts.state.counters["skipped_steps"] == [1]
        assert loop.parts.state.counters["overflows"] == 0
        assert all(x.isfinite().all() for x in loop.parts.state.named.values())

    def test_scale_survives_a_resume(self, half_loop, tmp_path):
        whole = half_loop(2.0**18)
        whole.run()
        expected = values_of(whole.parts.state)
        shutil.rmtree(tmp_path / "checkpoint-4")
        resumed = half_loop(1.0)
        assert resumed.start == 3
        resumed.run()
        assert values_of(resumed.parts.state) == expected
