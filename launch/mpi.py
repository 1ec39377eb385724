"""Under mpirun: ranks, hosts and who shares memory come from MPI, and torch.distributed from them.

    from resilient.launch import mpi
    place = mpi.init_process_group()      # in place of torch.distributed.init_process_group()

`join` does the same without the process group, for scripts that read torchrun's variables; `mpirun ... resilient mpi
train.py` calls it for them. MPI is used for one exchange at the start and stays the user's afterwards. Needs mpi4py,
and the MPI library that mpirun belongs to. Agents are no matter of this module: `Checkpointer` starts one per node.
"""

import atexit
import json
import os
import socket
import sys
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import accumulate
from types import TracebackType
from typing import Any

from resilient.checkpoint.peers.route import address_towards
from resilient.errors import UsageError
from resilient.policy import PREFIX

__all__ = ["Place", "Report", "check_size", "decide_places", "init_process_group", "join", "shared_variables"]

_LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT_S = 300.0
_TOLD_S = 1.0  # mpirun passes on what a process has printed, but nothing more once the job is aborted
# What these say holds for one node; all other variables of ours hold for the job.
_OF_A_NODE = frozenset({f"{PREFIX}{name}" for name in ("NODE", "RUNTIME_DIR", "PEER_ADDRESS", "AGENT_STEP")})
# Where launchers tell how many processes they have started: Open MPI, MPICH and its kin, srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_held: list[Any] = []  # the store that rank 0 serves lives as long as the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What each rank tells the others. `group`: the lowest rank of those that it shares memory with.

    `host` is a name in the network, `node` what this library calls the node: the same, unless RESILIENT_NODE is set.
    """

    node: str
    group: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process's place in the job. `nodes[r]` is the node of rank r."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: tuple[str, ...]

    @property
    def node(self) -> str:
        return self.nodes[self.rank]

    def variables(self) -> dict[str, str]:
        """The variables by which torchrun tells a worker the same."""
        count = len(dict.fromkeys(self.nodes))
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "GROUP_WORLD_SIZE": str(count),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(self.rank),
            "ROLE_WORLD_SIZE": str(self.world_size),
            "TORCHELASTIC_RUN_ID": "none",  # torchrun's word for a job without a name
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }


def decide_places(reports: Sequence[Report]) -> tuple[Place, ...]:
    """Everybody's place, by rank, from everybody's report. A node is what shares memory and a name.

    Raises UsageError for machines of one name: an agent is found by the name of its node.
    """
    groups: dict[str, int] = {}
    for report in reports:
        if groups.setdefault(report.node, report.group) != report.group:
            raise UsageError(
                f"ranks {groups[report.node]} and {report.group} are both on {report.node!r}, and share no memory: "
                f"two machines or containers have this name; give each its own host name, or its own {PREFIX}NODE"
            )
    nodes = tuple(report.node for report in reports)
    sizes = Counter(nodes)  # in the order of first appearance
    order = list(sizes)
    seen = dict.fromkeys(order, 0)
    places = []
    for rank, node in enumerate(nodes):
        places.append(
            Place(
                rank=rank,
                world_size=len(nodes),
                local_rank=seen[node],
                local_world_size=sizes[node],
                node_rank=order.index(node),
                nodes=nodes,
            )
        )
        seen[node] += 1
    return tuple(places)


def check_size(world_size: int, environment: Mapping[str, str]) -> None:
    """Raise UsageError where MPI does not know of the others that were started: each would be rank 0 of its own job."""
    variable = next((name for name in _SIZES if name in environment), None)
    if variable is not None and world_size == 1 and environment[variable] not in ("", "1"):
        raise UsageError(
            f"{variable} is {environment[variable]}, but the MPI library that mpi4py has loaded does not belong to "
            "that launcher, and sees a job of one process: use the mpirun of the same MPI, or name its library "
            "(libmpi.so) in MPI4PY_LIBMPI"
        )


def shared_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of rank 0's environment what the other ranks are told: not every mpirun carries variables to other machines."""
    return {name: value for name, value in environment.items() if name.startswith(PREFIX) and name not in _OF_A_NODE}


def join() -> Place:
    """Find this process's place among those that mpirun started, and set torchrun's variables accordingly.

    Collective over MPI_COMM_WORLD; blocks until all ranks have called it. Afterwards `init_process_group()` of torch
    works without arguments: rank 0 serves the store, at a port that was free. `RESILIENT_` variables that rank 0 has
    and another rank lacks are set there too (the token, say), but for those of one node. An exception that nobody
    catches ends the whole job from now on, by MPI_Abort, in place of a hang at the end of MPI.

    Raises UsageError where mpi4py or its MPI library is missing or is not that of mpirun, for several machines of one
    name, and where rank 0 knows no address of its own.
    """
    comm = _world()
    check_size(comm.Get_size(), os.environ)
    rank: int = comm.Get_rank()
    reports = _reports(comm)
    place = decide_places(reports)[rank]
    told = _exchange(comm, _serve(reports) if rank == 0 else {})[0]
    if "error" in told:
        raise UsageError(told["error"])
    os.environ.update(place.variables())
    os.environ.update(MASTER_ADDR=told["host"], MASTER_PORT=str(told["port"]), TORCHELASTIC_USE_AGENT_STORE="True")
    for name, value in told["variables"].items():
        os.environ.setdefault(name, value)
    _end_together(comm)
    return place


