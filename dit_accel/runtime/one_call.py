"""`OneCall`: one call of a transformer at a time."""

import threading

from torch import nn

from dit_accel.runtime.caller import is_inside


class OneCall:
    """Lock of the calls of one transformer. It fails instead of waiting."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: threading.Thread | None = None
        """Thread of the call in progress."""

    def __deepcopy__(self, memo: dict) -> "OneCall":
        return OneCall()  # no call of a copy is in progress

    @property
    def is_mine(self) -> bool:
        """True if the call in progress is one of the current thread."""
        return self._owner is threading.current_thread()

    def enter(self, transformer: nn.Module) -> None:
        """Begin a call in the current thread.

        Raises:
            RuntimeError: another thread is in a call of this transformer.
        """
        me = threading.current_thread()
        with self._guard:
            owner = self._owner
            # After Ctrl-C the hook that ends a call may be skipped. The thread has left the transformer then.
            if owner is not None and owner is not me and is_inside(owner, transformer):
                raise RuntimeError(
                    f"this accelerated transformer is in a call of thread {owner.name!r}: give each thread "
                    "a transformer of its own (copy.deepcopy), or let one wait for the other"
                )
            self._owner = me

    def leave(self) -> None:
        """End the call."""
        self._owner = None
