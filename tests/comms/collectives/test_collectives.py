"""Every schedule over real lanes, on loopback, against a plain reduction; the same to the bit when it is done again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from resilient.comms.backend.striped import Striped
from resilient.comms.collectives import choice, execute, fold, schedule
from resilient.comms.collectives.fold import Reduction
from resilient.comms.collectives.schedule import Region, Script
from resilient.comms.fabric import Fabric, leaf_spine, multi_plane
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.messages import Operation
from resilient.errors import CollectiveFailed, CollectiveMismatch
from tests.comms.lanes.loopback import RATE, group, on_all

SIZES = [2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.int64]
COUNTS = [1, 7, 100_001]
REDUCTIONS: list[Reduction] = ["sum", "avg", "product", "min", "max"]
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda rows: rows.sum(0),
    "avg": lambda rows: rows.mean(0),
    "product": lambda rows: rows.prod(0),
    "min": lambda rows: rows.amin(0),
    "max": lambda rows: rows.amax(0),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.int64: 0.0}


def values(rank: int, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(-3, 4, (count,), generator=generator).to(dtype)


class Rank:
    """One rank, which carries out scripts."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.rank, self.size, self._number = lanes, lanes.rank, lanes.size, 0

    def run(self, script: Script, buffers: Mapping[str, Tensor], item: int, reduction: Reduction | None = None) -> None:
        self._number += 1

        def folded(into: Tensor, parts: Sequence[Tensor], last: bool) -> None:
            assert reduction is not None
            fold.fold(reduction, into, parts, ranks=self.size, last=last)

        operation = Operation(self._number, f"{script.name}, items of {item} bytes")
        job = execute.Job(
            operation=operation,
            rank=self.rank,
            parts=[execute.Part(script=script, buffers={name: [tensor] for name, tensor in buffers.items()})],
            dtype=buffers["output"].dtype,
            fold=None if reduction is None else folded,
        )
        execute.run(self.lanes, job)


