"""Inside a job: the doctors of all nodes meet, try to reach one another as their agents would, and compare clocks.

They meet at the job's store (torchrun's, or one that rank 0 serves), each node's first rank for its node. Then each
listens at its agent's address, with the agents' own transport and a token of this one examination, and asks all others
for the time. Rank 0 collects what all have found. Every wait is bounded.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Address, Message
from resilient.errors import LevelFailed, ResilientError
from resilient.launch.doctor.finding import Finding, fail, ok
from resilient.launch.doctor.levels import clock_finding
from resilient.launch.doctor.network import own_address
from resilient.launch.doctor.question import Question
from resilient.launch.doctor.storage import outside

Launcher = Literal["torchrun", "mpirun", "srun"]
_NAME = "nodes"
_TOLD = 5  # as many peers are named one by one
_AT_A_TIME = 8
_LIMIT_S = 10.0
_OPEN_THE_WAY = (
    "open the network between the nodes for all ports of agents, or set peer_address to an address that leads there"
)


class Asked(NamedTuple):
    """What came of asking one peer: its clock minus ours, or why it could not be asked."""

    node: str
    skew_s: float
    error: str


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """Who has started this process as one of several; None outside of such a job.

    srun sets PMI_SIZE too, where SLURM is set up so; MPICH's mpirun, which uses srun, has another count of its own.
    """

    def several(*names: str) -> bool:
        return any(environment.get(name, "1") not in ("", "1") for name in names)

    if several("WORLD_SIZE") and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return "torchrun"
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    step = several("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environment
    if several("OMPI_COMM_WORLD_SIZE") or (several("PMI_SIZE") and not (step and environment["PMI_SIZE"] == tasks)):
        return "mpirun"
    return "srun" if step else None


@dataclass(slots=True)
class Meeting:
    """The doctors of a job. Collective: `open`, then `pairs`, then `collect`, by the first rank of each node."""

    store: Any
    rank: int
    world_size: int
    leads: bool
    patience: timedelta
    number: int = 0
    leaders: int = 0

    def open(self) -> list[Finding]:
        """Wait for all ranks, and count the nodes. Those who do not lead have nothing more to do afterwards."""
        if self.leads:
            self.number = self.store.add("leaders", 1)
        if self.store.add("ranks", 1) == self.world_size:
            self.store.set("all", "here")
        if not self.leads:
            return []
        try:
            self.store.wait(["all"], self.patience)
        except RuntimeError:
            here = self.store.add("ranks", 0)
            missing = f"{self.world_size - here} of {self.world_size} ranks did not come within {self.patience}"
            return [fail(_NAME, missing, "look at the launcher's output for ranks that did not start")]
        self.leaders = self.store.add("leaders", 0)
        return []

    def pairs(self, question: Question, node: str) -> list[Finding]:
        """Ask all other nodes for the time. The transport stays open until all have asked."""
        token = self._agree("token", secrets.token_hex(32) if self.rank == 0 else None)
        host = own_address(question)
        try:
            with TcpTransport(node, token, _Clock(), host=host, limit_s=_LIMIT_S) as transport:
                self.store.set(f"node/{self.number}", json.dumps([node, *transport.address]))
                found = self._ask_all(transport)
                self._all_have("asked")
                return found
        except ResilientError as error:
            self.store.set(f"node/{self.number}", json.dumps([node, "", 0]))
            self._all_have("asked")
            return [
                fail(_NAME, f"no agent can listen at {host}: {error}", "set peer_address to an address of this node")
            ]
        except RuntimeError as error:  # the store's, when others do not come
            return [fail(_NAME, f"another node did not do its part: {error}", "look at its output")]

    def collect(self, node: str, findings: Sequence[Finding]) -> dict[str, list[Finding]]:
        """On rank 0 what all nodes have found; elsewhere nothing. Blocks until rank 0 has heard from all."""
        mine = json.dumps([node, [finding.as_json() for finding in findings]])
        self.store.set(f"found/{self.number}", mine)
        if self.rank != 0:
            self._wait("heard")
            return {}
        everything: dict[str, list[Finding]] = {node: list(findings)}
        for number in range(1, self.leaders + 1):
            if number == self.number:
                continue
            if not self._wait(f"found/{number}"):
                told = [fail(_NAME, "it did not report", "look at its output")]
                everything[f"node number {number}"] = told
                continue
            name, told_findings = json.loads(self.store.get(f"found/{number}"))
            everything.setdefault(name, []).extend(map(Finding.from_json, told_findings))
        self.store.set("heard", "all")
        return everything

    def _ask_all(self, transport: TcpTransport) -> list[Finding]:
        others: dict[str, Address] = {}
        names: list[str] = []
        for number in range(1, self.leaders + 1):
            self.store.wait([f"node/{number}"], self.patience)
            name, host, port = json.loads(self.store.get(f"node/{number}"))
            names.append(name)
            if number != self.number and host:
                others[name] = Address(host, port)
        transport.set_peers(others)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            asked = list(pool.map(lambda name: ask(transport, name), others))
        return decide_pairs(asked, names)

    def _agree(self, name: str, value: str | None) -> str:
        if value is not None:
            self.store.set(name, value)
        self.store.wait([name], self.patience)
        text: bytes = self.store.get(name)
        return text.decode()

    def _all_have(self, name: str) -> None:
        if self.store.add(f"{name} so far", 1) == self.leaders:
            self.store.set(name, "all")
        self.store.wait([name], self.patience)

    def _wait(self, name: str) -> bool:
        try:
            self.store.wait([name], self.patience)
        except RuntimeError:
            return False
        return True


def decide_pairs(asked: Sequence[Asked], names: Sequence[str]) -> list[Finding]:
    """From what came of asking the others. `names`: those of all nodes, ours too, even of those that nobody can ask."""
    findings = []
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        told = f"several nodes call themselves {', '.join(doubles)}: each would take another's agent for its own"
        findings.append(fail("node names", told, "give each its own host name, or its own RESILIENT_NODE"))
    others = len(names) - 1
    lost = [f"{one.node}: {one.error}" for one in asked if one.error]
    reached = [one for one in asked if not one.error]
    if len(reached) == others:
        findings.append(ok(_NAME, f"other nodes reached: all {others}" if others else "there is no other node"))
    else:
        told = "; ".join(lost[:_TOLD]) or "they listen nowhere"
        more = f"; and {len(lost) - _TOLD} more" if len(lost) > _TOLD else ""
        count = f"{others - len(reached)} of {others} other nodes not reached"
        findings.append(fail(_NAME, f"{count}: {told}{more}", _OPEN_THE_WAY))
    if reached:
        farthest = max(reached, key=lambda one: abs(one.skew_s))
        findings.append(clock_finding("node clocks", f"the clock of {farthest.node}", farthest.skew_s))
    return findings


def ask(transport: TcpTransport, node: str) -> Asked:
    before = time.time()
    try:
        answer = transport.call(node, {"op": "time"})
    except ResilientError as error:
        return Asked(node, 0.0, str(error))
    return Asked(node, outside(float(answer["time"]), before, time.time(), 0.0), "")


def meet(launcher: Launcher, patience_s: float) -> Meeting:
    """Join the others at the job's store. Sets torchrun's variables where the launcher does not. Blocks.

    Raises UsageError for what is missing, and RuntimeError where the store cannot be reached.
    """
    if launcher == "mpirun":
        from resilient.launch import mpi

        mpi.join()
    elif launcher == "srun":
        from resilient.launch.slurm.ranks import set_rank_variables

        set_rank_variables()
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    patience = timedelta(seconds=patience_s)
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    store = PrefixStore(f"resilient-doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return Meeting(store, rank, world_size, os.environ.get("LOCAL_RANK", "0") == "0", patience)


class _Clock:
    """What a doctor serves to the others: the time."""

    def answer(self, peer: str, message: Message) -> Message:
        return {"time": time.time()}

    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        raise LevelFailed("a doctor lends nothing")

    def take(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        raise LevelFailed("a doctor takes nothing")
