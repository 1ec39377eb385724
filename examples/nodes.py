"""Test hosts on one machine: start programs on them, kill a host, cut or slow its cable, add a spare.

    with Nodes(3) as nodes:
        nodes.start("n1", ["python", "trainer.py"])
        nodes.kill("n1")
        spare = nodes.add()

As root each node is a network namespace with an address of its own, cabled (a veth pair) to one switch (a bridge in
one more namespace, so that no firewall rule of this machine applies to it). This process is the login node: it reaches
all nodes at `address(n)`, and they reach it at `login_address`, whichever of them lives. Needs iproute2 (`ip`, `tc`).
Elsewhere the nodes are processes on the loopback interface, told apart by their environment alone: they can be killed
and replaced, but have no cables. Processes of all nodes see one file system, and one another's process numbers.

Used by tests and by `examples/multinode.py`, which starts a training job on such nodes. One thread at a time.
"""

import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from examples.netns import NodesError, run_tool

FIRST_HOST = 100  # addresses of three digits each: their order as text is the order in which nodes were added
LAST_HOST = 254
KILL_DEADLINE_S = 20.0
POLL_S = 0.01
SUBNET_ATTEMPTS = 20
# The burst holds the largest packet that the kernel hands over in one piece (64 KiB).
SHAPER = "root tbf rate {rate} burst 128kb latency 50ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One living node. `folder` is its own; `space` the inode of its network namespace, None on loopback."""

    name: str
    address: str
    folder: Path
    space: int | None


