"""DCP's StorageReader over whatever we read: our snapshots from memory or the url, and checkpoints of others.

A rank reads the boxes that DCP's plan wants of it and hardly a byte besides, each block verified. From memory: where
this job's agent on every node has all images of the step (`memory.py`); else from the url.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from resilient.checkpoint.catalog.catalog import Tensor as Described
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.dcp_sink import flattened
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.output import SinkOptions, TensorBytes
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.formats.state_items import tree_of
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.names import complete_steps
from resilient.checkpoint.place import normal_url
from resilient.checkpoint.world import World, join_world
from resilient.errors import UsageError
from resilient.launch.dcp.memory import MemorySource, agent_memory
from resilient.launch.dcp.state import ITEM
from resilient.launch.dcp.steps import names_a_step, step_of
from resilient.policy import Policy

__all__ = ["ResilientReader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which step to load, from "memory", "durable" or "elsewhere": what lies at the url is no snapshot of ours."""

    level: str
    step: int | None
    reason: str


def decide(asked: int | None, in_memory: Sequence[set[int]], durable: set[int]) -> Decision:
    """The step that is asked for, else the newest; from memory where the agents of all ranks have all of it."""
    everywhere = set.intersection(*in_memory)
    known = everywhere | durable
    step = asked if asked is not None else max(known, default=None)
    if step is not None and step in everywhere:
        return Decision(level="memory", step=step, reason=f"step {step} is in the memory of every node")
    if step is not None and step in durable:
        return Decision(level="durable", step=step, reason=f"step {step} is not in the memory of every node")
    return Decision(level="elsewhere", step=asked, reason=f"no snapshot of step {asked}" if asked else "no snapshot")


def _durable(url: str) -> list[int]:
    return list(complete_steps(open_store(url).list()))


class ResilientReader(StorageReader):
    """`dcp.load(sd, storage_reader=ResilientReader(url))`; `checkpoint_id=step` for another than the newest.

    `policy`: as that of the writer, for its `run_id`. All ranks use it together, unless `alone`: then this process
    reads by itself (`dcp.load(..., no_dist=True)`), from the url. One load at a time.
    """

    def __init__(self, url: str, policy: Policy | None = None, *, alone: bool = False) -> None:
        if not isinstance(url, str | os.PathLike) or not os.fspath(url):
            raise UsageError(f"ResilientReader({url!r}): give the url of the run")
        self._url = os.fspath(url)
        self._policy = policy
        self._alone = alone
        self._world: World | None = None
        self._step: int | None = None
        self._source: Source | None = None
        self._leaves: dict[str, Any] = {}

    def reset(self, checkpoint_id: object = None) -> None:
        self._close()
        self._step = None if checkpoint_id is None else step_of(checkpoint_id)

    def read_metadata(self, **options: Any) -> Metadata:
        """Raises what opening a checkpoint does; DCP tells it as the cause of an error of its own, on all ranks."""
        self._close()
        self._source = source = self._open()
        self._leaves, paths = _leaves_of(source)
        described = {name: _described(leaf, source) for name, leaf in self._leaves.items()}
        return Metadata(state_dict_metadata=described, planner_data=paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Blocks until all is read. Raises DamagedImage, which names the tensors, and LevelFailed."""
        try:
            for item in plan.items:
                self._read(item, planner)
        finally:
            self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return names_a_step(checkpoint_id)

    # ---- inside

    def _open(self) -> Source:
        reference = Reference(url=self._url, step=self._step)
        if self._alone:
            return open_source(reference)
        world = self._world = self._world or join_world()
        policy, url = Policy.from_environment(self._policy), normal_url(self._url)
        memory = agent_memory(url, world, policy)
        try:
            steps = memory.steps() if memory is not None else {}
            rows = world.gather_results(lambda: [list(steps), _durable(url) if world.rank == 0 else []])
            where = decide(self._step, [set(held) for held, _ in rows], set(rows[0][1]))
            if memory is not None and where.level == "memory" and where.step is not None:
                held, memory = memory, None
                return MemorySource(held, where.step, steps[where.step])
        finally:
            if memory is not None:
                memory.close()
        return open_source(replace(reference, step=where.step if where.level == "durable" else self._step))

    def _close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        assert self._source is not None
        leaf = self._leaves[item.storage_index.fqn]
        if item.type == LoadItemType.BYTE_IO:
            held = io.BytesIO()
            torch.save(leaf, held)  # for DCP, which wants it so; nothing of it is ever stored
            held.seek(0)
            planner.load_bytes(item, held)
            return
        target = planner.resolve_tensor(item).detach()
        if isinstance(leaf, Tensor):
            box = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
            target.copy_(leaf[box])
        else:
            tensor = leaf.tensor_in(self._source.catalog)
            _fill(self._source, tensor, target, tuple(item.storage_offsets), tuple(item.lengths))
        planner.commit_tensor(item, target)


def _fill(source: Source, tensor: Described, target: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """A box of a tensor of the source, straight into the target where that has its form and lies in host memory."""
    dtype = torch_dtype(tensor.dtype)
    direct = target.is_cpu and target.is_contiguous() and target.dtype == dtype
    room = target if direct else torch.empty(sizes, dtype=dtype)
    flat = room.view(-1).view(torch.uint8) if room.dim() else room.view(1).view(torch.uint8)
    fetch(source, tensor, memoryview(flat.numpy().data), offsets, sizes)
    if not direct:
        target.copy_(room)


def _leaves_of(source: Source) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """All entries of the checkpoint as DCP names them, and the keys that lead to each."""
    tree = tree_of(source, SinkOptions(), numbered=False)
    saved = tree.pop(ITEM, None)
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in flattened(tree, ())}
    if isinstance(saved, Mapping) and saved.keys() == {"values", "where", "paths"}:
        for name, rank in saved["where"].items():
            leaves[name] = ((name,), source.objects(rank)[ITEM]["values"][name])
        for name in leaves.keys() & saved["paths"].keys():
            leaves[name] = (tuple(saved["paths"][name]), leaves[name][1])
    return {name: leaf for name, (_, leaf) in leaves.items()}, {name: path for name, (path, _) in leaves.items()}


def _described(leaf: Any, source: Source) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(leaf, TensorBytes):
        shape, dtype = leaf.sizes, torch_dtype(leaf.dtype)
    elif isinstance(leaf, Tensor):
        shape, dtype = tuple(leaf.shape), leaf.dtype
    else:
        return BytesStorageMetadata()
    whole = ChunkStorageMetadata(offsets=Size((0,) * len(shape)), sizes=Size(shape))
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=Size(shape), chunks=[whole])
