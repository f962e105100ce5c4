"""Work of a job that goes on in the background, and answers that are on their way. Knows nothing of services."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class Pending(Generic[Answer]):
    """An answer that is on its way."""

    def __init__(self, future: Future[Answer], waited: Callable[[float], None]) -> None:
        """`waited` is told the seconds that each `result` took."""
        self._future, self._waited = future, waited

    @property
    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def result(self) -> Answer:
        """The answer, once it is there; the same one every time. Raises what the work raised."""
        started = time.perf_counter()
        try:
            return self._future.result()
        finally:
            self._waited(time.perf_counter() - started)


class Background:
    """Does work in the order it came, on one thread that is made when it is first needed."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._last: Future[Any] = finished(lambda: None)

    def submit(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Returns at once; where there is no thread (any more), when the work is done."""
        try:
            self._last = future = self._executor.submit(work)
        except RuntimeError:  # closed, or the process can't start threads any more
            return finished(work)
        return future

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns once all work so far is done, however it ended, or the time is over."""
        wait([self._last], timeout_s)

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the work that it has, which is waited for; later work is done at once."""
        self._executor.shutdown(wait=False)
        self.wait(timeout_s)


def finished(work: Callable[[], Answer]) -> Future[Answer]:
    """What `work` returns or raises, done now."""
    future: Future[Answer] = Future()
    try:
        future.set_result(work())
    except BaseException as exc:
        future.set_exception(exc)
    return future