class Nodes:
    """`count` nodes called n1, n2, ...; they exist inside `with`, and nothing of them is left after it.

    `isolated`: as network namespaces (True; NodesError where that is impossible), on loopback (False), or whichever
    this process may have (None).
    """

    def __init__(self, count: int, *, isolated: bool | None = None) -> None:
        if not 1 <= count <= LAST_HOST - FIRST_HOST:
            raise ValueError(f"{count} nodes: 1 to {LAST_HOST - FIRST_HOST} are possible")
        self.isolated = can_isolate() if isolated is None else isolated
        self.login_address = ""
        self._count = count
        self._id = f"rs{secrets.token_hex(3)}"
        self._nodes: dict[str, _Node] = {}
        self._added = 0
        self._started: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        """Make the switch and the nodes. Raises NodesError, and then nothing is left."""
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._id}-"))  # short: sockets stand in it
            self._exit.callback(shutil.rmtree, self._folder, ignore_errors=True)
            if self.isolated:
                self._subnet = self._make_switch()
            else:
                self._subnet = f"127.{secrets.randbelow(200) + 1}.{secrets.randbelow(256)}"
            self.login_address = f"{self._subnet}.1"
            self._exit.callback(self._remove_all)
            for _ in range(self._count):
                self.add()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The living nodes, oldest first."""
        return tuple(self._nodes)

    def address(self, node: str) -> str:
        """Its IPv4 address. In the order of text, the address of a younger node comes later."""
        return self._nodes[node].address

    def folder(self, node: str) -> Path:
        """A folder for what belongs to this node alone, its sockets and temporary files; gone when it is killed."""
        return self._nodes[node].folder

    def environment(self, node: str) -> dict[str, str]:
        """What tells a process on which node it is, its sockets' folder and its interface."""
        folder = str(self.folder(node))
        interface = "eth0" if self.isolated else "lo"
        return {
            "RESILIENT_NODE": node,
            "RESILIENT_RUNTIME_DIR": folder,
            "TMPDIR": folder,
            "GLOO_SOCKET_IFNAME": interface,
        }

    def add(self, name: str | None = None) -> str:
        """Add a node and return its name: a fresh one by default, or that of one that was killed (a reboot)."""
        number = self._added + 1
        name = name or f"n{number}"
        if name in self._nodes or not re.fullmatch("[a-z][a-z0-9]{0,11}", name):
            raise ValueError(f"{name!r} is a node already, or no name for one: a letter and up to 11 letters or digits")
        self._added = number
        node = _Node(name=name, address=self._free_address(), folder=self._folder / name, space=None)
        node.folder.mkdir()
        if self.isolated:
            node = self._cable(node)
        self._nodes[name] = node
        return name

    def start(
        self,
        node: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a program on a node, with this process's environment, `env` over it and the node's own over both.

        It is a session of its own, so Ctrl-C does not reach it. Does not block; the caller may wait for it.
        """
        prefix = ["ip", "netns", "exec", self._space_name(node)] if self.isolated else []
        process = subprocess.Popen(
            [*prefix, *command],
            env={**os.environ, **(env or {}), **self.environment(node)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
        )
        self._started.setdefault(node, []).append(process)
        return process

    def processes(self, node: str) -> list[int]:
        """The numbers of all processes that live on the node: what was started, and what that started in turn."""
        found = self._nodes[node]
        pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if self._is_on(found, pid)]

    def kill(self, node: str, *, silent: bool = False) -> None:
        """End every process of a node with SIGKILL, its agent too, and remove the node. Blocks until they are gone.

        Peers see their connections close, as when a machine's processes are killed; with `silent` the cable is cut
        first, and they see nothing at all, as when a machine loses its power. Afterwards nobody answers at its address.
        """
        if silent:
            self.link(node, "down")
        self._end_processes(self._nodes[node])
        if self.isolated:
            run_tool("ip", "netns", "del", self._space_name(node))
            # It would go with the namespace, but later.
            run_tool("ip", "-n", self._switch, "link", "del", node, check=False)
        shutil.rmtree(self._nodes.pop(node).folder, ignore_errors=True)

    def link(self, node: str, state: str) -> None:
        """Its cable: "down", "up", or a rate in both directions such as "100mbit", which holds until the next "up".

        Raises NodesError on loopback, where there are no cables.
        """
        if not self.isolated:
            raise NodesError("nodes on loopback have no cables: run as root, with iproute2, for network namespaces")
        space = self._space_name(node)
        if state == "down":
            run_tool("ip", "-n", self._switch, "link", "set", node, "down")
            return
        for place, device in ((self._switch, node), (space, "eth0")):
            if state == "up":
                run_tool("tc", "-n", place, "qdisc", "del", "dev", device, "root", check=False)  # there may be none
            else:
                run_tool("tc", "-n", place, "qdisc", "replace", "dev", device, *SHAPER.format(rate=state).split())
        run_tool("ip", "-n", self._switch, "link", "set", node, "up")

    # -- namespaces ----------------------------------------------------------------

    @property
    def _switch(self) -> str:
        return f"{self._id}-switch"

    def _space_name(self, node: str) -> str:
        return f"{self._id}-{self._nodes[node].name}"

    def _make_switch(self) -> str:
        """The bridge and the login node's cable to it; returns the first three numbers of the subnet."""
        run_tool("ip", "netns", "add", self._switch)
        self._exit.callback(run_tool, "ip", "netns", "del", self._switch, check=False)
        bridge = ["link add bridge type bridge", "link set bridge up", f"link add login type veth peer name {self._id}"]
        _batch(
            ["-n", self._switch],
            [*bridge, "link set login master bridge up", f"link set {self._id} netns {os.getpid()}"],
        )
        self._exit.callback(run_tool, "ip", "link", "del", self._id, check=False)
        subnet = _free_subnet()
        _batch([], [f"addr add {subnet}.1/24 dev {self._id}", f"link set {self._id} up"])
        return subnet

    def _cable(self, node: _Node) -> _Node:
        """Make the node's namespace and its cable. An address that is used again has its old MAC: nobody is misled."""
        space = f"{self._id}-{node.name}"
        run_tool("ip", "netns", "add", space)
        try:
            mac = ":".join(f"{number:02x}" for number in (2, 0, *map(int, node.address.split("."))))
            pair = f"link add {node.name} type veth peer name eth0 address {mac} netns {space}"
            _batch(["-n", self._switch], [pair, f"link set {node.name} master bridge up"])
            inside = ["link set lo up", f"addr add {node.address}/24 dev eth0", "link set eth0 up"]
            _batch(["-n", space], inside)
        except BaseException:
            run_tool("ip", "netns", "del", space, check=False)
            raise
        inode = os.stat(f"/run/netns/{space}").st_ino
        return _Node(name=node.name, address=node.address, folder=node.folder, space=inode)

    def _free_address(self) -> str:
        """The next address, in turn; after the last one, those of nodes that are gone are used again."""
        taken = {node.address for node in self._nodes.values()}
        span = LAST_HOST - FIRST_HOST
        turns = ((self._added - 1 + offset) % span for offset in range(span))
        addresses = (f"{self._subnet}.{FIRST_HOST + turn}" for turn in turns)
        free = next((address for address in addresses if address not in taken), None)
        if free is None:
            raise NodesError(f"no address is left: {len(taken)} nodes live")
        return free

    # -- processes ------------------------------------------------------------------

    def _is_on(self, node: _Node, pid: int) -> bool:
        """Whether a process belongs to the node; one that has ended belongs to none."""
        try:
            if node.space is not None:
                return os.stat(f"/proc/{pid}/ns/net").st_ino == node.space
            settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return f"RESILIENT_RUNTIME_DIR={node.folder}".encode() in settings

    def _end_processes(self, node: _Node) -> None:
        deadline = time.monotonic() + KILL_DEADLINE_S
        while pids := self.processes(node.name):
            if time.monotonic() > deadline:
                raise NodesError(f"processes {pids} of node {node.name} do not end")
            for pid in pids:
                self._kill_one(node, pid)
            time.sleep(POLL_S)
        for process in self._started.pop(node.name, []):
            process.wait(KILL_DEADLINE_S)

    def _kill_one(self, node: _Node, pid: int) -> None:
        """SIGKILL to exactly the process that was looked at: a number may be used again, a descriptor is not."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if self._is_on(node, pid):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def _remove_all(self) -> None:
        for node in list(self._nodes.values()):
            try:
                self._end_processes(node)
            finally:
                if self.isolated:
                    run_tool("ip", "netns", "del", self._space_name(node.name), check=False)
                del self._nodes[node.name]


def can_isolate() -> bool:
    """Whether this process may make network namespaces: it is root, and iproute2 is installed."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc"))


def _free_subnet() -> str:
    """The first three numbers of a private /24 that this machine has no route into."""
    routes = json.loads(run_tool("ip", "-json", "-4", "route", "show", "table", "all"))
    taken = [ipaddress.ip_network(route["dst"], strict=False) for route in routes if route["dst"][0].isdigit()]
    for _ in range(SUBNET_ATTEMPTS):
        subnet = f"10.{secrets.randbelow(128) + 64}.{secrets.randbelow(256)}"
        if not any(ipaddress.ip_network(f"{subnet}.0/24").overlaps(network) for network in taken):
            return subnet
    raise NodesError(f"no free private subnet was found in {SUBNET_ATTEMPTS} attempts; see `ip route`")


def _batch(where: list[str], lines: list[str]) -> None:
    run_tool("ip", *where, "-batch", "-", stdin="\n".join(lines))
