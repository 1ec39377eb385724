"""Networks on one machine with more than one path: a leaf-spine fabric, and hosts with an interface into each plane.

    with LeafSpine(leaves=2, spines=4, hosts=2, rate="100mbit") as fabric:
        before = fabric.counters()
        fabric.run([sys.executable, "worker.py"]).check()
        fabric.link(0, 2).slow("25mbit")

Hosts, leaves, spines and planes are network namespaces, cables are veth pairs, rates are kept by token buckets. Leaves
spread flows over the spines by a hash of the 5-tuple with a seed of their own, as switches do. Links are called what
`resilient.comms.fabric` calls them: ("up", leaf, path) and ("down", leaf, path); a path is a spine or a plane, and in a
`MultiPlane` every host is a leaf. Needs root (`can_make_namespaces`). One thread at a time.

    host h, interface r   10.<r+1>.<h>.2/24     its switch is .1
    leaf l, spine s       10.255.<l>.<4s+1>/30  the spine is .<4s+2>
"""

import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from examples.netns import Job, Namespaces, NodesError, Outcome, Program

Link = tuple[str, int, int]
PORT = 29500
# Policy 3 hashes the packet's own fields: addresses, ports, protocol (0x37). Policy 1 would take the hash that a packet
# brings along; over a veth that is its socket's random number, drawn anew at every retransmission timeout.
_SWITCH = {"ip_forward": 1, "fib_multipath_hash_policy": 3, "fib_multipath_hash_fields": 0x37, "icmp_ratelimit": 0}
# As routers do, not as hosts do: an error comes from the interface that the packet came in by.
_MAYBE = {"icmp_errors_use_inbound_ifaddr": 1, "icmp_msgs_per_sec": 100_000, "icmp_msgs_burst": 10_000}
# The burst holds the largest packet that the kernel hands over in one piece (64 KiB).
_SHAPER = "qdisc replace dev {device} root tbf rate {rate} burst 70kb latency {queue_ms}ms"
_RULE = 1000  # the first number of rules that discard


class FabricLink:
    """One link, both ways: `fabric.link(leaf, path)`. Each call replaces what an earlier one did."""

    def __init__(self, fabric: "Fabric", leaf: int, path: int) -> None:
        self._fabric, self._at = fabric, (leaf, path)

    def slow(self, rate: str) -> None:
        """Carry no more than e.g. "25mbit" each way."""
        self._fabric.change(*self._at, rate)

    def down(self) -> None:
        """Fail, and be seen to fail: routes lead around it, where there are others."""
        self._fabric.change(*self._at, "down")

    def silence(self) -> None:
        """Discard what comes, both ways, and leave everybody else in the belief that all is well."""
        self._fabric.change(*self._at, "silent")

    def restore(self) -> None:
        """Be as at the start."""
        self._fabric.change(*self._at, "")


