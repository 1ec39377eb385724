"""The agent step: a process of one node that starts agents on behalf of its trainers, and waits for them to end.

An agent that a trainer starts lives in the trainer's process tree: a SLURM step's cgroup, a container, a launcher that
kills all that it sees. Trainers that find RESILIENT_AGENT_STEP in their environment ask the step instead, so that
memory and pending writes outlive them. `resilient agent` runs it; what it is asked is in `checkpoint/agent/step.py`.
Stages: listen in a private folder; start what is asked for; once asked to finish, have the agents end when their
trainers have left and their writes are done, bounded by `grace_s`; end with the last of them.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from resilient.checkpoint.agent.address import SUN_PATH_BYTES, Address, make_private
from resilient.checkpoint.agent.connection import dial
from resilient.checkpoint.agent.protocol import Message, ProtocolError, encode, error_reply, text
from resilient.checkpoint.agent.step import peer_uid, receive
from resilient.errors import LevelFailed, ResilientError, UsageError

GRACE_S = 600.0  # as long as a policy waits for a level's write
STOP_S = 25.0  # an agent that is told to stop takes 10 s for writes and 10 s for its claim
TURN_S = 0.1
_REQUEST_S = 10.0
_REQUESTS = 32
_MOST_PATIENCE_S = 600.0
_ERROR_BYTES = 2000

log = logging.getLogger(__name__)

Action = Literal["serve", "finish", "stop", "kill", "end"]
_SIGNALS = {"finish": signal.SIGTERM, "stop": signal.SIGINT, "kill": signal.SIGKILL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the step knows. `asked_s`: for how long it has been asked to finish; None if it was not."""

    living: int
    started: int
    until_done: bool
    asked_s: float | None
    hurried: bool
    grace_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    reason: str


def decide(facts: Facts) -> Decision:
    """What to do now. `finish`, `stop` and `kill` are each for all living agents, and only once."""
    if facts.asked_s is None:
        if facts.until_done and facts.started and not facts.living:
            return Decision("end", f"all {facts.started} agents have ended")
        return Decision("serve", f"{facts.living} agents live")
    if not facts.living:
        return Decision("end", "asked to finish, and no agent lives")
    over_s = facts.asked_s - facts.grace_s
    if facts.hurried or over_s >= 0:
        if over_s >= STOP_S:
            return Decision("kill", f"{facts.living} agents have not stopped")
        return Decision("stop", "asked again" if facts.hurried else f"{facts.grace_s:g} s of grace are over")
    return Decision("finish", f"asked to finish; {facts.living} agents live")


