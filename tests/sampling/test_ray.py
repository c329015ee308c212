"""Sample sets made by workers of Ray: the same files as one process makes, kills, and nodes that lack something."""

import json
import os
import signal
import sys
import threading
import time

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

PROMPTS = number_prompts(f"a {x} circle" for x in ("red", "blue", "green", "white", "cyan", "pink"))
IMAGE = Sampling(height=64, width=64, num_inference_steps=3, guidance_scale=2.0)
OPTIONS = {"model": "tiny-sd3", "sampling": IMAGE}
LIMIT_S = 300
"""Seconds after which a call counts as hanging."""
PATIENCE = {
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
"""Settings with which Ray does not take a busy machine for a dead one, and ends this process."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    started()
    yield
    ray.shutdown()


def started(**options):
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
    """The result of a function, or its error; a test fails where that takes too long."""
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
    """Loads the embedded model in a worker.

    Args:
        notes: folder that gets an empty file named by the process.
        pause: seconds that each step takes more.
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
    """Samples of the manifest in order, without what differs from run to run."""
    samples = SampleSet.open(folder).manifest["samples"]
    return [(k, {**x, "seconds": None}) for k, x in samples.items()]


@pytest.fixture(scope="module")
def whole(sd3, tmp_path_factory):
    """Made by one process."""
    folder = tmp_path_factory.mktemp("whole")
    generate(sd3, PROMPTS, output_dir=folder, progress=False, **OPTIONS)
    return folder


def test_two_workers_make_what_one_process_makes(whole, tmp_path, capsys):
    made = make(tmp_path / "new" / "set", progress=True)
    assert made.ids == SampleSet.open(whole).ids
    assert files(made.path) == files(whole)
    assert records(made.path) == records(whole)
    assert sorted(x.name for x in made.path.iterdir()) == sorted(x.name for x in whole.iterdir())
    one, two = (SampleSet.open(x).manifest for x in (whole, made.path))
    assert (one["shards"], two["shards"]) == (1, 6)
    changing = ("shards", "samples")
    assert {k: one[k] for k in one if k not in changing} == {
        k: two[k] for k in two if k not in changing
    }
    bar = capsys.readouterr().err
    assert "generating: 100%" in bar
    assert "6/6" in bar


def test_a_killed_worker_loses_nothing_and_doubles_nothing(whole, tmp_path):
    notes, out = tmp_path / "workers", tmp_path / "set"
    notes.mkdir()
    kept = {}

    def kill():
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and not kept:
            time.sleep(0.05)
            if finished(out, {"world_size": 6}) == 0 or len(list(notes.iterdir())) < 2:
                continue
            for path in out.glob("manifest.rank*.jsonl"):
                for line in path.read_text().splitlines()[1:]:
                    kept.update({(x := json.loads(line))["id"]: x["seconds"]})
            if kept:
                os.kill(int(next(notes.iterdir()).name), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    made = make(out, loader(notes, pause=0.3))
    thread.join()
    assert 0 < len(kept) < len(PROMPTS)
    assert len(list(notes.iterdir())) == 3  # one was started again
    assert files(out) == files(whole)
    assert records(out) == records(whole)
    for name, seconds in kept.items():  # what was finished is kept as it was
        assert made.manifest["samples"][name]["seconds"] == seconds


def test_a_second_run_goes_on_and_other_settings_are_refused(sd3, whole, tmp_path):
    for rank in range(2):
        share = {"rank": rank, "world_size": 3, "progress": False}
        assert generate(sd3, PROMPTS, output_dir=tmp_path, **OPTIONS, **share) is None
    before = {x.name: x.stat().st_mtime_ns for x in tmp_path.glob("*.png")}
    assert len(before) == 4
    make(tmp_path, workers=1)
    assert files(tmp_path) == files(whole)
    assert all((tmp_path / x).stat().st_mtime_ns == t for x, t in before.items())
    with pytest.raises(ValueError, match=r"node .*: output_dir=.* holds samples of other settings"):
        make(tmp_path, workers=1, seed=3)
    assert files(tmp_path) == files(whole)


def test_a_model_that_workers_lack_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"^node [^:]*: .*nowhere"):
        make(tmp_path / "set", loader(model="/nowhere/model"), workers=1)
    # One that still runs would abort the program once Ray is shut down.
    assert not [x for x in threading.enumerate() if x.name.startswith(ray_engine.THREADS)]
    assert not (tmp_path / "set").exists()


def test_workers_that_die_again_and_again_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "RESTARTS", 1)

    def load(device):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"workers died 2 times .* run it again to go on"):
        make(tmp_path, load, workers=1)


def test_a_folder_that_workers_do_not_see_is_one_error(tmp_path, monkeypatch):
    import contextlib

    own = contextlib.nullcontext(tmp_path / "elsewhere" / "token")
    monkeypatch.setattr(ray_engine, "_shared_folder", lambda folder: own)
    with pytest.raises(ValueError, match=r"output_dir='.*elsewhere': is not the folder"):
        make(tmp_path, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_another_version_on_a_node_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "installed", lambda: {"diffusers": "0.1"})
    with pytest.raises(ValueError, match=r"diffusers 0\.4.* started with 0\.1; accepted is one"):
        make(tmp_path, workers=1)


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
        started(runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path / "node")}})
        with pytest.raises(ValueError, match=r"^node [^:]*: No module named 'dit_accel'"):
            make(tmp_path / "set", workers=1)
    finally:
        ray.shutdown()
        started()


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


def test_the_command_makes_a_set(prompts_file, capsys):
    more = ["--workers", 1, "--ras", "balanced", "--format", "json"]
    # The schedule of so few steps leaves nothing out, which the worker notices.
    with pytest.warns(UserWarning, match="dense steps only"):
        assert within(lambda: command(prompts_file, *more)) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    assert SampleSet.open(prompts_file / "set").manifest["acceleration"]["ras"] is not None


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--workers", "0"], "workers=0"),
        (["--workers", "3"], "workers=3: Ray has 2 CPUs"),
        (["--device", "cuda:1"], "device='cuda:1'"),
        (["--ray-address", "nowhere"], "ray_address='nowhere'"),
        (["--engine", "local", "--workers", "2"], "workers=2: accepted with engine='ray'"),
        (["--engine", "local", "--ray-address", "auto"], "ray_address='auto': accepted with"),
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
    assert "engine='ray': this is a process of torchrun" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(prompts_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(prompts_file) == 1
    assert "pip install 'dit-accel[ray]'" in capsys.readouterr().err.splitlines()[-1]


def test_no_cluster_is_one_error_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"ray_address='127\.0\.0\.1:9': no connection"):
        make(tmp_path / "set", address="127.0.0.1:9")
    assert not (tmp_path / "set").exists()