def on_ranks(size: int, body: Callable[[Rank], None]) -> None:
    with group(size, timeout_s=30) as lanes:
        on_all([partial(body, Rank(one)) for one in lanes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_reductions_equal_plain_ones_and_themselves_to_the_bit(size: int, dtype: torch.dtype) -> None:
    item, tolerance = dtype.itemsize, TOLERANCE[dtype]
    fabric = multi_plane(hosts=size, rates=[RATE] * 2)
    order = schedule.ring_order(fabric.leaf_of)
    ring, direct = (partial(made, order) for made in (schedule.ring_reduce_scatter, schedule.direct_reduce_scatter))
    halving = [partial(schedule.halving_reduce_scatter, size)] if size in (2, 4, 8) else []
    scripts = [ring, direct, *halving]

    def body(rank: Rank) -> None:
        for count in COUNTS:
            at = tuple(schedule.parts(count * item, size, item))
            inputs = [values(r, count, dtype, count) for r in range(size)]
            own = slice(at[rank.rank] // item, at[rank.rank + 1] // item)
            supported: list[Reduction] = [one for one in REDUCTIONS if fold.supported(one, dtype)]
            for reduction in supported:
                rows = torch.stack([one.double() if dtype.is_floating_point else one for one in inputs])
                wanted = PLAIN[reduction](rows)
                exact = 0.0 if reduction in ("min", "max") else tolerance
                for made in scripts:
                    outputs = []
                    for _ in range(2):
                        given, output = inputs[rank.rank].clone(), torch.empty(own.stop - own.start, dtype=dtype)
                        script = made(rank.rank, at, Region("output", 0, output.nbytes))
                        rank.run(script, {"input": given, "output": output}, item, reduction)
                        assert torch.equal(given, inputs[rank.rank])
                        torch.testing.assert_close(output.to(wanted.dtype), wanted[own], rtol=exact, atol=exact)
                        outputs.append(output)
                    assert torch.equal(*outputs)
                whole = inputs[rank.rank].clone()
                script, _ = choice.all_reduce(fabric, rank.rank, at)
                rank.run(script, {"input": whole, "output": whole}, item, reduction)
                torch.testing.assert_close(whole.to(wanted.dtype), wanted, rtol=exact, atol=exact)

    on_ranks(size, body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_gathered_broadcast_or_exchanged_is_what_was_there(size: int, dtype: torch.dtype) -> None:
    item = dtype.itemsize
    order = schedule.ring_order(tuple(range(size)))

    def body(rank: Rank) -> None:
        me = rank.rank
        for count in COUNTS:
            at = tuple(schedule.parts(count * item, size, item))
            whole = values(0, count, dtype, count)
            own = slice(at[me] // item, at[me + 1] // item)
            gathers = [schedule.ring_all_gather(order, me, at), schedule.direct_all_gather(order, me, at)]
            if size in (2, 4, 8):
                gathers.append(schedule.doubling_all_gather(size, me, at))
            for gather in gathers:
                output = torch.zeros(count, dtype=dtype)
                output[own] = whole[own]
                rank.run(gather, {"output": output}, item)
                assert torch.equal(output, whole)
            for root in range(size):
                scattered = schedule.scatter(size, me, at, root)
                gathered = schedule.joined(scattered, schedule.ring_all_gather(order, me, at))
                for script in (schedule.tree(size, me, at[-1], root), gathered):
                    output = values(me, count, dtype, count)
                    rank.run(script, {"output": output}, item)
                    assert torch.equal(output, values(root, count, dtype, count))
            for sent in (
                [[count] * size] * size,
                [[(3 * i + j) % 4 * count for j in range(size)] for i in range(size)],
            ):
                exchanged(rank, sent, dtype)

    on_ranks(size, body)


def exchanged(rank: Rank, sent: list[list[int]], dtype: torch.dtype) -> None:
    """All-to-all of sent[i][j] numbers from rank i to rank j."""
    me, size, item = rank.rank, rank.size, dtype.itemsize
    received = [sent[other][me] for other in range(size)]
    source, output = values(me, sum(sent[me]), dtype, 5), torch.zeros(sum(received), dtype=dtype)
    script = schedule.all_to_all(me, [count * item for count in sent[me]], [count * item for count in received])
    begin, into = sum(sent[me][:me]), sum(received[:me])
    output[into : into + received[me]] = source[begin : begin + received[me]]
    rank.run(script, {"input": source, "output": output}, item)
    wanted = [values(i, sum(sent[i]), dtype, 5)[sum(sent[i][:me]) : sum(sent[i][: me + 1])] for i in range(size)]
    assert torch.equal(output, torch.cat(wanted))


def test_ranks_that_disagree_all_get_the_same_error() -> None:
    order = schedule.ring_order((0, 1, 2))
    texts: list[str] = []

    def body(rank: Rank) -> None:
        item = 8 if rank.rank == 1 else 4
        at = tuple(schedule.parts(2400, 3, item))
        with pytest.raises(CollectiveMismatch) as caught:
            rank.run(schedule.ring_all_gather(order, rank.rank, at), {"output": torch.zeros(600)}, item)
        texts.append(str(caught.value))

    on_ranks(3, body)
    assert len(set(texts)) == 1
    assert "items of 8 bytes" in texts[0]


def test_what_one_rank_cannot_do_fails_on_all() -> None:
    """Before its first step, too: others must not wait for its timeout."""
    texts: list[str] = []

    def body(rank: Rank) -> None:
        striped = Striped(rank.lanes, multi_plane(hosts=3, rates=[RATE] * 2))
        tensor = torch.zeros(300, dtype=torch.complex64)
        if rank.rank == 1:
            tensor = tensor.conj()  # whose bytes cannot be had without computing
        with pytest.raises(RuntimeError) as caught:
            striped.broadcast(tensor, 0).wait()
        if isinstance(caught.value, CollectiveFailed):
            texts.append(str(caught.value))

    on_ranks(3, body)
    assert len(texts) == 2
    assert len(set(texts)) == 1
    assert "rank 1 (host1) has aborted" in texts[0]


# -- several parts at once ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leaf_of", [(0, 1), (0, 1, 2), (0, 0, 1, 1), (0, 1, 0, 1)], ids=str)
def test_large_tensors_go_in_parts_and_come_out_whole(leaf_of: tuple[int, ...], dtype: torch.dtype) -> None:
    size = len(leaf_of)
    count = ((9 << 20) // dtype.itemsize // size + 5) * size  # no part is as long as another
    rows = [values(rank, count, dtype, 1) for rank in range(size)]
    wanted = torch.stack([row.double() for row in rows]).sum(0)
    tolerance = 4 * size * torch.finfo(dtype).eps

    def body(lanes: Lanes) -> None:
        striped = Striped(lanes, lanes.fabric)
        own = slice(lanes.rank * count // size, (lanes.rank + 1) * count // size)
        for _ in range(2):
            whole, part, gathered = rows[lanes.rank].clone(), torch.empty(count // size, dtype=dtype), rows[0].clone()
            works = [
                striped.all_reduce(whole),
                striped.reduce_scatter(part, rows[lanes.rank]),
                striped.all_gather(gathered, rows[1][own]),
            ]
            for work in works:
                work.wait()
            torch.testing.assert_close(whole.double(), wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(part.double(), wanted[own], rtol=tolerance, atol=tolerance)
            assert torch.equal(gathered, rows[1])
        striped.close()

    with group(size, timeout_s=60, leaf_of=leaf_of) as lanes:
        on_all([partial(body, one) for one in lanes])


def test_a_failure_ends_all_parts_on_all_ranks_and_buffers_are_their_owners_again(eventually: Any) -> None:
    """Rank 2 never comes, so the others have parts under way when it says that it cannot."""
    texts: list[str] = []

    def body(striped: Striped) -> None:
        if striped.rank == 2:
            eventually(lambda: all(one.report()["operations"] for one in every[:2]), "the others have begun")
            striped.abort("it has had enough")
        else:
            tensor = torch.ones(4 << 20)
            with pytest.raises(CollectiveFailed) as caught:
                striped.all_reduce(tensor).wait()
            texts.append(str(caught.value))
            tensor.fill_(7)
            with pytest.raises(CollectiveFailed):
                striped.all_reduce(tensor).wait()
            assert bool((tensor == 7).all())

    with group(3, timeout_s=60) as every:
        striped = [Striped(one, one.fabric) for one in every]
        on_all([partial(body, one) for one in striped])
        on_all([one.close for one in striped])
    assert len(texts) == 2
    assert len(set(texts)) == 1
    assert "rank 2 (host2) has aborted: it has had enough" in texts[0]


# -- the choice --------------------------------------------------------------------------


def chosen(fabric: Fabric, nbytes: int) -> str:
    at = tuple(schedule.parts(nbytes, len(fabric.leaf_of), 4))
    script, decision = choice.all_gather(fabric, 0, at)
    assert script.name == decision.action
    return script.name


def test_small_tensors_take_the_fewest_steps_and_large_ones_the_least_bytes_between_leaves() -> None:
    racks = leaf_spine(leaves=2, spines=4, hosts=4, rate=1e9, nic=1e10)
    assert chosen(racks, 8 * 1024) == "direct"
    assert chosen(racks, 1 << 30) == "ring"  # each leaf's bytes cross once, not once for each rank behind


def test_many_ranks_take_few_steps_where_steps_are_what_costs() -> None:
    assert chosen(leaf_spine(leaves=8, spines=4, hosts=16, rate=1e9), 1 << 20) == "doubling"


def test_all_ranks_choose_alike() -> None:
    fabric = leaf_spine(leaves=2, spines=3, hosts=3, rate=1e9)
    for nbytes in (24, 3072, 1 << 20, 1 << 28):
        at = tuple(schedule.parts(nbytes, 6, 4))
        names = {choice.all_reduce(fabric, rank, at)[0].name for rank in range(6)}
        assert len(names) == 1
        assert len({choice.broadcast(fabric, rank, at, 2)[0].name for rank in range(6)}) == 1
