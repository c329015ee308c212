"""Sample sets of Ray workers: equality with one process, killed workers, and errors of nodes."""

import json
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

from dit_accel.sampling import ray_engine
from dit_accel.sampling.generate import generate
from dit_accel.sampling.journal import finished
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.ray_engine import generate_on_ray
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling

from ..cli.command import run

ray = pytest.importorskip("ray", reason="Ray is not installed")

PROMPTS = number_prompts(f"a {x} circle" for x in ("red", "blue", "green", "white"))
IMAGE = Sampling(height=64, width=64, num_inference_steps=3, guidance_scale=2.0)
OPTIONS = {"model": "tiny-sd3", "sampling": IMAGE}
LIMIT_S = 300
"""Seconds after which a call is treated as hanging."""
PATIENCE = {
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
"""Settings that keep Ray from treating a busy machine as dead."""


@pytest.fixture(scope="module", autouse=True)
def _shut_down():
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def cluster():
    """Start Ray, unless it is still running."""
    if not ray.is_initialized():
        start()


def start(**options):
    """Start Ray on this machine with two CPUs."""
    os.environ.update(ray_engine.ENVIRONMENT, **PATIENCE)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        **options,
    )


def within(function, seconds=LIMIT_S):
    """Return the result of a function or raise its error. Fail if it takes longer than `seconds`."""
    results = []

    def call():
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"still running after {seconds} s"
    [(result, error)] = results
    if error is not None:
        raise error
    return result


def loader(notes=None, pause=0.0, model="tiny-sd3"):
    """Return a function that loads an embedded model in a worker.

    Args:
        notes: folder in which each worker creates an empty file named by its process id.
        pause: additional seconds of each step.
        model: name of the model.
    """

    def load(device):
        import os
        import time

        from dit_accel.sampling.load import load_pipeline

        pipe = load_pipeline(model, sla=None, device=device)
        pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(pause))
        if notes is not None:
            (notes / str(os.getpid())).touch()
        return pipe

    return load


def make(folder, load=None, **changed):
    options = OPTIONS | {"samples": len(PROMPTS), "workers": 2, "progress": False} | changed
    return within(lambda: generate_on_ray(load or loader(), PROMPTS, output_dir=folder, **options))


def files(folder):
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*.png")}


def records(folder):
    """Return the samples of the manifest in order, without the seconds."""
    samples = SampleSet.open(folder).manifest["samples"]
    return [(k, {**x, "seconds": None}) for k, x in samples.items()]


@pytest.fixture(scope="module")
def whole(sd3, tmp_path_factory):
    """Sample set of one process."""
    folder = tmp_path_factory.mktemp("whole")
    generate(sd3, PROMPTS, output_dir=folder, progress=False, **OPTIONS)
    return folder


def test_two_workers_of_which_one_is_killed_make_what_one_process_makes(whole, tmp_path, capsys):
    notes, out = tmp_path / "workers", tmp_path / "new" / "set"
    notes.mkdir()
    kept = {}

    def kill():
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and not kept:
            time.sleep(0.05)
            if finished(out, {"world_size": 4}) == 0 or len(list(notes.iterdir())) < 2:
                continue
            for path in out.glob("manifest.rank*.jsonl"):
                for line in path.read_text().splitlines()[1:]:
                    kept.update({(x := json.loads(line))["id"]: x["seconds"]})
            if kept:
                os.kill(int(next(notes.iterdir()).name), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    made = make(out, loader(notes, pause=0.3), progress=True)
    thread.join()
    assert 0 < len(kept) < len(PROMPTS)
    assert len(list(notes.iterdir())) == 3  # one worker was restarted
    assert made.ids == SampleSet.open(whole).ids
    assert files(out) == files(whole)
    assert records(out) == records(whole)
    assert sorted(x.name for x in out.iterdir()) == sorted(x.name for x in whole.iterdir())
    for name, seconds in kept.items():  # finished samples are kept
        assert made.manifest["samples"][name]["seconds"] == seconds
    one, two = (SampleSet.open(x).manifest for x in (whole, out))
    assert (one["shards"], two["shards"]) == (1, 4)
    changing = ("shards", "samples")
    assert {k: one[k] for k in one if k not in changing} == {
        k: two[k] for k in two if k not in changing
    }
    bar = capsys.readouterr().err
    assert "generating: 100%" in bar
    assert "4/4" in bar


def test_a_model_that_workers_lack_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"^node [^:]*: .*nowhere"):
        make(tmp_path / "set", loader(model="/nowhere/model"), workers=1)
    # A running thread would abort the program when Ray is shut down.
    assert not [x for x in threading.enumerate() if x.name.startswith(ray_engine.THREADS)]
    assert not (tmp_path / "set").exists()


