"""The agent's life: it opens its socket, serves until nobody needs it, finishes what it is writing, and leaves nothing.

It ends when all trainers of the node said so, when none came for as long as the policy says, or when it is asked to
stop, or to finish. What trainers ask for is in `node.py`; how an agent process is started in `start.py` and
`__main__.py`.
"""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable

from resilient.checkpoint.agent.address import Address, drop_lock, make_folder, take_lock
from resilient.checkpoint.agent.loop import READ, Loop
from resilient.checkpoint.agent.node import Node
from resilient.checkpoint.agent.session import Session
from resilient.checkpoint.agent.writing import OpenStore
from resilient.checkpoint.levels.store import Store
from resilient.errors import UsageError

START_IDLE_S = 60.0
EMPTY_IDLE_S = 5.0  # without an image there is nothing to stay for
GRACE_S = 10.0
TURN_S = 0.25
POLL_S = 0.02

log = logging.getLogger(__name__)


def open_level(url: str, retries: int) -> Store:
    """The store behind a level's URL; imported late, for it brings file systems that most agents never need."""
    from resilient.checkpoint.levels.open import open_store

    return open_store(url, retries=retries)


class Agent:
    """One agent. `run` serves until it ends, on one thread; `stop` may be called from any."""

    def __init__(
        self, address: Address, *, open_store: OpenStore = open_level, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.address = address
        self._clock = clock
        self._loop = Loop()
        self._token = secrets.token_hex(32)
        self._node = Node(self._loop, clock, open_store, self._token)
        self._sessions: dict[int, Session] = {}
        self._accepted = 0
        self._alone_since = clock()
        self._stop_asked = self._finish_asked = False  # plain, for signal handlers set them
        self._end_by: float | None = None  # set once it is ending

    def run(self, on_ready: Callable[[], None] = lambda: None, *, patience_s: float = 0.0) -> None:
        """Serve until the agent's end; its folder is gone on return. Blocks.

        `on_ready` is called once trainers can connect. Raises UsageError if another agent lives in the folder, and has
        not ended after `patience_s`.
        """
        alive = self._take_folder(time.monotonic() + patience_s)
        listener = self._listen()
        try:
            on_ready()
            log.info("agent %d serves %s", os.getpid(), self.address.socket)
            while not self._is_over():
                self._turn(listener)
        finally:
            self._close(listener, alive)

    def stop(self) -> None:
        """Finish pending writes, for a bounded time, and end. From any thread and from signal handlers."""
        self._stop_asked = True  # the loop looks at it several times a second

    def finish(self) -> None:
        """End once no trainer is connected and nothing is pending; serve until then. As `stop` may be called."""
        self._finish_asked = True

    def _take_folder(self, deadline: float) -> int:
        while True:
            with contextlib.suppress(FileNotFoundError):  # the agent before us has just removed it: make it again
                make_folder(self.address)
                alive = take_lock(self.address.alive)
                if alive is not None:
                    return alive
            if time.monotonic() >= deadline:
                raise UsageError(f"another agent lives in {self.address.folder}; connect to it, or wait for its end")
            time.sleep(POLL_S)

    def _listen(self) -> socket.socket:
        fresh = self.address.token.with_name("token.new")
        fresh.unlink(missing_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self._token)
        fresh.rename(self.address.token)
        self.address.socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.address.socket))
        listener.listen(64)
        listener.setblocking(False)
        self._loop.watch(listener.fileno(), READ, lambda _: self._accept(listener))
        return listener

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # it went away again, or there is no descriptor left
            return
        self._accepted += 1
        session = Session(self._accepted, sock, self._loop)
        if session.uid != os.getuid():
            log.warning("process %d of user %d was turned away", session.pid, session.uid)
            sock.close()
            return
        self._sessions[session.number] = session
        session.start(self._node.on_message, self._on_closed)

    def _on_closed(self, session: Session, reason: str) -> None:
        self._sessions.pop(session.number, None)
        self._node.on_closed(session, reason)

    def _turn(self, listener: socket.socket) -> None:
        try:
            self._loop.turn(TURN_S)
            self._node.writing.check()
        except Exception:  # a mistake of ours at the end of one job must not cost all ranks their snapshots
            log.exception("something went wrong; the agent goes on")
        if self._end_by is None and (reason := self._reason_to_end()) is not None:
            log.info("ending: %s", reason)
            self._stop_listening(listener)
            for session in [each for each in self._sessions.values() if each.rank is None]:
                session.close("the agent is ending")
            policy = self._node.policy
            self._end_by = self._clock() + GRACE_S + (2 * policy.write_timeout_s if policy else 0.0)
        if self._stop_asked and self._end_by is not None:
            self._end_by = min(self._end_by, self._clock() + GRACE_S)

    def _reason_to_end(self) -> str | None:
        if self._stop_asked:
            return "asked to stop"
        if self._node.is_dismissed:
            return "all trainers have ended and want nothing kept"
        if self._node.by_rank:
            self._alone_since = self._clock()
            return None
        if self._finish_asked:
            return "asked to finish, and no trainer is connected"
        policy = self._node.policy
        idle_s = policy.agent_idle_s if policy else START_IDLE_S
        if policy and self._node.images.total_bytes() == 0:
            idle_s = min(idle_s, EMPTY_IDLE_S)
        alone_s = self._clock() - self._alone_since
        return f"no trainer for {alone_s:.0f} s" if alone_s >= idle_s else None

    def _is_over(self) -> bool:
        return self._end_by is not None and (not self._node.is_busy or self._clock() >= self._end_by)

    def _stop_listening(self, listener: socket.socket) -> None:
        """From here on a new trainer starts another agent, which waits until this one is gone."""
        if listener.fileno() >= 0:
            self._loop.forget(listener.fileno())
            listener.close()
            self.address.socket.unlink(missing_ok=True)

    def _close(self, listener: socket.socket, alive: int) -> None:
        self._stop_listening(listener)
        for session in list(self._sessions.values()):
            session.close("the agent ends")
        self._node.writing.close()
        self._node.protecting.close()
        self._node.images.close()
        self._node.tenure.close(timeout_s=GRACE_S)
        self._loop.close()
        log.info("agent %d has ended", os.getpid())
        self._remove_folder()
        drop_lock(alive)

    def _remove_folder(self) -> None:
        """Leave nothing behind, unless somebody is starting the next agent in the folder just now."""
        with contextlib.suppress(OSError):
            lock = take_lock(self.address.lock)
            if lock is not None:
                shutil.rmtree(self.address.folder, ignore_errors=True)
                drop_lock(lock)
