"""A lease on a URL, so that two jobs do not write to one place.

The holder writes `claim.json`, raises a counter in it at every beat, and says whether rank 0 of its job is connected.
How long whoever finds a claim watches it before it takes it over is decided in `patience_with`; clocks of different
hosts are never compared. A store has no compare-and-swap, so two takers at one moment may both believe for a while that
they hold it: the one whose token is not in the file finds out when it reads it back, at the latest at its next beat.
Data is safe meanwhile: every write is atomic.
"""

import json
import secrets
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from resilient.checkpoint.levels.process import ProcessId, is_dead, this_process
from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, NotACheckpoint, UrlInUse

NAME = "claim.json"
FORMAT = "resilient-claim"
_MOST_BYTES = 64 << 10
_ATTEMPTS = 5
_ONE_BEAT = 1.2  # heartbeats within which a holder that lives is seen to be alive
_LOOKS = 10  # at a claim that is watched, in one heartbeat


class Clock(Protocol):
    """What a claim needs of time; the module `time` is one."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What `claim.json` says. `rank_0`: the job's rank 0 is connected to the holder; `launch`: see `Claim`."""

    run_id: str
    token: str
    beat: int
    process: ProcessId
    rank_0: bool = True
    launch: str | None = None

    def text(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a claim has to stand still before it is taken over; 0: it is free now."""

    watch_s: float
    reason: str


def patience_with(
    found: Held, run_id: str, launch: str | None, *, is_dead: bool, heartbeat_s: float, stale_s: float
) -> Patience:
    """How to treat a claim that was `found` by the agent of a run, started by `launch`. Pure.

    `is_dead`: the holder's process is known to be gone, or is the one that asks, for the same run.
    """
    if is_dead:
        return Patience(watch_s=0, reason="its process is gone")
    if found.run_id != run_id:
        return Patience(watch_s=stale_s, reason="another run holds it")
    if not found.rank_0:
        return Patience(watch_s=0, reason="it is of this run, whose rank 0 has left it")
    if launch is not None and found.launch == launch:
        return Patience(watch_s=0, reason="the launcher of this job has ended its trainers, or lost them")
    return Patience(watch_s=_ONE_BEAT * heartbeat_s, reason="a job of this run may be alive elsewhere")


class Claim:
    """One job's claim on a store. One thread at a time; `take` blocks up to stale_s, the rest for one read and write.

    `beat` has to be called every `heartbeat_s` while the claim is held; `take` may be called again after `release`.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        launch: str | None = None,
        clock: Clock = time,
        heartbeat_s: float = 10.0,
        stale_s: float = 60.0,
    ) -> None:
        """`launch` names the start of the job of which all its lives are a part, as the launcher says it."""
        if not 0 < _ONE_BEAT * heartbeat_s <= stale_s:
            raise ValueError(f"heartbeat_s ({heartbeat_s:g}) must be positive and below stale_s ({stale_s:g})")
        self.heartbeat_s = heartbeat_s
        self._store, self._run_id, self._launch = store, run_id, launch
        self._clock, self._stale_s = clock, stale_s
        self._mine: Held | None = None

    def take(self) -> None:
        """Hold the URL on return.

        Raises UrlInUse if another job holds it, NotACheckpoint if claim.json is not a claim (it is left as it is),
        LevelFailed.
        """
        for _ in range(_ATTEMPTS):
            found = self._read()
            if found is not None:
                self._wait_until_free(found)
                if not self._remove_if_still(found):
                    continue
            mine = Held(
                run_id=self._run_id,
                token=secrets.token_hex(16),
                beat=0,
                process=this_process(),
                launch=self._launch,
            )
            try:
                self._store.write(NAME, [memoryview(mine.text())], exclusive=True)
            except FileExistsError:
                continue
            if self._holds(mine):
                self._mine = mine
                return
        raise UrlInUse(
            f"{self._store.url}: other jobs keep taking it; start one job at a time, or give each its own URL"
        )

    def beat(self, *, rank_0: bool = True) -> bool:
        """Say that this job is alive, and whether its rank 0 is connected here; whether the claim is still held.

        It is not where rank 0 has left and a job of the same run, the same job as a rule, has it from elsewhere. Raises
        UrlInUse if it was lost to another job, and LevelFailed.
        """
        assert self._mine is not None, "beat() before take()"
        now = self._read()
        if now is not None and now.token != self._mine.token:
            self._mine = None
            if now.run_id == self._run_id and not rank_0:
                return False
            raise UrlInUse(f"{_told(self._store, now)} took it over; stop this job, or give it another URL")
        following = replace(self._mine, beat=self._mine.beat + 1, rank_0=rank_0)
        # A claim that somebody removed by hand is put back, but only if nobody else is quicker.
        try:
            self._store.write(NAME, [memoryview(following.text())], exclusive=now is None)
        except FileExistsError:
            return self.beat(rank_0=rank_0)
        self._mine = following
        return True

    def release(self) -> None:
        """Give the URL back; removes this job's own claim only. Safe to repeat."""
        mine, self._mine = self._mine, None
        if mine is not None:
            now = self._read()
            if now is not None and now.token == mine.token:
                self._store.delete([NAME])

    def _holds(self, mine: Held) -> bool:
        now = self._read()
        return now is not None and now.token == mine.token

    def _remove_if_still(self, found: Held) -> bool:
        now = self._read()
        if now is None:
            return True
        if now.token != found.token:
            return False
        self._store.delete([NAME])
        return True

    def _wait_until_free(self, found: Held) -> None:
        """Return when `found` may be taken over; raise UrlInUse as soon as it is seen to be alive.

        A holder that rank 0 has left is about to give the URL back, after what it has to write: that is waited for.
        """
        end = self._clock.monotonic() + self._patience(found).watch_s
        beat = found.beat
        while (left := end - self._clock.monotonic()) > 0:
            self._clock.sleep(min(self.heartbeat_s / _LOOKS, left))
            now = self._read()
            if now is None or (now.token == found.token and self._patience(now).watch_s == 0):
                return
            if now.token != found.token or (now.beat != beat and now.rank_0):
                raise UrlInUse(self._refusal(now))
            found = now
        if found.beat != beat:
            raise UrlInUse(self._refusal(found))

    def _patience(self, found: Held) -> Patience:
        is_own = (found.run_id, found.process) == (self._run_id, this_process())  # of an earlier `Claim`
        is_dead = is_own or _known_dead(found.process)
        times = {"heartbeat_s": self.heartbeat_s, "stale_s": self._stale_s}
        return patience_with(found, self._run_id, self._launch, is_dead=is_dead, **times)

    def _refusal(self, now: Held) -> str:
        if now.run_id != self._run_id:
            return f"{_told(self._store, now)} is writing to it; stop that job, or give this one another URL"
        return (
            f"{_told(self._store, now)} lives, and its rank 0 trains: a second job with the same run id; stop that "
            "job, or give this one its own URL or run_id"
        )

    def _read(self) -> Held | None:
        """What is there now. A claim that is replaced between the look at its length and the read is read again."""
        where = f"{self._store.url}/{NAME}"
        for attempt in range(_ATTEMPTS):
            try:
                text = bytearray(min(self._store.size(NAME), _MOST_BYTES))
                self._store.read(NAME, 0, memoryview(text))
                return _parse(bytes(text), where)
            except FileNotFoundError:
                return None
            except (DamagedImage, NotACheckpoint):
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")


def _parse(text: bytes, where: str) -> Held:
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}")
        held = Held(
            run_id=raw["run_id"],
            token=raw["token"],
            beat=int(raw["beat"]),
            process=ProcessId(**raw["process"]),
            rank_0=bool(raw.get("rank_0", True)),
            launch=raw.get("launch"),
        )
        if not isinstance(held.process.pid, int) or not isinstance(held.process.started, int):
            raise ValueError("its process is not numbered")
        return held
    except (ValueError, KeyError, TypeError) as error:
        raise NotACheckpoint(
            f"{where} is no claim of this library ({error!r}); if nothing else uses this place, remove the file, "
            f"or give another URL"
        ) from error


def _known_dead(process: ProcessId) -> bool:
    me = this_process()
    same_place = (process.host, process.boot_id) == (me.host, me.boot_id)
    return same_place and is_dead(process.pid, process.started)


def _told(store: Store, held: Held) -> str:
    return f"{store.url}: the run {held.run_id!r} (process {held.process.pid} on {held.process.host})"
