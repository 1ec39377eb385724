"""The thread of a group's lanes: waits for sockets, does what others ask it to, and ticks. Knows nothing of frames."""

import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

TICK_S = 0.1
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """`ready(data, events)` is called for a socket that is watched, `tick(now)` every TICK_S or when `soon` said so.

    `crashed` is called with what any of them raises, which ends the thread, and `ended` last, before calls are refused.
    Methods but `call` and `stop` are for the thread itself.
    """

    def __init__(
        self,
        name: str,
        *,
        ready: Callable[[Any, int], None],
        tick: Callable[[float], None],
        crashed: Callable[[BaseException], None],
        ended: Callable[[], None],
    ) -> None:
        self._ready, self._tick, self._crashed, self._at_end = ready, tick, crashed, ended
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, READ)
        self._next_tick = 0.0
        self._lock = threading.Lock()  # of _ended: what is put into _calls before it is set, is done
        self._ended = False
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, call: Callable[[], None]) -> bool:
        """Have the thread do something, in turn. False: it has ended. From any thread; does not block."""
        with self._lock:
            if not self._ended:
                self._calls.put(call)
                self._wake()
            return not self._ended

    def stop(self) -> None:
        """End the thread and wait for it. From any other thread; again is nothing."""
        self.stopping.set()
        with self._lock:
            if not self._ended:
                self._wake()
        self._thread.join()

    def watch(self, sock: socket.socket, events: int, data: Any) -> None:
        """Wait for `events` of a socket, or for none."""
        try:
            known = self._selector.get_key(sock)
        except KeyError:
            if events:
                self._selector.register(sock, events, data)
            return
        if not events:
            self._selector.unregister(sock)
        elif known.events != events:
            self._selector.modify(sock, events, data)

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed: its number may be another's next."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def soon(self, at: float) -> None:
        """Tick at this time already."""
        self._next_tick = min(self._next_tick, at)

    def pause(self, limit_s: float) -> None:
        """Wait for anything that is watched, and let nobody know."""
        with suppress(OSError, ValueError):
            self._selector.select(limit_s)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it has been woken often enough
            self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            while not self.stopping.is_set():
                for key, events in self._selector.select(max(0.0, self._next_tick - time.monotonic())):
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                    else:
                        self._ready(key.data, events)
                self._drain()
                now = time.monotonic()
                if now >= self._next_tick:
                    self._next_tick = now + TICK_S
                    self._tick(now)
        except BaseException as error:
            self._crashed(error)
            raise
        finally:
            try:
                self._at_end()
            finally:
                with self._lock:
                    self._ended = True
                self._drain()
                self._selector.close()
                self._waker.close()
                self._woken.close()

    def _drain(self) -> None:
        while not self._calls.empty():
            self._calls.get()()
