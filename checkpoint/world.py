"""The ranks of the job and the node they share, and how ranks agree: through a process group of our own.

Made once, by all ranks together (it makes a gloo group, so that our messages never meet those of the training).
Collectives happen only in the constructor of Checkpointer and in `restore`, on the calling thread; never in the
background.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from resilient import errors
from resilient.checkpoint.agent.address import node_name
from resilient.errors import ResilientError, RestoreError, UsageError

T = TypeVar("T")
_HEAD_BYTES = 2040


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's place. `nodes[r]` is the node of rank r; `group` is None in a world of one."""

    rank: int
    world_size: int
    nodes: tuple[str, ...]
    group: dist.ProcessGroup | None = None

    @property
    def node(self) -> str:
        return self.nodes[self.rank]

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """The ranks on this rank's node, ascending."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.node)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank; all ranks call it. No pickle: peers are not trusted with code."""
        if self.group is None:
            return [json.loads(json.dumps(value))]
        data = json.dumps(value).encode()
        heads = self._all(len(data).to_bytes(8, "little") + data[:_HEAD_BYTES], 8 + _HEAD_BYTES)
        sizes = [int.from_bytes(head[:8], "little") for head in heads]
        longest = max(sizes)
        # Mostly all is said by now: what ranks agree on is short, and every message waits for the slowest of them.
        tails = self._all(data[_HEAD_BYTES:], longest - _HEAD_BYTES) if longest > _HEAD_BYTES else [b""] * len(heads)
        return [json.loads((head[8:] + tail)[:size]) for head, tail, size in zip(heads, tails, sizes, strict=True)]

    def _all(self, data: bytes, length: int) -> list[bytes]:
        """Every rank's bytes, filled up to that length."""
        parts = [torch.empty(length, dtype=torch.uint8) for _ in range(self.world_size)]
        mine = torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)
        dist.all_gather(parts, mine, group=self.group)
        return [part.numpy().tobytes() for part in parts]

    def together(self, work: Callable[[], T], otherwise: type[ResilientError] = RestoreError) -> T:
        """Do this rank's part; return when all ranks have done theirs, and raise on all if it failed on any.

        Another rank's error is raised as the same class if it is one of ours, else as `otherwise`. Collective.
        """
        results: list[T] = []

        def done() -> None:
            results.append(work())

        self.gather_results(done, otherwise)
        return results[0]

    def gather_results(self, work: Callable[[], Any], otherwise: type[ResilientError] = RestoreError) -> list[Any]:
        """As `together`, in the same one message what each rank's part returned: JSON values, in order of rank."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # whatever it is, a user's load_state_dict's too, the other ranks must not wait
            failure = error
        outcomes = self.gather([None if failure is None else [type(failure).__name__, str(failure)], result])
        if failure is not None:
            raise failure
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                raise _error_named(problem[0], otherwise)(f"rank {rank}: {problem[1]}")
        return [value for _, value in outcomes]

    def broadcast(self, data: torch.Tensor, source: int) -> None:
        """Send a uint8 host tensor from one rank to all others, in place; all ranks call it."""
        if self.group is not None:
            dist.broadcast(data, src=source, group=self.group)

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """Give each rank its part, and get what each has for this one; all ranks call it. Empty parts cost little."""
        if self.group is None:
            return list(parts)
        sent = torch.tensor([len(part) for part in parts])
        coming = torch.empty_like(sent)
        dist.all_to_all_single(coming, sent, group=self.group)
        room = torch.empty(int(coming.sum()), dtype=torch.uint8)
        data = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)[: int(sent.sum())]
        dist.all_to_all_single(room, data, coming.tolist(), sent.tolist(), group=self.group)
        return [part.numpy().tobytes() for part in room.split(coming.tolist())]


def _error_named(name: str, otherwise: type[ResilientError]) -> type[Exception]:
    """The class of another rank's error, where it is one of ours."""
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ResilientError) else otherwise


def job_store(name: str) -> dist.Store:
    """What all ranks of the job share, keys of our own below `name`. Several ranks only."""
    return dist.PrefixStore(f"resilient/{name}", dist.distributed_c10d._get_default_store())


def join_world() -> World:
    """Find this rank's place; collective where torch.distributed is initialised.

    Raises UsageError where a launcher announces several ranks but the process group does not exist yet.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() before making the Checkpointer"
            )
        return World(rank=0, world_size=1, nodes=(node_name(),))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return World(rank=0, world_size=1, nodes=(node_name(),))
    group: Any = dist.new_group(backend="gloo")
    alone = World(rank=rank, world_size=world_size, nodes=("",) * world_size, group=group)
    nodes = tuple(alone.gather(node_name()))
    return World(rank=rank, world_size=world_size, nodes=nodes, group=group)
