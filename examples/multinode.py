"""A torchrun job over several nodes, any of which may die: a spare takes the place of a killed one, training goes on.

    python examples/multinode.py --nodes 3 --kill n2 --after-s 5 examples/train_gpt.py --steps 400 --url /tmp/run

`Job` runs torchrun on each of the test hosts of `examples/nodes.py`; this process is the login node. What it takes to
survive the loss of any node, beyond `torchrun --nnodes=N --rdzv-backend=c10d` on each:

- The rendezvous store is here, on the login node, and outlives every node.
- `RENDEZVOUS`: how soon a dead node is known, which decides how soon the others restart.
- `TORCHRUN["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]`: each life has a new store, at its own rank 0. With torchrun's
  default the survivors of rank 0 go on asking the store that died with it.
- `TORCHRUN["TORCH_ELASTIC_WORKER_IDENTICAL"]`: ranks follow from the rendezvous alone. Otherwise the nodes tell each
  other their sizes first, and one that dies just then takes the others with it.
- `worker`: torchrun counts restarts on each node by itself, a spare from 0 on. Trainers that name things by that count
  would never meet, so all get the number of the life instead.
- `Job.poll` starts torchrun again on a living node where it has ended, as happens when rank 0's node dies in the
  moment between the end of a rendezvous and telling its address.

Seen with two and three ranks on two cores, in units of the time after which a dead node is known (here 3 s): trainers
are started again after 1.2 to 2.2, the first new step ends after 2.1 to 3.2; the difference is the start of Python and
torch. It matters little whether peers see connections close or nothing at all, and whether rank 0 is lost. A spare that
stands by gains nothing, since starting one takes no longer than the dead one is waited for.
"""

import argparse
import base64
import io
import json
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.distributed import TCPStore

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder, installed or not

from examples.nodes import Nodes

# A node is taken for dead when its last sign of life is older than interval x attempts; whole seconds only. Three
# attempts are the fewest that work: a node that waits for others writes its sign every one to two intervals, so with
# two attempts living nodes are dropped while they wait, and with a spare about the job restarts for ever.
# read_timeout: the longest that torchrun waits for the address of a rank 0 which died just then, before it gives up.
RENDEZVOUS = "is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=20"
TORCHRUN = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
}
RUN_ID = "multinode"
_RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
STORE_TIMEOUT_S = 20.0
STOP_GRACE_S = 15.0
POLL_S = 0.05
WORKER = "--worker"


class JobFailed(Exception):
    """The job ended otherwise than well, or not in time; the message has the end of a node's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One trainer that was started, on which node and as which rank. `time`: seconds since the epoch."""

    life: int
    rank: int
    node: str
    time: float


class Job:
    """`trainer` (a Python script and its arguments) on all nodes that live when it is entered; on that many always.

    `folder` takes each node's output (`<node>.txt`) and the list of trainers that were started. `max_restarts` is
    torchrun's: how many lives a node may see fail. `rejoins`: how often torchrun itself may be started again on a
    living node where it failed. Leaving it ends what runs of the trainers, but not the nodes, nor their agents.
    One thread at a time.
    """

    def __init__(
        self,
        nodes: Nodes,
        trainer: Sequence[str],
        *,
        folder: Path,
        ranks_per_node: int = 1,
        max_restarts: int = 100,
        rejoins: int = 3,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._nodes = nodes
        self._trainer = [str(Path(trainer[0]).resolve()), *trainer[1:]]
        self._folder = folder
        self._ranks_per_node = ranks_per_node
        self._max_restarts = max_restarts
        self._rejoins_left = rejoins
        self._env = {**TORCHRUN, **(env or {})}
        self._width = 0
        self._endpoint = ""
        self._store: TCPStore | None = None
        self._torchruns: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._width = len(self._nodes.names)
        self._store = _serve_store(self._nodes.login_address)
        self._endpoint = f"{self._nodes.login_address}:{self._store.port}"
        try:
            for node in self._nodes.names:
                self._run_torchrun(node)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def kill(self, node: str, *, silent: bool = False) -> None:
        """Kill a node (see `Nodes.kill`). The others wait for a spare in its place."""
        self._torchruns.pop(node, None)
        self._nodes.kill(node, silent=silent)

    def add_spare(self) -> str:
        """A fresh node joins the job, which restarts with it once the one that it replaces is known to be dead."""
        spare = self._nodes.add()
        self._run_torchrun(spare)
        return spare

    def replace(self, node: str, *, silent: bool = False) -> str:
        """Kill a node and add a spare; returns the spare's name. Does not wait for the restart."""
        self.kill(node, silent=silent)
        return self.add_spare()

    def starts(self, life: int) -> list[Start]:
        """The trainers started so far in a life, in order of rank. Lives count from 0, and may leave out numbers."""
        path = self._folder / "starts.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [start for start in (Start(**json.loads(line)) for line in lines) if start.life == life]
        return sorted(found, key=lambda start: start.rank)

    def newest_life(self) -> int:
        """The last life in which all ranks were started; -1 before the first."""
        path = self._folder / "starts.jsonl"
        lives = [json.loads(line)["life"] for line in path.read_text().splitlines()] if path.exists() else []
        whole = {life for life in lives if lives.count(life) == self._width * self._ranks_per_node}
        return max(whole, default=-1)

    def torchrun_pid(self, node: str) -> int:
        """The process number of torchrun on a living node."""
        return self._torchruns[node].pid

    def poll(self) -> bool:
        """Whether the job has ended well on all living nodes. Raises JobFailed where it has not. Does not block."""
        for node, torchrun in list(self._torchruns.items()):
            if torchrun.poll():
                if self._rejoins_left == 0:
                    raise JobFailed(f"torchrun ended with {torchrun.returncode} on {node}; {self._tail(node)}")
                self._rejoins_left -= 1
                self._run_torchrun(node)
        return all(torchrun.poll() == 0 for torchrun in self._torchruns.values())

    def wait(self, timeout_s: float) -> None:
        """Block until the job has ended well. Raises JobFailed when it fails, or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                running = [node for node, torchrun in self._torchruns.items() if torchrun.poll() is None]
                tails = "\n".join(self._tail(node) for node in running)
                raise JobFailed(f"not ended within {timeout_s:g} s on {', '.join(running)}; {tails}")
            time.sleep(POLL_S)

    def _run_torchrun(self, node: str) -> None:
        """torchrun is the same command everywhere, but for the node's own address."""
        command = [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={self._width}", f"--nproc-per-node={self._ranks_per_node}",
            f"--max-restarts={self._max_restarts}", f"--local-addr={self._nodes.address(node)}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self._endpoint}", f"--rdzv-id={RUN_ID}",
            f"--rdzv-conf={RENDEZVOUS}",
            str(Path(__file__).resolve()), WORKER, self._endpoint, str(self._folder / "starts.jsonl"), *self._trainer,
        ]  # fmt: skip
        with self._output(node).open("ab") as output:
            self._torchruns[node] = self._nodes.start(node, command, env=self._env, output=output)

    def _stop(self) -> None:
        """End torchrun on all nodes, which ends its trainers; by force where that takes too long. Blocks."""
        for torchrun in self._torchruns.values():
            torchrun.terminate()
        deadline = time.monotonic() + STOP_GRACE_S
        for torchrun in self._torchruns.values():
            with suppress(subprocess.TimeoutExpired):
                torchrun.wait(max(0.0, deadline - time.monotonic()))
            torchrun.kill()
            torchrun.wait()
        self._store = None

    def _output(self, node: str) -> Path:
        return self._folder / f"{node}.txt"

    def _tail(self, node: str, lines: int = 40) -> str:
        text = self._output(node).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the last lines of {self._output(node)}:", *text[-lines:]])


def _serve_store(address: str) -> TCPStore:
    """The rendezvous store, listening at this one address only; it lives as long as the object."""
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        descriptor = os.dup(listener.fileno())  # the store closes it
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def worker(endpoint: str, starts: Path, trainer: Sequence[str]) -> None:
    """What torchrun starts: note down that this rank was started, and become the trainer, in the life of all ranks."""
    life = _life(endpoint, os.environ["TORCHELASTIC_RUN_ID"])
    start = Start(life=life, rank=int(os.environ["RANK"]), node=os.environ["RESILIENT_NODE"], time=time.time())
    with starts.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(start)) + "\n")
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life)
    sys.argv[:] = trainer
    runpy.run_path(trainer[0], run_name="__main__")