def init_process_group(backend: str | None = None, timeout: timedelta | None = None) -> Place:
    """`join`, then torch's process group of all ranks: NCCL where every rank has a GPU of its own, else gloo.

    Collective. `timeout` is torch's. Raises what `join` raises, and what torch raises.
    """
    import torch
    import torch.distributed as dist

    place = join()
    own_gpu = torch.cuda.device_count() >= place.local_world_size
    dist.init_process_group(backend or ("nccl" if own_gpu else "gloo"), init_method="env://", timeout=timeout)
    return place


def _world() -> Any:
    """MPI_COMM_WORLD; initialises MPI if nobody has."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UsageError(
            f"mpirun needs a package that is not installed ({error}): pip install 'torch-resilient[mpi]'"
        ) from error
    except RuntimeError as error:  # mpi4py is there, and finds no library
        raise UsageError(
            f"mpi4py finds no MPI library; install one (Open MPI or MPICH), or name its file in MPI4PY_LIBMPI: {error}"
        ) from error
    return MPI.COMM_WORLD


def _reports(comm: Any) -> list[Report]:
    from mpi4py import MPI

    from resilient.checkpoint.agent.address import node_name

    near = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.Get_rank())
    lowest = array("i", [comm.Get_rank()])
    near.Bcast([lowest, MPI.INT], root=0)
    near.Free()
    mine = Report(node=node_name(), group=lowest[0], host=socket.gethostname())
    return [Report(**one) for one in _exchange(comm, asdict(mine))]


def _exchange(comm: Any, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's JSON object, by rank. mpi4py's own way to send objects is pickle."""
    from mpi4py import MPI

    text = bytearray(json.dumps(value).encode())
    sizes = array("i", [0] * comm.Get_size())
    comm.Allgather([array("i", [len(text)]), MPI.INT], [sizes, MPI.INT])
    starts = [0, *accumulate(sizes)][:-1]
    everything = bytearray(sum(sizes))
    comm.Allgatherv([text, MPI.BYTE], [everything, sizes, array("i", starts), MPI.BYTE])
    return [json.loads(everything[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _serve(reports: Sequence[Report]) -> dict[str, Any]:
    """On rank 0: make the store; what the others need to know of it, or the error that they are to raise, too."""
    from torch.distributed import TCPStore

    try:
        elsewhere = next((one.host for one in reports if one.group != reports[0].group), None)
        host = _address(elsewhere, os.environ)
        timeout = timedelta(seconds=_STORE_TIMEOUT_S)
        store = TCPStore(host, 0, len(reports), True, timeout, wait_for_workers=False)
    except (UsageError, OSError, RuntimeError) as error:  # torch's errors of the network are RuntimeErrors
        return {"error": f"rank 0 on {reports[0].node} cannot serve the job's store: {error}"}
    _held.append(store)
    return {"host": host, "port": store.port, "variables": shared_variables(os.environ)}


def _address(elsewhere: str | None, environment: Mapping[str, str]) -> str:
    """The address of this machine for the other ranks. `elsewhere`: another machine; None where there is none."""
    given = environment.get("MASTER_ADDR") or environment.get(f"{PREFIX}PEER_ADDRESS")
    if given or elsewhere is None:
        return given or _LOOPBACK
    for name in (elsewhere, socket.gethostname()):
        with suppress(OSError):
            address = address_towards(name)
            if not ip_address(address).is_loopback:  # as Debian has it for a machine's own name
                return address
    raise UsageError(f"it knows no address that {elsewhere} reaches it at; set MASTER_ADDR to one for mpirun")


def _end_together(comm: Any) -> None:
    """No rank ends alone: the others would wait for it, and it for them at the end of MPI.

    An exception that nobody has caught aborts the job, once it has been told and all else is cleared away. Whoever
    leaves otherwise gives up its process group, which the others notice if they still need it, and waits for them: the
    store that rank 0 serves goes with it.
    """
    before = sys.excepthook
    failed: list[type[BaseException]] = []

    def note(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failed.append(kind)
        before(kind, error, trace)

    def leave() -> None:
        from mpi4py import MPI

        if MPI.Is_finalized():
            return
        if failed:
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(_TOLD_S)
            comm.Abort(1)
        _leave_group()
        comm.Barrier()

    sys.excepthook = note
    atexit.register(leave)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()
    except Exception:  # at the very end of the process nothing can be done about it but to say so
        traceback.print_exc()
