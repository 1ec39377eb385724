"""Blocks between two agents against the bare socket, and what else could have carried them.

Two processes on loopback; 4 MiB blocks from a buffer of four into another of four, the same for all: a raw TCP socket
(`sendall` into `recv_into`: the limit), ours (`TcpTransport`: every block is asked for by an authenticated frame;
a push is digested on arrival before it is acknowledged, which the raw socket is spared), asyncio streams, HTTP by
aiohttp, and gloo's send and recv. All take turns in the same two processes; asyncio's and aiohttp's readers leave the
blocks where they are received, though an image would need them in its own memory.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

RAW, READ, PUSH = "raw socket", "ours, read", "ours, push"
TWO_PUSHES, STREAMS, HTTP, GLOO = "ours, push from two threads", "asyncio streams", "aiohttp", "gloo send, recv"
METHODS = (RAW, READ, PUSH, TWO_PUSHES, STREAMS, HTTP, GLOO)
BLOCK_BYTES = 4 << 20
HOST = "127.0.0.1"
_SLOTS = 4


class Carrier(ABC):
    """One way for blocks. Rank 1 serves from when it is made, rank 0 connects and measures."""

    @abstractmethod
    def serve(self, blocks: int) -> int:
        """On rank 1, before each turn: be ready to give, or take, so many blocks. The port to connect to, or 0."""

    @abstractmethod
    def carry(self, port: int, blocks: int) -> None:
        """On rank 0: the turn that is measured, connecting excepted where it is done once."""

    def served(self) -> None:  # noqa: B027  # most have threads for it
        """On rank 1, after `serve` and after its port is known: do what must be done there in the foreground."""

    def close(self) -> None:  # noqa: B027  # some have nothing to close
        """Leave nothing open."""


class Memory:
    """A buffer of a few blocks; block n lies at n modulo their number."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(secrets.token_bytes(BLOCK_BYTES) * _SLOTS))

    def block(self, number: int) -> memoryview:
        begin = number % _SLOTS * BLOCK_BYTES
        return self._bytes[begin : begin + BLOCK_BYTES]


class Raw(Carrier):
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._listening: socket.socket | None = None
        self._sock: socket.socket | None = None
        self._blocks = 0

    def serve(self, blocks: int) -> int:
        self._blocks = blocks
        self._listening = self._listening or socket.create_server((HOST, 0))
        port: int = self._listening.getsockname()[1]
        return port

    def served(self) -> None:
        assert self._listening is not None
        self._sock = self._sock or self._listening.accept()[0]
        self._sock.recv(1)
        for number in range(self._blocks):
            self._sock.sendall(self._memory.block(number))

    def carry(self, port: int, blocks: int) -> None:
        self._sock = self._sock or socket.create_connection((HOST, port))
        self._sock.sendall(b"x")
        for number in range(blocks):
            into = self._memory.block(number)
            while into.nbytes:
                into = into[self._sock.recv_into(into, 0, socket.MSG_WAITALL) :]

    def close(self) -> None:
        for sock in (self._sock, self._listening):
            if sock is not None:
                sock.close()


