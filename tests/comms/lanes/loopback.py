"""Groups of lanes on loopback, all ranks in one process, and relays that can slow, silence or cut a path of one."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from resilient.comms.fabric import multi_plane
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.messages import Operation, Receive, Send, Transfer
from resilient.comms.lanes.opening import open_lanes
from resilient.comms.lanes.spans import Spans
from resilient.comms.lanes.wiring import Address, Planes, Way, Wiring

RATE = 1e8
T = TypeVar("T")


def address(rank: int, path: int) -> str:
    return f"127.1.{rank}.{path + 1}"


def planes(rank: int, paths: int) -> Planes:
    return Planes(tuple(address(rank, path) for path in range(paths)))


def on_all(calls: Sequence[Callable[[], T]], deadline_s: float = 60.0) -> list[T]:
    """Each call in a thread of its own, as ranks would; their results in order, or the first error."""
    pool = ThreadPoolExecutor(len(calls))
    try:
        futures = [pool.submit(call) for call in calls]
        return [future.result(deadline_s) for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def group(
    size: int,
    paths: int = 2,
    *,
    timeout_s: float = 20.0,
    wirings: Sequence[Wiring] | None = None,
    name: str = "g",
    leaf_of: Sequence[int] = (),
) -> Iterator[list[Lanes]]:
    """The lanes of ranks 0 to size - 1. `leaf_of`: if not each on its own."""
    store = dist.HashStore()
    fabric = multi_plane(hosts=size, rates=[RATE] * paths)
    if leaf_of:
        fabric = replace(fabric, leaf_of=tuple(leaf_of))

    def opened(rank: int) -> Lanes:
        wiring = wirings[rank] if wirings is not None else planes(rank, paths)
        return open_lanes(
            store, rank, size, name=name, host=f"host{rank}", fabric=fabric, wiring=wiring, timeout_s=timeout_s
        )

    lanes = on_all([partial(opened, rank) for rank in range(size)])
    try:
        yield lanes
    finally:
        on_all([one.close for one in lanes])


def even(nbytes: int, paths: int) -> list[tuple[int, int, int]]:
    """Pieces of equal size, one a path."""
    at = [nbytes * path // paths for path in range(paths + 1)]
    return [(path, at[path], at[path + 1]) for path in range(paths)]


def send(
    lanes: Lanes, number: int, target: int, content: bytes, *, paths: int, what: str = "send", tag: int = 0
) -> Transfer:
    out = Send(target, tag, Spans(memoryview(content)), even(len(content), paths))
    expected = dict.fromkeys(range(paths), len(content) / paths / RATE)
    return lanes.post(Operation(number, what, expected), [out], [])


def receive(lanes: Lanes, number: int, source: int, into: bytearray, *, what: str = "send", tag: int = 0) -> Transfer:
    return lanes.post(Operation(number, what), [], [Receive(source, tag, Spans(memoryview(into)))])


class Relay:
    """Carries connections to one address, and can be told to be slow, silent or gone. One for each path of a rank."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._server.getsockname()
        self.rate: float | None = None
        self.silent = False
        self.deaf = False  # what comes back is dropped
        self.carried = 0
        self._ends: list[socket.socket] = []
        self._closed = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Break what is there, and take nothing more."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            self._ends += [near, far]
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _hold(self) -> None:
        while self.silent and not self._closed.is_set():
            self._closed.wait(0.01)

    def _carry(self, one: socket.socket, other: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                self._hold()
                part = one.recv(1 << 15)
                self._hold()
                if not part:
                    break
                if counted:
                    self.carried += len(part)
                if self.deaf and not counted:
                    continue
                if counted and self.rate is not None:
                    time.sleep(len(part) / self.rate)
                other.sendall(part)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)  # so that the thread of the other direction ends, and closes it
        one.close()


class Relayed:
    """Planes whose ways to other ranks lead through relays: `relays[peer, path]`, made when first needed."""

    def __init__(self, rank: int, paths: int) -> None:
        self._planes = planes(rank, paths)
        self.relays: dict[tuple[Address, int], Relay] = {}

    @property
    def paths(self) -> int:
        return self._planes.paths

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._planes.addresses

    def ways(self, path: int, peer: Sequence[Address], *, crosses: bool) -> Way:
        target: Address = (peer[path][0], peer[path][1])
        if (target, path) not in self.relays:
            self.relays[target, path] = Relay(target)
        return Way("127.0.0.1", 0, self.relays[target, path].address)

    def on(self, path: int) -> list[Relay]:
        """The relays of a path."""
        return [relay for (_, number), relay in self.relays.items() if number == path]