@dataclass(slots=True, eq=False)
class Child:
    """An agent that the step started."""

    folder: Path
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    told: set[str] = field(default_factory=set)

    def said(self) -> str:
        """The end of what it wrote to its standard error output."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()[-_ERROR_BYTES:]


class AgentStep:
    """One agent step. `run` serves until its end, on one thread; `finish` and `hurry` are for signal handlers, too."""

    def __init__(self, path: Path, *, until_done: bool = False, grace_s: float = GRACE_S) -> None:
        self.path = path.absolute()
        self._until_done = until_done
        self._grace_s = grace_s
        self._children: list[Child] = []
        self._started = 0
        self._changing = threading.Lock()
        self._asked_at: float | None = None
        self._hurried = False
        self._finishing: list[tuple[socket.socket, int]] = []  # who waits for the end

    def run(self, on_ready: Callable[[], None] = lambda: None) -> int:
        """Serve until told to finish, or, with `until_done`, until all agents have ended. Blocks; returns 0.

        `on_ready` is called once trainers can connect. Raises UsageError for a folder that is not private, and
        when another step listens at the path.
        """
        with self._listen() as listener:
            on_ready()
            with ThreadPoolExecutor(_REQUESTS, "agent-step") as requests:
                while not self._turn():
                    with contextlib.suppress(TimeoutError, ConnectionAbortedError):
                        accepted, _ = listener.accept()
                        requests.submit(self._serve, accepted)
            self._answer_finishers()
        return 0

    def finish(self) -> None:
        """Ask the agents to end, each once its trainers have left and its writes are done. Safe to repeat."""
        self._asked_at = self._asked_at or time.monotonic()

    def hurry(self) -> None:
        """As `finish`; the second time the agents do not wait for their trainers, nor for all writes."""
        self._hurried = self._asked_at is not None
        self.finish()

    # ---- the life

    def _listen(self) -> socket.socket:
        if len(os.fsencode(self.path)) > SUN_PATH_BYTES:
            raise UsageError(
                f"{self.path} is too long for a socket ({SUN_PATH_BYTES} bytes at most); name a shorter one"
            )
        make_private(self.path.parent)
        if (other := dial(self.path)) is not None:
            other.close()
            raise UsageError(f"another agent step listens at {self.path}; use that one, or name another --socket")
        fresh = self.path.with_name(f".{secrets.token_hex(4)}")  # renamed, so that nobody finds it before it listens
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(fresh))
        listener.listen(_REQUESTS)
        listener.settimeout(TURN_S)
        fresh.rename(self.path)
        return listener

    def _turn(self) -> bool:
        """Do what is due; whether that is the end."""
        with self._changing:
            self._reap()
            asked_s = None if self._asked_at is None else time.monotonic() - self._asked_at
            decision = decide(
                Facts(
                    living=len(self._children),
                    started=self._started,
                    until_done=self._until_done,
                    asked_s=asked_s,
                    hurried=self._hurried,
                    grace_s=self._grace_s,
                )
            )
            if decision.action == "end":
                log.info("ending: %s", decision.reason)
                self.path.unlink(missing_ok=True)
                return True
            if decision.action != "serve":
                self._tell(decision)
        return False

    def _reap(self) -> None:
        for child in list(self._children):
            status = child.process.poll()
            if status is not None:
                log.log(logging.WARNING if status else logging.INFO, "agent %d: %d", child.process.pid, status)
                self._children.remove(child)

    def _tell(self, decision: Decision) -> None:
        for child in self._children:
            if decision.action not in child.told:
                log.info("agent %d: %s: %s", child.process.pid, decision.action, decision.reason)
                child.told.add(decision.action)
                child.process.send_signal(_SIGNALS[decision.action])

    # ---- requests, each on a thread of the pool

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(_REQUEST_S)
        try:
            if peer_uid(sock) != os.getuid():
                log.warning("a process of user %d was turned away", peer_uid(sock))
            elif (request := receive(sock)) is not None and self._answer(sock, request):
                return
        except (ProtocolError, OSError) as error:
            log.warning("a request that is none: %s", error)
        sock.close()

    def _answer(self, sock: socket.socket, request: Message) -> bool:
        """Whether the answer comes later, with the end; then the socket stays open."""
        number = request.get("id", 0)
        if request.get("op") == "finish":
            with self._changing:
                self._finishing.append((sock, number))
            self.finish()
            return True
        try:
            reply = {"id": number, "ok": True, **self._done(request)}
        except ResilientError as error:
            reply = error_reply(number, error)
        sock.sendall(encode(reply))
        return False

    def _done(self, request: Message) -> Message:
        operation = request.get("op")
        if operation == "start":
            return {"pid": self._start(request)}
        if operation == "status":
            with self._changing:
                return {"agents": [{"folder": str(one.folder), "pid": one.process.pid} for one in self._children]}
        raise ProtocolError(f"there is no operation {operation!r}")

    def _start(self, request: Message) -> int:
        folder, executable = Path(text(request, "folder")), text(request, "executable")
        environment, patience_s = request.get("environment"), request.get("patience_s")
        if not (isinstance(environment, dict) and all(isinstance(value, str) for value in environment.values())):
            raise ProtocolError("environment is no object of texts")
        if not isinstance(patience_s, int | float) or not 0 < patience_s <= _MOST_PATIENCE_S:
            raise ProtocolError(f"patience_s = {patience_s!r}")
        with self._changing:
            if self._asked_at is not None:
                raise LevelFailed("it was asked to finish, and starts no more agents")
            child = self._spawn(folder, executable, environment, patience_s)
        self._wait_until_it_serves(child, time.monotonic() + patience_s)
        return child.process.pid

    def _spawn(self, folder: Path, executable: str, environment: Mapping[str, str], patience_s: float) -> Child:
        command = [executable, "-m", "resilient.checkpoint.agent", str(folder), "--foreground"]
        errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        try:
            process = subprocess.Popen(
                [*command, "--patience", f"{patience_s:.1f}"],
                env=dict(environment),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise LevelFailed(f"{executable} could not be run on this node: {error}") from error
        child = Child(folder, process, errors)
        self._children.append(child)
        self._started += 1
        return child

    def _wait_until_it_serves(self, child: Child, deadline: float) -> None:
        address = Address(folder=child.folder)
        while (sock := dial(address.socket)) is None:
            if child.process.poll() is not None:
                raise LevelFailed(f"the agent could not be started: {child.said() or f'see {address.log}'}")
            if time.monotonic() > deadline:
                child.process.send_signal(signal.SIGINT)
                raise LevelFailed(f"the agent (process {child.process.pid}) did not serve in time; see {address.log}")
            time.sleep(TURN_S / 5)
        sock.close()

    def _answer_finishers(self) -> None:
        for sock, number in self._finishing:
            with contextlib.suppress(OSError), sock:
                sock.sendall(encode({"id": number, "ok": True, "started": self._started}))