def _life(endpoint: str, run_id: str) -> int:
    """The round of the rendezvous: the next one begins only after every node has left it, so while this trainer starts
    it stays the same. torchrun keeps it, pickled, in our own store; nothing else tells it to trainers.
    """
    host, port = endpoint.rsplit(":", 1)
    store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))
    return int(_RendezvousReader(io.BytesIO(base64.b64decode(store.get(f"torch.rendezvous.{run_id}")))).load().round)


class _RendezvousReader(pickle.Unpickler):
    """Makes what torchrun's own state consists of, and nothing else: a pickle could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        ours = (module, name) in {(_RENDEZVOUS, "_RendezvousState"), (_RENDEZVOUS, "_NodeDesc")}
        if ours or (module == "datetime" and name in ("datetime", "timedelta", "timezone")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"the rendezvous store holds {module}.{name}, which is no part of torchrun's state"
        )


def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="multinode-") as folder, Nodes(arguments.nodes) as nodes:
        trainer = [arguments.trainer, *arguments.arguments]
        with Job(nodes, trainer, folder=Path(folder), ranks_per_node=arguments.ranks) as job:
            try:
                if arguments.kill:
                    _wait_for_life(job, 0, arguments.timeout_s)
                    time.sleep(arguments.after_s)
                    killed = time.time()
                    spare = job.replace(arguments.kill, silent=arguments.silent)
                    print(f"{arguments.kill} is killed, {spare} takes its place", flush=True)
                    life = _wait_for_life(job, 1, arguments.timeout_s)
                    restarted = max(start.time for start in job.starts(life)) - killed
                    print(f"restarted on {', '.join(nodes.names)} after {restarted:.1f} s", flush=True)
                job.wait(arguments.timeout_s)
            except JobFailed as failure:
                print(failure, file=sys.stderr)
                return 1
        print("ended well on all nodes")
    return 0


def _wait_for_life(job: Job, least: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while job.newest_life() < least:
        if job.poll():
            raise JobFailed("the job had ended before a node could be killed: give it more steps")
        if time.monotonic() > deadline:
            raise JobFailed(f"life {least} did not begin within {timeout_s:g} s")
        time.sleep(POLL_S)
    return job.newest_life()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a trainer under torchrun on several nodes of this machine.")
    add = parser.add_argument
    add("--nodes", type=int, default=2)
    add("--ranks", type=int, default=1, help="ranks on each node")
    add("--kill", metavar="NODE", help="kill this node (n1, n2, ...) and let a spare take its place")
    add("--after-s", type=float, default=5.0, help="that long after all trainers were started")
    add("--silent", action="store_true", help="cut its cable first, so that no peer sees a connection close")
    add("--timeout-s", type=float, default=600.0)
    add("trainer", help="a Python script")
    add("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no node is left behind
        try:
            sys.exit(main(parse()))
        except KeyboardInterrupt:
            sys.exit(130)
