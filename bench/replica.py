"""Replication as one would write it: each image goes whole to the process of a partner, which keeps the last two.

What parity is compared with (`bench/parity_steps.py`). The state is copied into one of two own buffers by a thread,
while the next forward and backward pass run; another thread sends it over a plain socket to a process that stands for
the partner node's agent. It is safe when that has all of it. Nothing is verified. Threads and partner run at the low
priority that ours have.
"""

import multiprocessing
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import numpy as np
from torch import Tensor

from bench.peers import Method
from bench.state import Training
from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.peers.listener import NICE
from resilient.checkpoint.priority import run_behind

HOST = "127.0.0.1"
KEPT = 2
_PIECE_BYTES = 4 << 20


def keep(told: "Connection[int, int]", nbytes: int) -> None:
    """The partner's process: takes images of so many bytes, one after the other, each in place of the last but one."""
    run_behind(NICE)
    copies = [private_memory(nbytes) for _ in range(KEPT)]
    with socket.create_server((HOST, 0)) as listening:
        told.send(listening.getsockname()[1])
        sock = listening.accept()[0]
    number = 0
    with sock:
        while receive(sock, copies[number % KEPT]):
            sock.sendall(b"x")
            number += 1


def receive(sock: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False when the other side has ended instead."""
    while into.nbytes:
        count = sock.recv_into(into[:_PIECE_BYTES], 0, socket.MSG_WAITALL)
        if not count:
            return False
        into = into[count:]
    return True


class Copy:
    """One own buffer for the tensors, end to end. Calling it copies them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._sources = [tensor.detach().contiguous().view(-1).numpy().view(np.uint8) for tensor in tensors]
        self.memory = private_memory(sum(source.nbytes for source in self._sources))

    def __call__(self) -> None:
        buffer, begin = np.frombuffer(self.memory, dtype=np.uint8), 0
        for source in self._sources:
            np.copyto(buffer[begin : begin + source.nbytes], source)
            begin += source.nbytes


class Replicated(Method):
    """See the module. A save is safe once the partner has all of it."""

    is_async = True

    def __init__(self, training: Training, folder: Path, *, fsynced: bool) -> None:
        super().__init__(training, folder, fsynced=fsynced)
        tensors = [tensor for part in training.tensors.values() for tensor in part.values()]
        self._copies = [Copy(tensors) for _ in range(KEPT)]
        self._free = threading.Semaphore(KEPT)
        self._copying = ThreadPoolExecutor(1, initializer=run_behind, initargs=(NICE,))
        self._sending = ThreadPoolExecutor(1, initializer=run_behind, initargs=(NICE,))
        self._copied: Future[None] | None = None
        self._saves = 0
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        self._partner = context.Process(target=keep, args=(theirs, self._copies[0].memory.nbytes), daemon=True)
        self._partner.start()
        self._sock = socket.create_connection((HOST, ours.recv()))

    def save(self, step: int) -> Future[float]:
        safe: Future[float] = Future()
        self._copied = self._copying.submit(self._copy, self._copies[self._saves % KEPT], safe)
        self._saves += 1
        self._after.append(safe)
        return safe

    def updating(self) -> AbstractContextManager[object]:
        if self._copied is not None:
            self._copied.result()
        return nullcontext()

    def finish(self) -> None:
        super().finish()
        self._copying.shutdown()
        self._sending.shutdown()
        self._sock.close()
        self._partner.join()

    def _copy(self, copy: Copy, safe: Future[float]) -> None:
        self._free.acquire()  # the partner has what was in this buffer
        copy()
        self._sending.submit(self._send, copy.memory, safe)

    def _send(self, image: memoryview, safe: Future[float]) -> None:
        try:
            self._sock.sendall(image)
            if self._sock.recv(1) != b"x":
                raise ConnectionError("the partner has ended")
        except OSError as error:
            safe.set_exception(error)
        else:
            safe.set_result(perf_counter())
        finally:
            self._free.release()
