"""Keeps this run's claim on the durable URL: taken before rank 0 goes on, beaten on a thread, released at the end.

The claim itself, and what makes it stale, is `levels/claim.py`.
"""

import logging
import threading
from collections.abc import Callable

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
        on_taken: Callable[[ResilientError | None], None],
        on_lost: Callable[["ClaimKeeper", ResilientError], None],
    ) -> None:
        """The callbacks are called on the claiming thread: `on_taken` once, `on_lost` if another job takes the URL."""
        self._open_store = open_store
        self._run_id = run_id
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def release(self, timeout_s: float) -> None:
        """Give the URL back. Waits so long at most; a store that hangs leaves a claim that goes stale by itself."""
        self._ended.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            claim = Claim(self._open_store(), self._run_id)
            claim.take()
        except ResilientError as error:
            self._on_taken(error)
            return
        except Exception as error:  # a store of others may raise anything; the trainer has to hear of it
            self._on_taken(LevelFailed(f"the URL could not be claimed: {type(error).__name__}: {error}"))
            return
        self._on_taken(None)
        while not self._ended.wait(claim.heartbeat_s):
            try:
                claim.beat()
            except LevelFailed as error:
                log.warning("the claim could not be renewed, it is tried again: %s", error)
            except ResilientError as error:
                self._on_lost(self, error)
                return
        try:
            claim.release()
        except ResilientError as error:
            log.warning("the claim could not be released; the next job waits until it is stale: %s", error)
