"""The service inside the caller's process: the same use cases and log, no sockets, its own event loop and threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import DeadlineExceeded, Unavailable
from weighting_service import rpc
from weighting_service.app import build_service
from weighting_service.calls import call
from weighting_service.settings import Settings

T = TypeVar("T")

LOADING_WAIT_S = 110.0  # for a reference, below the client's patience with a service in its own process


class EmbeddedService:
    """A weighting service for this process only; without `state_dir`, `close` removes what it learned.

    Raises WeighbridgeError when the state can't be opened.
    """

    def __init__(self, state_dir: Path | None = None, **settings: Any) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="weighbridge-") if state_dir is None else None
        folder = Path(self._temporary.name) if self._temporary else Path(state_dir or "")
        self._service = build_service(Settings(state=folder, **settings), loading_wait_s=LOADING_WAIT_S)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weighbridge-embedded", daemon=True)
        self._thread.start()
        try:
            self._run(self._service.start(), timeout_s=None)
        except BaseException:  # what was opened so far must not stay locked
            self.close()
            raise

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """The answer of one RPC, by its name in the contract. Raises WeighbridgeError."""
        return self._run(self._answer(method, request), timeout_s)

    def watch(self, name: str) -> Iterator[pb.Weighter]:
        """The weighter now and whenever its applied position has moved; ends with an error when the service closes."""
        views = rpc.watch_weighter(self._service, pb.WatchWeighterRequest(name=name))

        async def following() -> pb.Weighter:
            return await anext(views)

        while True:
            yield self._run(following(), timeout_s=None)

    def close(self) -> None:
        """Stops the threads, leaves snapshots, closes the log. Closing twice is no error."""
        if not self._thread.is_alive():
            return
        self._run(self._service.stop(), timeout_s=None)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._temporary:
            self._temporary.cleanup()

    async def _answer(self, method: str, request: Any) -> Any:
        with call(self._service.metrics, method):
            return await rpc.UNARY[method](self._service, request)

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        if not self._thread.is_alive():
            work.close()
            raise Unavailable("the embedded service is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as exc:
            future.cancel()
            raise DeadlineExceeded(f"the embedded service did not answer in {timeout_s:g} s") from exc
