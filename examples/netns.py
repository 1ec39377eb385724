"""Network namespaces that vanish with the process that made them, and programs that run in them.

    with Namespaces() as spaces:
        spaces.make(["a", "b"])
        spaces.ip("a", ["link set lo up"])
        with spaces.launch([Program(name="0", space="a", command=["python", "worker.py"])]) as job:
            outcome = job.wait(60)

A namespace has no name that others could see: this process holds it open, and the kernel removes it, with its cables,
when the last one that holds it is gone, by SIGKILL too. What was started goes the same way. Needs root, iproute2 (`ip`,
`tc`) and util-linux (`nsenter`, `setpriv`). For `examples/fabric.py`; `examples/nodes.py` has nodes of another kind.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

TOOLS = ("ip", "tc", "nsenter", "setpriv")
TIMED_OUT = 124
_CLONE_NEWNET = 0x40000000
# The kernel kills what was started when its parent dies, from the moment on that it was asked to; who died before that
# is no longer the parent.
_UNLESS_ORPHAN = ("sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')
_POLL_S = 0.02
_END_S = 10.0

Result = TypeVar("Result")


class NodesError(RuntimeError):
    """The nodes could not be made or changed; the message says which command failed, and why."""


def can_make_namespaces() -> bool:
    """Whether this process is root, and finds the programs that it needs."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in TOOLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run in which namespace. `bare`: without capabilities; `env` is put over this process's own."""

    name: str
    space: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    bare: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`code`: of the first program that failed (128 + the number of a signal), 124 when time ran out, else 0.

    `outputs`: by the programs' names, what they wrote on both outputs.
    """

    code: int
    codes: Mapping[str, int | None]
    outputs: Mapping[str, str]

    def check(self) -> Self:
        """Raises RuntimeError with all outputs unless everything ended well."""
        if self.code:
            told = "\n".join(f"--- {name} ({self.codes[name]})\n{text}" for name, text in self.outputs.items())
            raise RuntimeError(f"the programs ended with {self.code}\n{told}")
        return self


class Job:
    """Programs that run at the same time; all are ended with the `with` block. One thread at a time.

    Start it from a thread that lives as long: when that thread ends, the kernel kills what it started.
    """

    def __init__(self, prefixes: Mapping[str, Sequence[str]], programs: Sequence[Program]) -> None:
        self._prefixes, self._programs = prefixes, programs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="netns-"))
        self._exit.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._exit.callback(self._end)
        try:
            for program in self._programs:
                self.processes[program.name] = self._start(program)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _start(self, program: Program) -> "subprocess.Popen[bytes]":
        drop = ["setpriv", "--pdeathsig", "KILL"]
        if program.bare:
            drop += ["--bounding-set=-all", "--inh-caps=-all"]
        with self._log(program.name).open("wb") as log:
            return subprocess.Popen(
                [*self._prefixes[program.space], *drop, "--", *_UNLESS_ORPHAN, str(os.getpid()), *program.command],
                env={**os.environ, **program.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def output(self, name: str) -> str:
        """What a program has written so far."""
        return self._log(name).read_text(errors="replace")

    def wait(self, timeout_s: float, *, grace_s: float = 1.0) -> Outcome:
        """Blocks until all have ended, one has failed and the others had `grace_s` to say why, or time is up.

        What still runs then is ended.
        """
        end = time.monotonic() + timeout_s
        while self._running() and time.monotonic() < end:
            if any(process.returncode for process in self.processes.values()):
                end = min(end, time.monotonic() + grace_s)
                grace_s = timeout_s  # once
            time.sleep(_POLL_S)
        late = self._running()
        codes = {name: process.returncode for name, process in self.processes.items()}
        failed = [code if code > 0 else 128 - code for code in codes.values() if code]
        self._end()
        return Outcome(
            code=next(iter(failed), TIMED_OUT if late else 0),
            codes=codes,
            outputs={name: self.output(name) for name in self.processes},
        )

    def _running(self) -> bool:
        return any([process.poll() is None for process in self.processes.values()])  # noqa: C419  poll all of them

    def _end(self) -> None:
        """First politely, so that launchers end what they started; then the whole process group."""
        for number, patience_s in ((signal.SIGTERM, _END_S / 2), (signal.SIGKILL, _END_S)):
            if not self._running():
                break
            for process in self.processes.values():
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                        os.killpg(process.pid, signal.SIGCONT)  # or one that is stopped would not hear it
            end = time.monotonic() + patience_s
            while self._running() and time.monotonic() < end:
                time.sleep(_POLL_S)


class Namespaces:
    """Namespaces by names of this object's own; all are gone after `with`. One thread at a time."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def make(self, names: Sequence[str]) -> None:
        """New namespaces, their loopback up. Raises NodesError where that is not allowed."""
        for name in names:
            self._descriptors[name] = _in_thread(_new_namespace)
            self.ip(name, ["link set lo up"])

    def path(self, name: str) -> str:
        """By which `ip` and `nsenter` reach it, as long as this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptors[name]}"

    def ip(self, name: str, lines: Sequence[str]) -> None:
        """Commands of `ip`, in order. Raises NodesError for the first that fails."""
        run_tool("nsenter", f"--net={self.path(name)}", "ip", "-batch", "-", stdin="\n".join(lines))

    def tc(self, name: str, lines: Sequence[str]) -> None:
        """Commands of `tc`, in order. Raises NodesError for the first that fails."""
        run_tool("nsenter", f"--net={self.path(name)}", "tc", "-batch", "-", stdin="\n".join(lines))

    def cable(self, one: tuple[str, str], other: tuple[str, str], *, mtu: int = 1500) -> None:
        """Join two namespaces by a cable; each end is (namespace, name of its interface), and comes up."""
        (a, a_device), (b, b_device) = one, other
        line = f"link add {a_device} mtu {mtu} netns {self.path(a)} type veth"
        run_tool("ip", *line.split(), *f"peer name {b_device} mtu {mtu} netns {self.path(b)}".split())
        self.ip(a, [f"link set {a_device} up"])
        self.ip(b, [f"link set {b_device} up"])

    def sysctl(self, name: str, settings: Mapping[str, int], *, optional: bool = False) -> None:
        """Settings below net.ipv4, by their names. `optional`: kernels that do not have one go without."""

        def write() -> None:
            for key, value in settings.items():
                path = Path("/proc/sys/net/ipv4") / key
                if path.exists() or not optional:
                    path.write_text(str(value))

        self._inside(name, write)

    def counters(self, name: str) -> dict[str, tuple[int, int]]:
        """Bytes that each interface of a namespace has received and sent so far."""

        def read() -> dict[str, tuple[int, int]]:
            rows = [line.split(":", 1) for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]]
            numbers = {device.strip(): [int(word) for word in words.split()] for device, words in rows}
            return {device: (row[0], row[8]) for device, row in numbers.items()}

        return self._inside(name, read)

    def launch(self, programs: Sequence[Program]) -> Job:
        """A job of programs, which starts when it is entered."""
        return Job({name: ["nsenter", f"--net={self.path(name)}", "--"] for name in self._descriptors}, programs)

    def _inside(self, name: str, work: Callable[[], Result]) -> Result:
        descriptor = self._descriptors[name]

        def enter() -> Result:
            _call("setns", descriptor, _CLONE_NEWNET)
            return work()

        return _in_thread(enter)


def run_tool(*words: str, stdin: str | None = None, check: bool = True) -> str:
    """Run a program and return its output. Raises NodesError with what it said, unless `check` is false."""
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NodesError(f"{words[0]} is missing: install iproute2 and util-linux") from error
    if done.returncode != 0 and check:
        raise NodesError(f"{' '.join(words)}\n{stdin or ''}\n{done.stderr.strip()}")
    return done.stdout


def _new_namespace() -> int:
    _call("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)  # os.unshare and os.setns are there from Python 3.12 on
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise NodesError(f"{name}: {os.strerror(number)}; network namespaces need root")


def _in_thread(work: Callable[[], Result]) -> Result:
    """A thread has a namespace of its own choosing; this one ends, so the process stays where it is."""
    found: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
