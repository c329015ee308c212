"""Processes that are killed, and disks that fill up, at every point of writing files."""

import errno
import os
import pickle
import signal
import socket
import sys
import traceback
from pathlib import Path

EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "shutil.rmtree",
    "os.truncate",
}


def in_child(action):
    """Run an action in a forked process: ("returned", value), ("raised", text), ("exited", code) or ("killed", n)."""
    return end_child(*begin_child(action))


def in_children(action, count):
    """Run an action in forked processes that torch.distributed connects; return the outcome of each, see `in_child`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def connected(rank):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(x) for name, x in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return action()

    children = [begin_child(lambda rank=rank: connected(rank)) for rank in range(count)]
    return [end_child(*child) for child in children]


def begin_child(action):
    """Fork a process that runs an action; return its id and the pipe of its outcome, for `end_child`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = ("returned", action())
        except SystemExit as error:
            answer = ("exited", error.code)
        except BaseException:
            answer = ("raised", traceback.format_exc())
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    return child, read


def end_child(child, read):
    """Wait for a process of `begin_child`; return its outcome, see `in_child`."""
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed", os.WTERMSIG(status)
    return pickle.loads(data)


class Writes:
    """Counts the points at which a process writes below a folder, and calls `fault` at one of them.

    Points: Python's own events of opening, renaming and removing; before and after each fsync; before, in the
    middle and after each safetensors file. For forked processes only: an audit hook stays for good.
    """

    def __init__(self, folder, at, fault):
        self.folder, self.at, self.fault = str(folder), at, fault
        self.count = 0
        self.on = True
        sys.addaudithook(self._audit)
        self._patch()

    def _audit(self, event, args):
        if (
            self.on
            and event in EVENTS
            and any(
                isinstance(x, str | os.PathLike) and str(x).startswith(self.folder) for x in args
            )
        ):
            self.point()

    def point(self, half=None):
        self.count += 1
        if self.on and self.count == self.at:
            self.on = False
            if half is not None:
                half()
            self.fault()

    def _patch(self):
        from dit_accel.finetune import shards

        fsync, save_file = os.fsync, shards.save_file

        def noted_fsync(descriptor):
            self.point()
            fsync(descriptor)
            self.point()

        def noted_save(tensors, path, **options):
            def half():
                save_file(tensors, path, **options)
                with open(path, "r+b") as file:
                    file.truncate(Path(path).stat().st_size // 2)

            self.point()
            self.point(half)
            save_file(tensors, path, **options)
            self.point()

        os.fsync = noted_fsync
        shards.save_file = noted_save


def kill():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """Error of writing to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
