"""Questions to peers in the background: one thread for each peer, one question after the other."""

import queue
import threading
from collections.abc import Callable, Collection

from resilient.checkpoint.peers.transport import Message
from resilient.errors import ResilientError

Ask = Callable[[str, Message], Message]
Told = Callable[[str, Message | ResilientError], None]


class Errands:
    """`told(peer, answer or error)` is called on the peer's thread. Any thread may call any method; none blocks."""

    def __init__(self, ask: Ask, told: Told) -> None:
        self._ask = ask
        self._told = told
        self._lock = threading.Lock()
        self._queues: dict[str, queue.SimpleQueue[Message | None]] = {}
        self._closed = False

    def send(self, peer: str, message: Message) -> None:
        with self._lock:
            if self._closed:
                return
            waiting = self._queues.get(peer)
            if waiting is None:
                waiting = self._queues[peer] = queue.SimpleQueue()
                thread = threading.Thread(
                    target=self._run, args=(peer, waiting), name=f"resilient-tell-{peer}", daemon=True
                )
                thread.start()
            waiting.put(message)

    def only(self, peers: Collection[str]) -> None:
        """There will be nothing more to ask of others: their threads end."""
        with self._lock:
            for peer in self._queues.keys() - set(peers):
                self._queues.pop(peer).put(None)

    def close(self) -> None:
        """Does not wait for the thread that is at a question. Safe to repeat."""
        with self._lock:
            self._closed = True
        self.only(())

    def _run(self, peer: str, waiting: "queue.SimpleQueue[Message | None]") -> None:
        while (message := waiting.get()) is not None:
            try:
                answer: Message | ResilientError = self._ask(peer, message)
            except ResilientError as error:
                answer = error
            if not self._closed:
                self._told(peer, answer)
