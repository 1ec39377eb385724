"""Keeps this run's claim on the durable URL: taken before rank 0 goes on, beaten on a thread, released at the end.

`Tenure` is the loop's side: who waits for the claim, and when it is taken, given back and lost. `ClaimKeeper` is the
thread that reads and writes it. The claim itself, and what makes it stale, is `levels/claim.py`.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.protocol import error_reply
from resilient.checkpoint.agent.session import Session
from resilient.checkpoint.agent.writing import Stores
from resilient.checkpoint.levels.claim import Claim
from resilient.checkpoint.levels.store import Store
from resilient.errors import LevelFailed, ResilientError

log = logging.getLogger(__name__)


class ClaimKeeper:
    """One thread that owns the claim. Methods may be called from any thread; only `release` waits."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        run_id: str,
        launch: str | None,
        on_taken: Callable[[ResilientError | None], None],
        on_lost: Callable[["ClaimKeeper", ResilientError | None], None],
    ) -> None:
        """The callbacks are called on the claiming thread: `on_taken` once, `on_lost` if another job takes the URL, or,
        with None, this one's rank 0 from elsewhere.
        """
        self._open_store = open_store
        self._run_id = run_id
        self._launch = launch
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._rank_0 = True
        self._ended = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, *, rank_0: bool) -> None:
        """Whether rank 0 is connected: the claim says so as soon as that changes."""
        if rank_0 != self._rank_0:
            self._rank_0 = rank_0
            self._changed.set()

    def release(self, timeout_s: float) -> None:
        """Give the URL back. Waits so long at most; a store that hangs leaves a claim that goes stale by itself."""
        self._ended = True
        self._changed.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            claim = Claim(self._open_store(), self._run_id, launch=self._launch)
            claim.take()
        except ResilientError as error:
            self._on_taken(error)
            return
        except Exception as error:  # a store of others may raise anything; the trainer has to hear of it
            self._on_taken(LevelFailed(f"the URL could not be claimed: {type(error).__name__}: {error}"))
            return
        self._on_taken(None)
        while self._goes_on(claim.heartbeat_s):
            try:
                if not claim.beat(rank_0=self._rank_0):
                    self._on_lost(self, None)
                    return
            except LevelFailed as error:
                log.warning("the claim could not be renewed, it is tried again: %s", error)
            except ResilientError as error:
                self._on_lost(self, error)
                return
        try:
            claim.release()
        except ResilientError as error:
            log.warning("the claim could not be released; the next job waits until it is stale: %s", error)

    def _goes_on(self, heartbeat_s: float) -> bool:
        """Wait until the next beat is due; whether there is to be one."""
        if not self._ended:
            self._changed.wait(heartbeat_s)
            self._changed.clear()
        return not self._ended


@dataclass(frozen=True, slots=True)
class Tenant:
    """For whom the URL is claimed. `launch`: see `levels/claim.py`; `retries`: of the store's operations."""

    url: str
    run_id: str
    launch: str | None
    retries: int


class Tenure:
    """Whether the URL is this node's to write to. All methods are for the loop's thread; only `close` waits."""

    def __init__(self, loop: Loop, stores: Stores, refuse: Callable[[str | None], None]) -> None:
        """`refuse(reason)`: write nothing more to the URL; with None: write again."""
        self._loop, self._stores, self._refuse = loop, stores, refuse
        self._keeper: ClaimKeeper | None = None
        self._former: ClaimKeeper | None = None  # it may still be on its way back
        self._waiting: list[tuple[Session, int]] = []
        self.is_held = False

    @property
    def keeper(self) -> ClaimKeeper | None:
        """Who holds the claim, or is about to take it."""
        return self._keeper

    def take_for(self, session: Session, request_id: int, tenant: Tenant) -> None:
        """Answer the trainer's request once the URL is claimed, or cannot be: then its session is closed, too."""
        self._waiting.append((session, request_id))
        if self._keeper is None:
            self._keeper = ClaimKeeper(
                lambda: self._stores.get(tenant.url, tenant.retries),
                tenant.run_id,
                tenant.launch,
                on_taken=lambda error: self._loop.post(lambda: self._taken(error)),
                on_lost=lambda keeper, error: self._loop.post(lambda: self.lose(keeper, error)),
            )
            self._keeper.start()

    def forget(self, session: Session) -> None:
        self._waiting = [each for each in self._waiting if each[0] is not session]

    def tell(self, *, rank_0: bool) -> None:
        """Whether rank 0 is connected: the claim says so to whoever wants to take it over."""
        if self._keeper is not None:
            self._keeper.tell(rank_0=rank_0)

    def give_back(self) -> None:
        """Let another job have the URL, if it is held."""
        if self._keeper is not None and self.is_held:
            self.is_held, self._former, self._keeper = False, self._keeper, None
            self._former.release(timeout_s=0)

    def lose(self, keeper: ClaimKeeper, error: ResilientError | None) -> None:
        """Another job has the URL: write nothing more to it, until rank 0 comes back and gets it again.

        Without an error it is the agent of the node that rank 0 has moved to: this one goes on writing.
        """
        if keeper is not self._keeper:
            return  # it was being given back, and what it found in its place may be ours
        self.is_held, self._keeper = False, None
        if error is None:
            log.info("the claim is held by the agent that rank 0 has moved to")
            return
        log.error("the claim is lost: %s", error)
        self._refuse(str(error))

    def close(self, timeout_s: float) -> None:
        for keeper in (self._keeper, self._former):
            if keeper is not None:
                keeper.release(timeout_s)

    def _taken(self, error: ResilientError | None) -> None:
        waiting, self._waiting = self._waiting, []
        self.is_held = error is None
        if error is None:
            self._refuse(None)
        else:
            self._keeper = None
        for session, request_id in waiting:
            if error is None:
                session.send({"id": request_id, "ok": True, "pid": os.getpid()})
            else:
                session.send(error_reply(request_id, error))
                session.close(f"it was refused: {error}")
