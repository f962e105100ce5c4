"""A proxy in front of a real service that does to its traffic what networks do. Knows TCP, and of HTTP how to count."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

DELAY_S = 1.0  # of each piece of an answer
TRICKLE_S = 0.02  # between two bytes
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER, HEADERS = 9, 1


class Fault(StrEnum):
    """What happens to the traffic from now on, that of open connections included."""

    NONE = "none"
    DELAY = "delay"  # answers come late
    DROP = "drop"  # connections are closed as soon as they are made
    REFUSE = "refuse"  # nobody listens
    CUT = "cut"  # connections end in the middle of an answer
    CORRUPT = "corrupt"  # bytes of answers are changed
    BLACK_HOLE = "black hole"  # nothing comes through, and nobody says so
    LOST_ANSWER = "lost answer"  # requests come through, answers do not
    THROTTLE = "throttle"  # answers trickle


FAULTS = tuple(fault for fault in Fault if fault is not Fault.NONE)


class FaultyProxy:
    """Listens on `port` and passes on to `target_port` of this machine, in a thread of its own.

    A connection that has lost bytes is dead for good, also once the fault is over: that is how middleboxes do it.

    Attributes:
        target_port: of the service; may be changed, and counts for new connections.
        calls: requests that came in so far: HTTP/2 streams, and requests of HTTP/1.1.
        connections: connections that were made so far.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.calls = 0
        self.connections = 0
        self._fault = Fault.NONE
        self._flip_at: int | None = None
        self._random = random.Random(0)
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy")
        self._thread.start()
        self.port = 0
        self._do(self._listen())

    @property
    def attempts(self) -> int:
        """Requests, or connections where it does not come to requests."""
        return max(self.calls, self.connections)

    def set(self, fault: Fault) -> None:
        """Begins a fault, or with NONE ends it; in force when this returns."""
        self._do(self._set(fault))

    def flip(self, at: int) -> None:
        """One bit of the next piece of an answer changes: in the byte at this offset, if it has that many."""
        self._flip_at = at

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- In the thread ----------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, fault: Fault) -> None:
        self._fault = fault
        if fault in (Fault.DROP, Fault.REFUSE):
            self._abort_all()
        if fault is Fault.REFUSE and self._server is not None:
            self._server.close()
            self._server = None
        elif fault is not Fault.REFUSE and self._server is None:
            await self._listen()

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(0)  # connections that were accepted just now come to `_accept`
        self._abort_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._opening, return_exceptions=True)
        self._abort_all()  # of ends that came meanwhile
        await asyncio.sleep(0)  # aborted transports close their sockets

    def _abort_all(self) -> None:
        for connection in self._open:
            connection.abort()

    def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        """Not a coroutine: a task that is cancelled before its first line would leave the connection to nobody."""
        self.connections += 1
        connection = _Connection([near])
        self._open.add(connection)
        task = self._loop.create_task(self._serve(connection, reader, near))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._gone(connection))

    def _gone(self, connection: _Connection) -> None:
        connection.abort()
        self._open.discard(connection)

    async def _serve(self, connection: _Connection, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        if self._fault is Fault.DROP:
            return
        with contextlib.suppress(OSError, asyncio.CancelledError):
            opening = self._loop.create_task(asyncio.open_connection("127.0.0.1", self.target_port))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
            opening.add_done_callback(connection.opened)
            far_reader, far = await asyncio.shield(opening)  # cancelled as it is made, it would be left to nobody
            await asyncio.gather(
                self._pump(connection, reader, far, answers=False),
                self._pump(connection, far_reader, near, answers=True),
            )

    async def _pump(
        self, connection: _Connection, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool
    ) -> None:
        while data := await source.read(1 << 16):
            if not answers:
                self.calls += connection.counter.count(data)
            await self._pass(connection, data, sink, answers)
        connection.abort()

    async def _pass(self, connection: _Connection, data: bytes, sink: asyncio.StreamWriter, answers: bool) -> None:
        fault = self._fault
        connection.lost |= fault is Fault.BLACK_HOLE
        connection.answers_lost |= fault is Fault.LOST_ANSWER and answers
        if connection.lost or (answers and connection.answers_lost):
            return
        if answers:
            if fault is Fault.CUT:
                sink.write(data[: len(data) // 2])
                await sink.drain()
                connection.abort()
                return
            if fault is Fault.DELAY:
                await self._until_over(fault, DELAY_S)
            elif fault is Fault.CORRUPT:
                data = bytes(b ^ self._random.randrange(1, 256) if self._random.random() < 0.2 else b for b in data)
            elif fault is Fault.THROTTLE:
                data = await self._trickle(data, sink)
            elif self._flip_at is not None:
                data, self._flip_at = _flipped(data, self._flip_at), None
        sink.write(data)
        await sink.drain()

    async def _trickle(self, data: bytes, sink: asyncio.StreamWriter) -> bytes:
        """What is left of `data` when the fault is over."""
        while data and self._fault is Fault.THROTTLE:
            sink.write(data[:1])
            await sink.drain()
            data = data[1:]
            await asyncio.sleep(TRICKLE_S)
        return data

    async def _until_over(self, fault: Fault, most_s: float) -> None:
        for _ in range(round(most_s / TRICKLE_S)):
            if self._fault is not fault:
                return
            await asyncio.sleep(TRICKLE_S)


@dataclass(eq=False)
class _Connection:
    ends: list[asyncio.StreamWriter]
    counter: _RequestCounter = field(default_factory=lambda: _RequestCounter())
    lost: bool = False  # bytes of it: nothing comes through any more
    answers_lost: bool = False
    aborted: bool = False

    def opened(self, opening: asyncio.Task[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        """The far end is there, or can't be had."""
        if not opening.cancelled() and opening.exception() is None:
            self.ends.append(opening.result()[1])
            if self.aborted:
                self.abort()

    def abort(self) -> None:
        self.aborted = True
        for end in self.ends:
            end.transport.abort()


class _RequestCounter:
    """Counts the requests in what one client sends: request lines of HTTP/1.1, or HEADERS frames of HTTP/2."""

    def __init__(self) -> None:
        self._count: Callable[[bytes], int] | None = None
        self._rest = b""

    def count(self, data: bytes) -> int:
        """How many more there are with `data`."""
        if self._count is None:
            self._count = self._frames if data.startswith(PREFACE[:3]) else self._lines
            self._rest = b""
            if self._count == self._frames:
                data = data[len(PREFACE) :]
        return self._count(data)

    def _lines(self, data: bytes) -> int:
        return data.count(b" HTTP/1.1\r\n")

    def _frames(self, data: bytes) -> int:
        data, found = self._rest + data, 0
        while len(data) >= FRAME_HEADER:
            size = FRAME_HEADER + int.from_bytes(data[:3], "big")
            if len(data) < size:
                break
            found += data[3] == HEADERS
            data = data[size:]
        self._rest = data
        return found


def _flipped(data: bytes, at: int) -> bytes:
    return data if at >= len(data) else data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