def actor(folder, load, *, token=None, expected=None, **options):
    """Return an actor in this process, without Ray."""
    folder.mkdir(exist_ok=True)
    token = token or folder / "token"
    if token.parent == folder:
        token.touch()
    options = OPTIONS | {"output_dir": folder, "world_size": 2} | options
    job = ray.cloudpickle.dumps(ray_engine.Job(load, "cpu", None, PROMPTS, options, os.getcwd()))
    expected = ray_engine.installed() if expected is None else expected
    return ray_engine._actor(job, expected, token, 1, 4)()


def failure(actor):
    """Return the kind of error and the message of an actor that is asked for the shard 0."""
    made = actor({"rank": [0]})
    return made["kind"][0], made["error"][0]


def test_errors_of_nodes_are_returned_with_the_name_of_the_node(sd3, tmp_path):
    elsewhere = actor(tmp_path / "a", loader(), token=tmp_path / "elsewhere" / "token")
    kind, text = failure(elsewhere)
    assert kind == "input"
    assert re.search(r"^node [^:]*: output_dir='.*elsewhere'", text)
    kind, text = failure(actor(tmp_path / "a", loader(), expected={"diffusers": "0.1"}))
    assert kind == "input"
    assert re.search(r"^node [^:]*: diffusers=0\.4.* 0\.1", text)
    share = {"rank": 0, "world_size": 2, "progress": False}
    generate(sd3, PROMPTS, output_dir=tmp_path / "b", **OPTIONS, **share)
    kind, text = failure(actor(tmp_path / "b", loader(), seed=3))
    assert kind == "input"
    assert re.search(r"^node [^:]*: output_dir=.*seed was 0", text)

    def full(device):
        raise OSError("disk full")

    assert failure(actor(tmp_path / "c", full)) == ("run", f"node {platform.node()}: disk full")


def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    (tmp_path / "token").write_bytes(b"." * 5)  # starts of one worker; four restarts are allowed
    kind, text = failure(actor(tmp_path, loader()))
    assert kind == "run"
    assert re.search(r"^node [^:]*: workers died 5 times", text)
    batch = {"kind": [kind], "error": [text], "notes": [""]}
    data = SimpleNamespace(iter_batches=lambda **_: [batch])
    with pytest.raises(RuntimeError, match="workers died 5 times"):
        ray_engine._consume(ray, data)


def command(folder, *more):
    sizes = ["--height", 64, "--width", 64, "--num-inference-steps", 3, "--guidance-scale", 2]
    return run(
        "eval", "generate", "--model", "tiny-sd3", "--prompts", folder / "prompts.txt", *sizes,
        "--output-dir", folder / "set", "--engine", "ray", *more,
    )  # fmt: skip


@pytest.fixture
def prompts_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{x.prompt}\n" for x in PROMPTS[:2]))
    return tmp_path


def test_the_command_resumes_a_set(prompts_file, capsys, monkeypatch):
    more = ["--ras", "balanced", "--format", "json"]
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        assert command(prompts_file, "--engine", "local", *more) == 0
    [before] = (prompts_file / "set").glob("*.png")
    time_before = before.stat().st_mtime_ns
    capsys.readouterr()
    assert within(lambda: command(prompts_file, "--workers", 1, *more)) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["samples"] == 2
    # The schedule of so few steps has only dense steps. The worker warns, and the command prints the warning.
    assert "budget 0.75" in shown.err
    assert before.stat().st_mtime_ns == time_before
    assert SampleSet.open(prompts_file / "set").manifest["acceleration"]["ras"] is not None


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--workers", "0"], "workers=0"),
        (["--workers", "3"], "workers=3"),
        (["--device", "cuda:1"], "device='cuda:1'"),
        (["--ray-address", "nowhere"], "ray_address='nowhere'"),
        (["--engine", "local", "--workers", "2"], "workers=2"),
        (["--engine", "local", "--ray-address", "auto"], "ray_address='auto'"),
    ],
)
def test_bad_input_is_one_line(prompts_file, capsys, more, named):
    assert within(lambda: command(prompts_file, *more)) == 2
    assert f"error: {named}" in capsys.readouterr().err
    assert not (prompts_file / "set").exists()


def test_torchrun_and_ray_are_not_combined(prompts_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(prompts_file) == 2
    assert "engine='ray'" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(prompts_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(prompts_file) == 1
    assert "pip install 'dit-accel[ray]'" in capsys.readouterr().err.splitlines()[-1]


def test_no_cluster_is_one_error_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"ray_address='127\.0\.0\.1:9'"):
        make(tmp_path / "set", address="127.0.0.1:9")
    assert not (tmp_path / "set").exists()


LACKING = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "dit_accel":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Finder())
"""


def test_nodes_without_the_package_are_one_error(tmp_path):
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "sitecustomize.py").write_text(LACKING)
    ray.shutdown()
    try:
        start(runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path / "node")}})
        with pytest.raises(ValueError, match=r"^node [^:]*: No module named 'dit_accel'"):
            make(tmp_path / "set", workers=1)
    finally:
        ray.shutdown()
