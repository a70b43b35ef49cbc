"""A thread of a writer's own, and the lock of its run: both go with the writer, however it goes."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable

from vistvis.store.folders import Lock

# How long an interrupt waits for the site at hand. If that takes longer, the lock goes with it.
_PATIENCE = 10.0


class Background:
    """Does tasks in their order, while at most `size` wait; after the first `error` none.

    It must know nothing of the writer, so that one out of use, without `close` or interrupted in
    it, can be collected; `weakref.finalize(writer, background.end)` does the rest then.

    Signals: what the caller's side waits for is a `SimpleQueue`, in C. The locks of `queue.Queue`
    and of semaphores are Python, and an interrupt within may leave them held; one in `Thread.join`
    makes Python 3.11 take the thread for ended.
    """

    def __init__(self, size: int, lock: Lock | None) -> None:
        self.lock, self.process = lock, os.getpid()
        self.error: BaseException | None = None
        self.closed = False  # takes no more tasks
        self.abandoned = False  # does no more than the one at hand
        self._size = size
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each task begun
        self._stopped: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = False
        self._thread = threading.Thread(target=self._run, name="vistvis writer", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._running = True

    def put(self, task: Callable[[], None]) -> bool:
        """Hand over a task, after waiting for room; whether it was taken."""
        while not self.closed and self._tasks.qsize() >= self._size:
            self._taken.get()
        if not self.closed:
            self._tasks.put(task)
        return not self.closed

    def join(self) -> None:
        """Take no more tasks, and wait until all are done."""
        self.closed = True
        self._tasks.put(None)
        self._wait(math.inf)

    def end(self) -> None:
        """Do no more than the task at hand, and let go of the lock; any number of times."""
        if os.getpid() != self.process:  # a forked child has neither the thread nor the lock
            return
        self.closed = self.abandoned = True
        self._tasks.put(None)
        if self._thread is not threading.current_thread():  # a collector of garbage may be in it
            self._wait(_PATIENCE)
        if not self._running:
            self._release()

    def _wait(self, seconds: float) -> None:
        """Until the thread has done its last task, or for so long."""
        end = time.monotonic() + seconds
        while self._running and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._stopped.get(timeout=min(left, 1))  # one may be taken by another waiter

    def _release(self) -> None:
        if self.lock:
            self.lock.release()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._taken.put(None)
            try:
                if self.error is None and not self.abandoned:
                    task()
            except BaseException as error:
                self.error = error
            # The last reference must not outlive the work: it may hold memory of the device.
            del task
        if self.abandoned:  # else the writer still needs the lock
            self._release()
        self._running = False
        self._stopped.put(None)
