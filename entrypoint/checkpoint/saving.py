"""A save that is written while training goes on: its thread, and what became of it."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

LEAVE_SECONDS = 10  # a process that ends for another reason does not wait longer for what is being written


class Saving:
    """One save under way, in a thread of its own.

    Args:
        write: does it, in the thread.
        began: monotonic seconds at which training stood still for it.

    Attributes:
        stall: seconds until training could go on.
    """

    def __init__(self, step: int, write: Callable[[Saving], None], began: float) -> None:
        self.step, self.began = step, began
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint-writer", daemon=True)
        self.stall = time.monotonic() - began
        self._thread.start()
        atexit.register(self._leave)

    def result(self, patience: float) -> BaseException | None:
        """What went wrong, once it has ended.

        Raises:
            TimeoutError: it has not, in `patience` seconds.
        """
        self._thread.join(patience)
        atexit.unregister(self._leave)
        if self._thread.is_alive():
            raise TimeoutError(f"step {self.step} was not saved within {patience} s: the storage does not answer")
        return self.error

    def _run(self, write: Callable[[Saving], None]) -> None:
        try:
            write(self)
        except BaseException as error:  # given to whoever asks for the result
            self.error = error

    def _leave(self) -> None:
        self._thread.join(LEAVE_SECONDS)  # native code of a daemon thread must not meet the interpreter's end