class Ours(Carrier):
    """`way` is how blocks go: `read` or `push`, by so many threads."""

    def __init__(self, memory: Memory, way: str, threads: int = 1) -> None:
        from resilient.checkpoint.peers.tcp import TcpTransport

        self._memory = memory
        self._threads = threads
        self._carry = {"read": self._read, "push": self._push}[way]
        self._transport = TcpTransport("node", "the token of a benchmark", self, host=HOST)
        self._transport.start()

    def answer(self, peer: str, message: dict[str, Any]) -> dict[str, Any]:
        return message

    @contextlib.contextmanager
    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        yield self._memory.block(offset // BLOCK_BYTES)[:nbytes]

    take = lend

    def serve(self, blocks: int) -> int:
        return self._transport.address.port

    def carry(self, port: int, blocks: int) -> None:
        from resilient.checkpoint.peers.transport import Address

        self._transport.set_peers({"node": Address(HOST, port)})
        shares = [range(first, blocks, self._threads) for first in range(self._threads)]
        helpers = [threading.Thread(target=self._carry, args=(share,)) for share in shares[1:]]
        for helper in helpers:
            helper.start()
        self._carry(shares[0])
        for helper in helpers:
            helper.join()

    def close(self) -> None:
        self._transport.close()

    def _read(self, numbers: range) -> None:
        from resilient.checkpoint.peers.transport import Wanted

        blocks = self._memory.block
        wanted = (Wanted(name="image", offset=each * BLOCK_BYTES, into=blocks(each)) for each in numbers)
        for _ in self._transport.read("node", wanted):
            pass

    def _push(self, numbers: range) -> None:
        from resilient.checkpoint.digest import digest

        expected = [digest(self._memory.block(number)) for number in range(_SLOTS)]
        for each in numbers:
            data = self._memory.block(each)
            self._transport.push("node", "parity", each * BLOCK_BYTES, data, expected[each % _SLOTS])


class Looped(Carrier):
    """A carrier of asyncio: a loop on a thread of the serving rank, one that is made for the turn on the other."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._port = 0

    @abstractmethod
    async def open(self) -> int:
        """Serve; the port."""

    @abstractmethod
    async def fetch(self, port: int, blocks: int) -> None:
        """All blocks, on the asking side."""

    async def end(self) -> None:
        """End what `open` began."""

    def serve(self, blocks: int) -> int:
        self._port = self._port or asyncio.run_coroutine_threadsafe(self.open(), self.loop).result()
        return self._port

    def carry(self, port: int, blocks: int) -> None:
        asyncio.run_coroutine_threadsafe(self.fetch(port, blocks), self.loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Streams(Looped):
    _server: asyncio.Server | None = None

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._give, HOST, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(4):
            writer.write(self.memory.block(int.from_bytes(request)))
            await writer.drain()
        writer.close()

    async def fetch(self, port: int, blocks: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port, limit=BLOCK_BYTES)
        for number in range(blocks):
            writer.write(number.to_bytes(4))
            await reader.readexactly(BLOCK_BYTES)
        writer.close()
        await writer.wait_closed()

    async def end(self) -> None:
        if self._server is not None:
            self._server.close()


class Http(Looped):
    _runner: Any = None

    async def open(self) -> int:
        from aiohttp import web

        async def give(request: web.Request) -> web.Response:
            return web.Response(body=self.memory.block(int(request.match_info["number"])))

        application = web.Application()
        application.router.add_get("/{number}", give)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def fetch(self, port: int, blocks: int) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            for number in range(blocks):
                async with session.get(f"http://{HOST}:{port}/{number}") as response:
                    assert len(await response.read()) == BLOCK_BYTES

    async def end(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


class Gloo(Carrier):
    def __init__(self, memory: Memory) -> None:
        import torch

        self._tensors = [torch.frombuffer(memory.block(number), dtype=torch.uint8) for number in range(_SLOTS)]
        self._blocks = 0

    def serve(self, blocks: int) -> int:
        self._blocks = blocks
        return 0

    def served(self) -> None:
        import torch.distributed as dist

        for number in range(self._blocks):
            dist.send(self._tensors[number % _SLOTS], 0)

    def carry(self, port: int, blocks: int) -> None:
        import torch.distributed as dist

        for number in range(blocks):
            dist.recv(self._tensors[number % _SLOTS], 1)


CARRIERS: dict[str, Callable[[Memory], Carrier]] = {
    RAW: Raw,
    READ: lambda memory: Ours(memory, "read"),
    PUSH: lambda memory: Ours(memory, "push"),
    TWO_PUSHES: lambda memory: Ours(memory, "push", threads=2),
    STREAMS: Streams,
    HTTP: Http,
    GLOO: Gloo,
}


def measure(*, folder: str, methods: list[str], blocks: int, times: int) -> dict[str, float]:
    """Median seconds of each method on rank 0, in turns; the first turn of each does not count. Two ranks."""
    import torch.distributed as dist

    from resilient.checkpoint.peers.listener import NICE

    os.nice(NICE)  # ours serves at this priority: so do all
    memory = Memory()
    carriers = {method: CARRIERS[method](memory) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(times + 1):
        for method, carrier in carriers.items():
            seconds[method].append(_turn(carrier, blocks))
    dist.barrier()
    for rank in (0, 1):  # who connected closes first
        if dist.get_rank() == rank:
            for carrier in carriers.values():
                carrier.close()
        dist.barrier()
    return {method: median(found[1:]) for method, found in seconds.items()}


def _turn(carrier: Carrier, blocks: int) -> float:
    """Seconds on rank 0; rank 1 waits without using a core."""
    import torch.distributed as dist

    asking = dist.get_rank() == 0
    port: list[Any] = [None if asking else carrier.serve(blocks)]
    dist.broadcast_object_list(port, src=1)
    began = time.perf_counter()
    if asking:
        carrier.carry(port[0], blocks)
    else:
        carrier.served()
    elapsed = time.perf_counter() - began
    dist.barrier()
    return elapsed


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    blocks, times = (8, 1) if settings.smoke else (256, 3 if settings.quick else 7)
    for number in range(settings.rounds):
        rounds.begin()
        methods = settings.turned(METHODS, number)
        settings.say(f"transport, round {number + 1} of {settings.rounds}")
        arguments = {"methods": methods, "blocks": blocks, "times": times}
        measured = launch(settings.place, "bench.transport:measure", arguments, ranks=2)
        for method in methods:
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, {"seconds": measured[method], "bytes": float(blocks * BLOCK_BYTES)})
    return [_report(rounds)]


def _report(rounds: Rounds) -> Report:
    raw = rounds.series(RAW, "seconds")
    rows = {method: [ratio(raw, rounds.series(method, "seconds"))] for method in METHODS}
    return Report(
        name="transport",
        title="Blocks of 4 MiB between two agents, against the bare socket",
        columns=("speed / raw socket",),
        rows=rows,
        targets=[Target(what="ours, read: speed / raw socket", value=rows[READ][0], bound=0.9, at_most=False)],
        plotted=("speed / raw socket",),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("a push is digested before it is acknowledged; the other ways verify nothing",),
    )
