"""`RunLock`: allow only one training run at a time in an output folder."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

FILE_NAME = ".lock"


class RunLock:
    """Lock of an output folder. The operating system releases it when the process ends for any reason.

    The lock is an `flock` on the file `FILE_NAME`, so nothing has to be cleaned up after a crash. The file names the
    process that holds the lock. Network file systems must support `flock`, as NFS does since Linux 2.6.12.

    Args:
        folder: output folder of the run. It must exist.

    Raises:
        ValueError: if another run holds the lock. The message names its process and machine.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._file: IO[str] | None = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._close()
            raise ValueError(
                f"output_dir={str(folder)!r}: another run is using this folder ({holder}); use another folder, or wait "
                "until that run has ended"
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()
        # Child processes may outlive the run, such as a tracker service. They must not keep the lock.
        os.register_at_fork(after_in_child=self._close)

    def _holder(self) -> str:
        assert self._file is not None
        self._file.seek(0)
        try:
            about = json.loads(self._file.read())
            return f"process {about['pid']} on {about['host']}"
        except (ValueError, KeyError, TypeError):
            return "unknown process"

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def release(self) -> None:
        """Release the lock, also in child processes that have the file open. May be called twice."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
