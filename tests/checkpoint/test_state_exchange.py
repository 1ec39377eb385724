"""Images of other nodes as they arrive, window by window: verified, sent again when damaged, given to their tensors."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from resilient.checkpoint.digest import block_count, block_range, digest
from resilient.checkpoint.image import header
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.exchange import receive_remote, runs_of
from resilient.checkpoint.restore.scatter import Range
from resilient.checkpoint.restore.source import InMemory
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage

SIZE = 70 << 20  # two windows and a part


def blocks_of(view: memoryview) -> tuple[str, ...]:
    spans = [block_range(number, len(view)) for number in range(block_count(len(view)))]
    return tuple(digest(view[start:stop]) for start, stop in spans)


def image_of(data: memoryview, rank: int) -> InMemory:
    record = Record(
        run_id="run",
        life="life",
        step=1,
        rank=rank,
        world_size=2,
        plan_digest="",
        image_name="image",
        image_bytes=len(data),
        blocks=blocks_of(data),
    )
    return InMemory(record, "memory", data, verified=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire(World):
    """Rank 0's world, in which rank 1 sends `theirs`; the broadcasts whose numbers are in `damaged` arrive wrong."""

    theirs: Tensor
    damaged: set[int]
    sent: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=lambda: [0])

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, dict):  # which blocks are wanted
            return [value, {}]
        if len(value) == 2 and isinstance(value[1], list):  # how large an image is, and the digests of its blocks
            return [value, [self.theirs.numel(), list(blocks_of(memoryview(self.theirs.numpy().data)))]]
        if not value:
            self.begins.append(self.begins[-1] + self.sent[-1])
        return [value, []]

    def broadcast(self, data: Tensor, source: int) -> None:
        assert source == 1
        data.copy_(self.theirs[self.begins[-1] : self.begins[-1] + data.numel()])
        if len(self.sent) in self.damaged:
            data[len(data) // 2] ^= 1
        self.sent.append(data.numel())


def wire(damaged: set[int]) -> Wire:
    torch.manual_seed(3)
    theirs = torch.randint(256, (SIZE,), dtype=torch.uint8)
    return Wire(rank=0, world_size=2, nodes=("a", "b"), group=object(), theirs=theirs, damaged=damaged)  # type: ignore[arg-type]


def ranges() -> list[Range]:
    """Small, over the border of two windows, all, over the other border, empty, not contiguous over a border."""
    spans = [(5, 12), ((32 << 20) - 6, 40), (0, SIZE), ((64 << 20) - 3, 24), (9, 0)]
    found = [Range(1, offset, size, torch.zeros(size, dtype=torch.uint8), 0, size) for offset, size in spans]
    turned = torch.zeros(4, 3, dtype=torch.float32).t()
    return [*found, Range(1, (32 << 20) - 22, 48, turned, 0, 12)]


def check(spans: list[Range], theirs: Tensor) -> None:
    for span in spans:
        got = span.local.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(got, theirs[span.offset : span.offset + span.nbytes])


def own() -> InMemory:
    return image_of(memoryview(header([], {}, 4096)), 0)


@pytest.mark.parametrize("damaged", [set(), {0}, {1, 2}, {0, 2, 4}])
def test_ranges_get_their_bytes_though_some_windows_arrive_damaged(damaged: set[int]) -> None:
    world, spans = wire(damaged), ranges()
    assert receive_remote(world, spans, own()) == sum(span.nbytes for span in spans)
    check(spans, world.theirs)
    assert len(world.sent) == 3 + len(damaged)


def test_what_arrives_damaged_again_and_again_is_an_error_that_names_the_rank() -> None:
    with pytest.raises(DamagedImage, match=r"blocks \[4\] of the image of rank 1 arrived damaged at rank 0, 3 times"):
        receive_remote(wire({0, 1, 2}), ranges(), own())


def test_blocks_that_follow_one_another_are_one_run() -> None:
    assert runs_of([]) == []
    assert runs_of({7, 0, 1, 2, 9, 6}) == [[0, 3], [6, 8], [9, 10]]


def test_a_job_on_one_node_exchanges_nothing() -> None:
    world = World(rank=0, world_size=2, nodes=("a", "a"))
    assert receive_remote(world, ranges(), own()) == 0
