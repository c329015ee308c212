"""Generation of a sample set with workers of Ray Data, on one machine or on a cluster.

Each row of a Ray dataset is a shard of the samples. Each worker is an actor that loads the pipeline once and calls
`generate` for one shard after the other, into a folder that all workers share. If a worker dies, Ray starts a new one, which
resumes from the journal of the shard. Only this file imports Ray.
"""

import contextlib
import io
import logging
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, no_type_check

from dit_accel.environment import versions
from dit_accel.files import check_writable
from dit_accel.sampling.batches import progress_bar
from dit_accel.sampling.generate import generate
from dit_accel.sampling.journal import finished
from dit_accel.sampling.manifest import MANIFEST
from dit_accel.sampling.prompts import PromptRecord, prompts_sha256
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import check_count

SHARDS_PER_WORKER = 4
"""Number of shards per worker. With several, fast workers process more of them."""
RESTARTS = 4
"""Average number of restarts per worker after which the run fails. Ray itself has no limit."""
CONNECT_S = 10.0
"""Seconds to wait for a connection to the head node of a cluster."""
STOP_S = 60.0
"""Seconds to wait for the threads of Ray Data at the end."""
THREADS = ("StreamingExecutor", "ray-data-", "iter_threaded")
"""Prefixes of the names of these threads."""
POLL_S = 1.0
"""Seconds between two updates of the progress bar from the journals."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage reports
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; Ray warns if it is not set
}
"""Environment variables for a Ray that this process starts. Variables that are already set are not changed."""
NOTE = "note: "
"""Prefix of the lines on stderr that are about the samples."""
SAME = ("dit-accel", "torch", "diffusers", "transformers")
"""Packages that must have the same version on all nodes, because samples depend on them."""


def check_ray(device: str = "auto", workers: int | None = None, address: str | None = None) -> None:
    """Check the arguments before Ray starts.

    Args:
        device, workers, address: as in `generate_on_ray`.

    Raises:
        ValueError: an argument is invalid, or this is a process of torchrun.
        ImportError: Ray is not installed.
    """
    if workers is not None:
        check_count("workers", workers)
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={device!r}: must be one of auto, cpu, cuda with engine='ray', because Ray assigns a GPU to each worker"
        )
    if address is not None:
        _split_address(address, "ray_address")
    if "WORLD_SIZE" in os.environ or "RANK" in os.environ:
        raise ValueError(
            "engine='ray': must be engine='local' in a process of torchrun, whose processes divide the samples themselves"
        )
    try:
        import pyarrow  # noqa: F401  # needed by ray.data
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"engine='ray': cannot import Ray ({error}); pip install 'dit-accel[ray]'"
        ) from None


def generate_on_ray(
    load: Callable[[str], Any],
    prompts: Sequence[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    samples: int,
    device: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    make_cache: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> SampleSet:
    """Generate a sample set with workers of Ray Data. A second call with the same arguments resumes an interrupted run.

    Files and pixels equal those of `generate` in one process. A worker that dies is restarted, and its finished samples are
    kept. Ray is started on this machine unless it is already running or `address` names a cluster. The nodes of a cluster
    need this package, the model and the same folder at `output_dir`.

    Args:
        load: function that loads the pipeline on a device in a worker. It is pickled.
        prompts: as in `generate`.
        output_dir: as in `generate`; a folder that all nodes share.
        samples: number of samples of the set.
        device: "auto", "cpu" or "cuda". "auto" gives each worker a GPU if Ray has GPUs, else the CPU.
        workers: number of workers, each with one GPU or one CPU. Default: number of GPUs of Ray, or 1 without GPUs.
        address: address of a Ray cluster. Default: RAY_ADDRESS of the environment, else this machine alone.
        make_cache: function that returns the cache config of diffusers for a loaded pipeline; None: no cache. It is pickled.
        progress: show a progress bar on stderr.
        options: further arguments of `generate`, except `rank` and `world_size`.

    Returns:
        The sample set.

    Raises:
        ValueError: an argument is invalid, or a node cannot generate samples.
        ImportError: Ray is not installed.
        RuntimeError: a worker failed or died too often. Finished samples are kept; run the call again to resume.
    """
    check_ray(device, workers, address)
    import ray

    folder = Path(output_dir).absolute()
    with _shared_folder(folder) as token, _running_ray(ray, address):
        gpu, count = _resources(ray, device, workers)
        shards = min(samples, SHARDS_PER_WORKER * count)
        job = Job(
            load,
            "cuda" if gpu else "cpu",
            make_cache,
            list(prompts),
            options | {"output_dir": folder, "world_size": shards},
            os.getcwd(),
        )
        data = ray.data.from_items(
            [{"rank": rank} for rank in range(shards)], override_num_blocks=shards
        ).map_batches(
            _actor(ray.cloudpickle.dumps(job), installed(), token, count, RESTARTS * count),
            batch_size=1,
            num_cpus=1,
            num_gpus=int(gpu),
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        )
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        like = {"world_size": shards, "prompts_sha256": prompts_sha256(prompts)}
        bar = progress_bar(total=samples, desc="generating", disable=not progress)
        with bar, _followed(folder, like, bar):
            _consume(ray, data)
            bar.update(bar.total - bar.n)
        if not (folder / MANIFEST).is_file():
            raise RuntimeError(
                f"output_dir={str(output_dir)!r}: no {MANIFEST} after all workers have finished; run it again to resume"
            )
        return SampleSet.open(output_dir)


@dataclass(frozen=True)
class Job:
    """Pickled arguments of all workers."""

    load: Callable[[str], Any]
    """Function that loads the pipeline on a device."""
    device: str
    make_cache: Callable[[Any], Any] | None
    prompts: list[PromptRecord]
    options: dict[str, Any]
    """Further arguments of `generate`."""
    cwd: str
    """Working directory of the main program, for relative paths."""


class Worker:
    """Worker that loads one pipeline and generates shards with it.

    Args:
        job: a pickled `Job`.
        expected: required versions of packages.
        token: file in the shared folder, to which each worker appends one byte when it starts.
        workers: number of workers.
        restarts: maximum number of restarts of all workers together.

    Raises:
        ValueError: this node does not see the shared folder, or has other versions of packages.
        RuntimeError: too many workers have died.
    """

    def __init__(
        self, job: bytes, expected: dict[str, str], token: Path, workers: int, restarts: int
    ) -> None:
        import ray

        if not token.exists():
            raise ValueError(
                f"output_dir={str(token.parent)!r}: must be a folder that all nodes share, and is not shared with the "
                "machine that started the run"
            )
        with token.open("ab") as starts:
            starts.write(b".")
        if (deaths := token.stat().st_size - workers) > restarts:
            raise RuntimeError(
                f"workers died {deaths} times in this run; finished samples are kept, run it again to resume"
            )
        found = installed()
        for name, version in expected.items():
            if found.get(name) != version:
                raise ValueError(
                    f"{name}={found.get(name)}: must be {version}, as on the machine that started the run"
                )
        self.job: Job = ray.cloudpickle.loads(job)
        if os.path.isdir(self.job.cwd):
            os.chdir(self.job.cwd)
        self.pipe = self.job.load(self.job.device)
        self.cache = None if self.job.make_cache is None else self.job.make_cache(self.pipe)
        self.calls = 0

    def __call__(self, rank: int) -> list[str]:
        """Generate the shard with this rank, and return warnings and notes."""
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stderr(io.StringIO()) as printed,
        ):
            generate(
                self.pipe,
                self.job.prompts,
                rank=rank,
                cache=self.cache,
                warm_up=self.calls == 0,
                progress=False,
                **self.job.options,
            )
        self.calls += 1
        lines = printed.getvalue().splitlines()
        return [
            *(" ".join(str(x.message).split()) for x in caught if "dit_accel" in x.filename),
            *(x for x in lines if x.startswith(NOTE)),
        ]


def installed() -> dict[str, str]:
    """Return the versions of the packages in `SAME`, without the local part such as "+cu128"."""
    return {k: x.split("+")[0] for k, x in versions().items() if k in SAME}


def _actor(*arguments: Any) -> Any:
    """Return the actor class, whose instances hold a `Worker` with these arguments.

    The class is local, so it is pickled by value, and it imports this package inside its functions. If a node lacks a
    package, the error is then returned as data with a clear message and is not a failure of Ray.
    """

    @no_type_check  # also stops jaxtyping, whose checks cannot be pickled
    class GenerateSamples:
        def __init__(self):
            self.failure = None
            try:
                from dit_accel.sampling.ray_engine import Worker

                self.worker = Worker(*arguments)
            except Exception as error:
                self.failure = self.described(error)

        def __call__(self, rows):
            notes = []
            if self.failure is None:
                try:
                    notes = self.worker(int(rows["rank"][0]))
                except Exception as error:
                    self.failure = self.described(error)
            kind, text = self.failure or ("", "")
            return {"kind": [kind], "error": [text], "notes": ["\n".join(notes)]}

        @staticmethod
        def described(error):
            """Return the kind of an error, and its text with the name of the node."""
            import platform

            text = " ".join(str(error).split())
            if not text or not isinstance(error, ValueError | RuntimeError | ImportError | OSError):
                text = f"{type(error).__name__}: {text}"
            kind = "input" if isinstance(error, ValueError | ImportError) else "run"
            return kind, f"node {platform.node()}: {text}"

    return GenerateSamples


def _consume(ray: Any, data: Any) -> None:
    """Wait for all shards, raise the first error of a worker, and show each warning and note once."""
    advice = "finished samples are kept; run it again to resume"
    said = set()
    batches = iter(data.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"))
    try:
        rows = (
            row
            for batch in batches
            for row in zip(batch["kind"], batch["error"], batch["notes"], strict=True)
        )
        for kind, error, notes in rows:
            if kind == "input":
                raise ValueError(str(error))
            if kind:
                raise RuntimeError(str(error))
            for note in str(notes).splitlines():
                if note in said:
                    continue
                said.add(note)
                if note.startswith(NOTE):
                    sys.stderr.write(f"{note}\n")
                else:
                    warnings.warn(note, stacklevel=3)
    except ray.exceptions.RayError as failure:
        raise RuntimeError(f"engine='ray': {_first_line(failure)}; {advice}") from failure
    finally:
        del (
            rows,
            batches,
        )  # Ray Data stops its workers when these are freed, and a traceback would keep them
        _wait_for_executors()


def _wait_for_executors() -> None:
    """Wait until the threads that ran datasets have ended.

    Ray Data itself waits for two seconds only. On a busy machine a thread can then call a Ray that is already shut down,
    which aborts the whole program.
    """
    deadline = time.monotonic() + STOP_S
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _running_ray(ray: Any, address: str | None) -> Iterator[None]:
    """Start Ray or connect to a cluster inside the block, unless Ray is already initialised."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        import ray.data

        _quiet()
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray.data

    _quiet()
    name = "ray_address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host = _split_address(address, name)
    own = {
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
    }  # samples are written to files
    try:
        if host is not None:  # fail quickly; Ray itself tries for minutes
            socket.create_connection(host, timeout=CONNECT_S).close()
        with _native_errors_dropped():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if address == "local" else {}),
            )
    except Exception as error:  # Ray raises a bare Exception if a node does not start in time
        reason = _first_line(error)
        if address == "local":
            raise RuntimeError(
                f"engine='ray': cannot start Ray on this machine ({reason})"
            ) from error
        raise ValueError(
            f"{name}={address!r}: no connection ({reason}); must be auto on a node of a Ray cluster, or host:port of "
            "its head node"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    """Return the first non-empty line of an error message, or the type of the error."""
    lines = (x.strip() for x in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _split_address(address: str, name: str) -> tuple[str, int] | None:
    """Return the host and the port of a cluster address, or None for "auto" and "local".

    Args:
        address: address of a cluster.
        name: name of the argument, for the message.

    Raises:
        ValueError: the address is invalid.
    """
    if address in ("auto", "local"):
        return None
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(
            f"{name}={address!r}: must be auto on a node of a Ray cluster, host:port of its head node, or local"
        )
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _native_errors_dropped() -> Iterator[None]:
    """Discard output of native code to stderr, such as the log level of Ray. Python exceptions are not affected."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet() -> None:
    """Hide messages of Ray Data about its execution. They are still written to its log file."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _resources(ray: Any, device: str, workers: int | None) -> tuple[bool, int]:
    """Return whether workers run on GPUs, and the number of workers.

    Raises:
        ValueError: Ray has no GPU or too few resources.
    """
    found = ray.cluster_resources()
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    if device == "cuda" and not gpus:
        raise ValueError("device='cuda': Ray has no GPU; must be auto or cpu")
    gpu = device != "cpu" and gpus > 0
    most, what = (gpus, "GPUs") if gpu else (cpus, "CPUs")
    count = workers or (gpus if gpu else 1)
    if count > most:
        raise ValueError(
            f"workers={count}: must be at most {most}, because Ray has {most} {what} and each worker uses one"
        )
    return gpu, count


@contextlib.contextmanager
def _shared_folder(folder: Path) -> Iterator[Path]:
    """Create the folder and yield a new file in it. Workers check the file to verify that they see the same folder.

    On exit the file is removed, and the folder too if it is new and empty.
    """
    new = [x for x in (folder, *folder.parents) if not x.exists()]
    try:
        token = check_writable(folder, "output_dir") / f".tmp-ray-{secrets.token_hex(8)}"
        try:
            token.touch()
            yield token
        finally:
            token.unlink(missing_ok=True)
    finally:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()


@contextlib.contextmanager
def _followed(folder: Path, like: dict[str, Any], bar: Any) -> Iterator[None]:
    """Update the progress bar from the journals while the block runs.

    Args:
        folder: folder of the sample set.
        like: header values of the journals of this run.
        bar: progress bar.
    """
    done = threading.Event()

    def update() -> None:
        bar.update(max(0, min(bar.total, finished(folder, like)) - bar.n))

    def follow() -> None:
        while not done.wait(POLL_S):
            update()

    thread = threading.Thread(target=follow, name="ray progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        update()