class Fabric(ABC):
    """What both networks have in common. They exist inside `with`; nothing is left of them after it or a kill."""

    def __init__(self, hosts: int, leaves: int, rates: Sequence[str], queue_ms: int) -> None:
        if not 1 <= hosts <= 250 or not 1 <= leaves <= 250 or not 1 <= len(rates) <= 60:
            raise ValueError(f"{hosts} hosts, {leaves} leaves, {len(rates)} paths: 1 to 250, 250 and 60 are possible")
        self.hosts, self.leaves, self.paths = hosts, leaves, len(rates)
        self._rates, self._queue_ms = tuple(rates), queue_ms
        self._faults: dict[tuple[int, int], str] = {}
        self.spaces = Namespaces()

    @abstractmethod
    def _build(self) -> None: ...

    @abstractmethod
    def _route(self) -> None:
        """Put up the routes that a routing protocol would find."""

    @abstractmethod
    def _ends(self, leaf: int, path: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """A link's (namespace, interface): towards the hosts, and towards the paths."""

    def __enter__(self) -> Self:
        """Raises NodesError, and then nothing is left."""
        self.spaces.__enter__()
        try:
            self._build()
            for leaf in range(self.leaves):
                for path in range(self.paths):
                    self._shape(leaf, path)
            self._route()
        except BaseException:
            self.spaces.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.spaces.__exit__(kind, error, trace)

    def host(self, host: int) -> str:
        """The name of its namespace."""
        return f"host{host}"

    def address(self, host: int, interface: int = 0) -> str:
        return f"10.{interface + 1}.{host}.2"

    @abstractmethod
    def leaf_of(self, host: int) -> int: ...

    @abstractmethod
    def topology(self) -> str:
        """What `resilient.comms.topology` reads, as it was built: faults are not in it."""

    # -- what happens to links ---------------------------------------------------------

    def link(self, leaf: int, path: int) -> FabricLink:
        if not (0 <= leaf < self.leaves and 0 <= path < self.paths):
            raise ValueError(f"no link from leaf {leaf} to path {path}: {self.leaves} leaves, {self.paths} paths")
        return FabricLink(self, leaf, path)

    def fault(self, leaf: int, path: int) -> str:
        return self._faults.get((leaf, path), "")

    def change(self, leaf: int, path: int, fault: str) -> None:
        """Give a link a fault: "down", "silent" or a lower rate; "" heals it."""
        before, self._faults[leaf, path] = self.fault(leaf, path), fault
        state = "down" if fault == "down" else "up"
        for space, device in self._ends(leaf, path):
            self.spaces.ip(space, [f"link set {device} {state}"])
        self._shape(leaf, path)
        if (before == "silent") != (fault == "silent"):
            verb = "add" if fault == "silent" else "del"
            number = _RULE + leaf * self.paths + path
            for space, device in self._ends(leaf, path):
                self.spaces.ip(space, [f"rule {verb} pref {number} iif {device} blackhole"])
        self._route()

    def _shape(self, leaf: int, path: int) -> None:
        fault = self.fault(leaf, path)
        rate = self._rates[path] if fault in ("", "down", "silent") else fault
        for space, device in self._ends(leaf, path):
            self.spaces.tc(space, [_SHAPER.format(device=device, rate=rate, queue_ms=self._queue_ms)])

    # -- observation --------------------------------------------------------------------

    def counters(self) -> dict[Link, int]:
        """Bytes that each link has carried so far, headers included."""
        carried: dict[Link, int] = {}
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for leaf in range(self.leaves):
            for path in range(self.paths):
                (space, device), _ = self._ends(leaf, path)
                if space not in found:
                    found[space] = self.spaces.counters(space)
                down, up = found[space][device]
                carried["up", leaf, path], carried["down", leaf, path] = up, down
        return carried

    # -- programs -----------------------------------------------------------------------

    def launch(
        self,
        command: Sequence[str],
        *,
        per_host: int = 1,
        hosts: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        bare: bool = False,
    ) -> Job:
        """`per_host` processes a host, called by their ranks, with RANK and the rest set as torchrun does."""
        chosen = list(range(self.hosts)) if hosts is None else list(hosts)
        programs = [
            Program(
                name=str(place * per_host + local),
                space=self.host(host),
                command=command,
                env={
                    **self._environment(chosen, host),
                    "RANK": str(place * per_host + local),
                    "LOCAL_RANK": str(local),
                    "WORLD_SIZE": str(len(chosen) * per_host),
                    **(env or {}),
                },
                bare=bare,
            )
            for place, host in enumerate(chosen)
            for local in range(per_host)
        ]
        return self.spaces.launch(programs)

    def run(
        self,
        command: Sequence[str],
        *,
        per_host: int = 1,
        hosts: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        bare: bool = False,
        timeout_s: float = 60.0,
    ) -> Outcome:
        """The same, waited for."""
        with self.launch(command, per_host=per_host, hosts=hosts, env=env, bare=bare) as job:
            return job.wait(timeout_s)

    def torchrun(
        self,
        command: Sequence[str],
        *,
        per_host: int = 1,
        hosts: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """A job of torchrun's agents, one a host, called by the hosts' numbers; `command` is a script and its words."""
        chosen = list(range(self.hosts)) if hosts is None else list(hosts)
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(chosen)}"]
        launcher += [f"--nproc-per-node={per_host}", f"--master-addr={self.address(chosen[0])}"]
        programs = [
            Program(
                name=str(host),
                space=self.host(host),
                command=[*launcher, f"--master-port={PORT}", f"--node-rank={place}", *command],
                env={**self._environment(chosen, host), **(env or {})},
            )
            for place, host in enumerate(chosen)
        ]
        return self.spaces.launch(programs)

    def _environment(self, chosen: Sequence[int], host: int) -> dict[str, str]:
        """An address is free in every fabric, so one port for all will do."""
        return {
            "MASTER_ADDR": self.address(chosen[0]),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "RESILIENT_NODE": self.host(host),
            "FABRIC_HOST": str(host),
            "FABRIC_ADDRESS": self.address(host),
            "OMP_NUM_THREADS": "1",
        }


class LeafSpine(Fabric):
    """`hosts` in all, dealt out to the leaves in turn: neighbours are on different ones, unless `racks`.

    `rate`: of each leaf-spine link, each way; hosts' own cables have no limit. `seed`: of the hashes, drawn if None.
    `answering`: whether switches answer probes by ICMP.
    """

    def __init__(
        self,
        *,
        leaves: int = 2,
        spines: int = 4,
        hosts: int = 2,
        rate: str = "100mbit",
        seed: int | None = None,
        racks: bool = False,
        answering: bool = True,
        queue_ms: int = 20,
    ) -> None:
        super().__init__(hosts, leaves, [rate] * spines, queue_ms)
        self._racks, self._answering = racks, answering
        self.seed = secrets.randbelow(1 << 24) if seed is None else seed

    def leaf_of(self, host: int) -> int:
        return host * self.leaves // self.hosts if self._racks else host % self.leaves

    def topology(self) -> str:
        lines = ["[leaves]"]
        for leaf in range(self.leaves):
            hosts = [self.host(host) for host in range(self.hosts) if self.leaf_of(host) == leaf]
            lines.append(f"leaf{leaf} = {hosts}")
        lines += ["[addresses]", *(f'{self.host(host)} = ["{self.address(host)}"]' for host in range(self.hosts))]
        for spine in range(self.paths):
            hops = [f"10.255.{leaf}.{4 * spine + 2}" for leaf in range(self.leaves)]
            lines += ["[[paths]]", f'name = "spine{spine}"', f'rate = "{self._rates[spine]}"', f"hops = {hops}"]
        return "\n".join(lines) + "\n"

    def reseed(self, seed: int | None = None) -> None:
        """Hash with other seeds from now on, drawn if None. Flows change their paths, as after a switch's restart."""
        self.seed = secrets.randbelow(1 << 24) if seed is None else seed
        for leaf in range(self.leaves):
            self._sow(leaf)

    def _sow(self, leaf: int) -> None:
        # Linux's hash is symmetric: with one seed for all, both directions of a flow would share a spine. Seeds are
        # there from kernel 6.11 on.
        number = (self.seed * 251 + leaf) % 0xFFFFFFFE + 1
        self.spaces.sysctl(f"leaf{leaf}", {"fib_multipath_hash_seed": number}, optional=True)

    def _build(self) -> None:
        leaves = [f"leaf{leaf}" for leaf in range(self.leaves)]
        spines = [f"spine{spine}" for spine in range(self.paths)]
        self.spaces.make([*leaves, *spines, *(self.host(host) for host in range(self.hosts))])
        for switch in (*leaves, *spines):
            self.spaces.sysctl(switch, _SWITCH)
            self.spaces.sysctl(switch, _MAYBE, optional=True)
            if not self._answering:
                self.spaces.ip(switch, ["rule add pref 1 ipproto icmp blackhole"])
        for host in range(self.hosts):
            _attach(self.spaces, self.host(host), 0, host, f"leaf{self.leaf_of(host)}", f"host{host}")
        for leaf in range(self.leaves):
            self._sow(leaf)
            for spine in range(self.paths):
                self.spaces.cable((f"leaf{leaf}", f"spine{spine}"), (f"spine{spine}", f"leaf{leaf}"))
                self._address(leaf, spine)

    def _address(self, leaf: int, spine: int) -> None:
        at = f"10.255.{leaf}."
        self.spaces.ip(f"leaf{leaf}", [f"addr replace {at}{4 * spine + 1}/30 dev spine{spine}"])
        self.spaces.ip(f"spine{spine}", [f"addr replace {at}{4 * spine + 2}/30 dev leaf{leaf}"])

    def _ends(self, leaf: int, path: int) -> tuple[tuple[str, str], tuple[str, str]]:
        return (f"leaf{leaf}", f"spine{path}"), (f"spine{path}", f"leaf{leaf}")

    def _route(self) -> None:
        for leaf in range(self.leaves):
            lines = [self._towards(leaf, host) for host in range(self.hosts) if self.leaf_of(host) != leaf]
            self.spaces.ip(f"leaf{leaf}", lines)
        for spine in range(self.paths):
            lines = []
            for host in range(self.hosts):
                leaf = self.leaf_of(host)
                via = f"via 10.255.{leaf}.{4 * spine + 1}"
                kind = f"blackhole 10.1.{host}.0/24" if self.fault(leaf, spine) == "down" else f"10.1.{host}.0/24 {via}"
                lines.append(f"route replace {kind}")
            self.spaces.ip(f"spine{spine}", lines)

    def _towards(self, leaf: int, host: int) -> str:
        far = self.leaf_of(host)
        hops = [
            f"nexthop via 10.255.{leaf}.{4 * spine + 2}"
            for spine in range(self.paths)
            if "down" not in (self.fault(leaf, spine), self.fault(far, spine))
        ]
        return f"route replace {'' if hops else 'unreachable '}10.1.{host}.0/24 {' '.join(hops)}"


class MultiPlane(Fabric):
    """`hosts`, each with an interface (eth0, eth1, ...) into each plane, at `rates[plane]` each way."""

    def __init__(self, *, hosts: int = 2, rates: Sequence[str] = ("100mbit", "100mbit"), queue_ms: int = 20) -> None:
        super().__init__(hosts, hosts, rates, queue_ms)

    def leaf_of(self, host: int) -> int:
        return host

    def topology(self) -> str:
        lines = ["[addresses]"]
        for host in range(self.hosts):
            addresses = [self.address(host, plane) for plane in range(self.paths)]
            lines.append(f"{self.host(host)} = {addresses}")
        for plane, rate in enumerate(self._rates):
            lines += ["[[paths]]", f'name = "plane{plane}"', f'interface = "eth{plane}"', f'rate = "{rate}"']
        return "\n".join(lines) + "\n"

    def _build(self) -> None:
        planes = [f"plane{plane}" for plane in range(self.paths)]
        self.spaces.make([*planes, *(self.host(host) for host in range(self.hosts))])
        for plane in planes:
            self.spaces.sysctl(plane, {"ip_forward": 1, "icmp_ratelimit": 0})
        for host in range(self.hosts):
            for number, plane in enumerate(planes):
                _attach(self.spaces, self.host(host), number, host, plane, f"host{host}")

    def _ends(self, leaf: int, path: int) -> tuple[tuple[str, str], tuple[str, str]]:
        return (f"host{leaf}", f"eth{path}"), (f"plane{path}", f"host{leaf}")

    def _route(self) -> None:
        """A link that went down took the host's route with it."""
        for host in range(self.hosts):
            lines = [
                f"route replace 10.{plane + 1}.0.0/16 via 10.{plane + 1}.{host}.1"
                for plane in range(self.paths)
                if self.fault(host, plane) != "down"
            ]
            self.spaces.ip(self.host(host), lines)


def _attach(spaces: Namespaces, space: str, number: int, host: int, switch: str, port: str) -> None:
    """A host's interface `number`, and the port of the switch that it is plugged into."""
    net = f"10.{number + 1}"
    spaces.cable((space, f"eth{number}"), (switch, port))
    spaces.ip(space, [f"addr add {net}.{host}.2/24 dev eth{number}"])
    spaces.ip(space, [f"route add {net}.0.0/16 via {net}.{host}.1"])
    spaces.ip(switch, [f"addr add {net}.{host}.1/24 dev {port}"])


__all__ = ["Fabric", "FabricLink", "LeafSpine", "Link", "MultiPlane", "NodesError"]
