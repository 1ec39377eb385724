"""What lanes decide, without any: cuts, help, shares of a dead lane, rates, windows, whose fault it is. All pure."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.comms.fabric import leaf_spine, multi_plane
from resilient.comms.lanes.failing import SETTLE_S, Awaited, Verdict, blame, gone
from resilient.comms.lanes.messages import Failure, Operation, Transfer
from resilient.comms.lanes.rates import Rates, rates_between
from resilient.comms.lanes.schedule import CHUNK_BYTES, Chunk, Queue, cut, help_late, spread
from resilient.comms.lanes.spans import Spans
from resilient.comms.lanes.window import LEAST as LEAST_WINDOW
from resilient.comms.lanes.window import MOST, MOST_AT_FIRST, Seen, first, resized
from resilient.comms.lanes.works import Measured, Work

# -- chunks ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES), min_size=1, max_size=4))
def test_chunks_cover_the_pieces_in_order_and_none_is_large(sizes: list[int]) -> None:
    view = memoryview(bytes(sum(sizes)))
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    pieces = [(path, begin, begin + size) for path, (begin, size) in enumerate(zip(begins, sizes, strict=True))]
    made = cut(None, 1, 0, Spans(view), pieces)
    assert [path for path, _ in made] == list(range(len(sizes)))
    for (_, begin, end), (_, chunks) in zip(pieces, made, strict=True):
        at = begin
        for chunk in chunks:
            assert chunk.offset == at
            assert 0 < len(chunk.view) <= CHUNK_BYTES
            at += len(chunk.view)
        assert at == end


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=5), st.integers(0, 1_000_000))
def test_chunks_lie_together_though_the_message_does_not(sizes: list[int], seed: int) -> None:
    content = random.Random(seed).randbytes(sum(sizes))
    views = [memoryview(bytes(content[sum(sizes[:number]) : sum(sizes[: number + 1])])) for number in range(len(sizes))]
    middle = sum(sizes) // 3
    made = cut(None, 1, 0, Spans(*views), [(0, 0, middle), (1, middle, sum(sizes))])
    assert b"".join(chunk.view for _, some in made for chunk in some) == content
    at = 0
    for chunk in [chunk for _, some in made for chunk in some]:
        assert chunk.offset == at
        at += len(chunk.view)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.data())
def test_what_is_written_into_spans_is_what_stands_there(sizes: list[int], data: st.DataObject) -> None:
    whole = Spans(*[memoryview(bytearray(size)) for size in sizes])
    begin = data.draw(st.integers(0, len(whole)))
    content = data.draw(st.binary(max_size=len(whole) - begin))
    whole.fill(begin, content)
    end = begin + len(content)
    assert b"".join(whole.within(0, len(whole))) == bytes(begin) + content + bytes(len(whole) - end)
    together = whole.lies(begin, end)
    assert together is None or together == content


def chunks(count: int, size: int = 1000) -> list[Chunk]:
    return [Chunk(None, 1, 0, size * number, memoryview(bytes(size))) for number in range(count)]


def moved(queue: Queue, count: int, now: float) -> None:
    """`count` chunks are sent and arrive at `now`."""
    for _ in range(count):
        assert queue.next() is not None
        assert queue.arrived(now) is not None


def busy(total: int, done: int, *, planned_s: float, now: float) -> Queue:
    """A lane that had `total` chunks from time 0 on, of which `done` have arrived by `now`."""
    queue = Queue()
    queue.put(chunks(total), 0.0, planned_s)
    moved(queue, done, now)
    return queue


def test_a_lane_is_helped_when_it_is_late_by_its_plan() -> None:
    done = busy(10, 10, planned_s=1.0, now=1.0)
    assert help_late(0, [done, busy(10, 9, planned_s=1.0, now=1.0)], 1.0) is None
    assert help_late(0, [done, busy(10, 3, planned_s=1.0, now=1.0)], 1.0) == 1
    assert help_late(0, [done, busy(40, 10, planned_s=4.0, now=1.0)], 1.0) is None  # it was meant to take longer
    late, later = busy(10, 3, planned_s=1.0, now=1.0), busy(10, 1, planned_s=1.0, now=1.0)
    assert help_late(0, [done, late, later], 1.0) == 2
    assert help_late(0, [done, None, late], 1.0) == 2


def test_a_lane_that_has_moved_nothing_is_helped_though_nothing_was_planned() -> None:
    """What a dead lane had, which waits for it to come back, or for another that is there again."""
    stuck = Queue()
    stuck.put(chunks(5), 0.0)
    assert help_late(0, [Queue(), stuck], 1.0) == 1
    assert help_late(0, [Queue(), stuck], 0.01) is None  # it may just be opening


def test_a_moment_of_a_busy_machine_does_not_make_a_lane_late() -> None:
    done = busy(10, 10, planned_s=0.3, now=0.3)
    assert help_late(0, [done, busy(10, 1, planned_s=0.3, now=0.07)], 0.07) is None  # 0.04 would do
    assert help_late(0, [done, busy(10, 2, planned_s=0.3, now=0.24)], 0.24) == 1


def test_help_takes_the_last_chunk_and_leaves_the_plan_as_it_was() -> None:
    done, late = busy(2, 2, planned_s=1.0, now=1.0), busy(10, 1, planned_s=1.0, now=1.0)
    last = late.waiting[-1]
    done.help(late)
    assert done.next() is last
    assert (done.planned_s, done.took_s, done.began) == (1.0, 1.0, 0.0)
    assert last not in late.waiting


@given(st.integers(1, 60), st.integers(1, 5), st.randoms())
def test_all_chunks_of_a_dead_lane_go_somewhere_and_where_they_are_done_first(
    count: int, lanes: int, chance: random.Random
) -> None:
    queues: list[Queue | None] = [busy(20, chance.randint(1, 19), planned_s=1.0, now=1.0) for _ in range(lanes)]
    queues.append(None)
    dead = chunks(count)
    shares = spread(dead, queues, 1.0)
    assert sorted(chunk.offset for share in shares for chunk in share) == [chunk.offset for chunk in dead]
    assert shares[-1] == []
    ends = []
    for queue, share in zip(queues[:-1], shares, strict=False):
        assert queue is not None
        ends.append((queue.left + sum(len(chunk.view) for chunk in share)) / queue.rate(1.0))
    slowest = min(queue.rate(1.0) for queue in queues if queue is not None)
    taken = [end for end, share in zip(ends, shares, strict=False) if share]
    assert max(taken) <= (min(ends) + 1000 / slowest) * (1 + 1e-9)


def served(queue: Queue, work: Work, count: int, now: float) -> None:
    """The lane of path 0 sends `count` chunks, which arrive at `now`."""
    for _ in range(count):
        assert queue.next() is not None
        free, chunk = queue.free, queue.arrived(now)
        assert chunk is not None
        work.arrived(1, 0, len(chunk.view), since=free, now=now)


def test_an_operation_that_waited_behind_another_is_not_taken_for_slow() -> None:
    """A second for each; the first is posted at 0, the other at 0.5, and the third when the lane has been idle."""
    queue, works = Queue(), []
    for number, (posted, ends) in enumerate([(0.0, (0.5, 1.0)), (0.5, (1.5, 2.0)), (7.0, (7.5, 8.0))]):
        work = Work(Operation(number, "x", {0: 1.0}), Transfer(), posted, 30.0)
        work.plan(1, 0, 100_000, 1.0)
        works.append((work, ends))
    for work, ends in works:
        queue.put(chunks(2, 50_000), work.began)
        for end in ends:
            served(queue, work, 1, end)
    assert [list(work.measured()) for work, _ in works] == [[(1, {0: 1.0}, {0: 1.0})]] * 3


def test_what_was_planned_before_a_path_was_known_to_be_slow_does_not_make_it_slower() -> None:
    """Operations that were under way when it was found out, at a quarter of the rate: the factor of then counts."""
    for factor, planned_s in ((1.0, 1.0), (0.25, 4.0)):
        work = Work(Operation(1, "x", {0: planned_s}), Transfer(), 0.0, 30.0)
        work.plan(1, 0, 100_000, factor)
        work.arrived(1, 0, 100_000, since=0.0, now=4.0)
        assert list(work.measured()) == [(1, {0: 4.0}, {0: 1.0})]


def test_lanes_are_measured_for_a_while_so_that_a_moment_of_a_busy_machine_is_not_taken_for_a_slow_path() -> None:
    measured = Measured()
    measured.add(1, {0: 0.08, 1: 0.16}, {0: 0.08, 1: 0.08})
    measured.add(2, {0: 0.1}, {0: 0.1})
    assert measured.told() is None
    measured.add(1, {0: 0.08, 1: 0.08}, {0: 0.08, 1: 0.08})
    busy = {(1, 0): pytest.approx(0.16), (1, 1): pytest.approx(0.24), (2, 0): 0.1}
    assert measured.told() == (busy, {(1, 0): 0.16, (1, 1): 0.16, (2, 0): 0.1})
    measured.add(1, {0: 0.08}, {0: 0.08})  # from the beginning
    assert measured.told() is None


def test_what_a_dead_lane_had_goes_before_what_was_begun_later() -> None:
    """Or a receiver that has no room for the later one would never get what it waits for."""
    queue = Queue()
    view = memoryview(bytes(10))
    begun = [Chunk(None, operation, tag, 0, view) for operation, tag in ((1, 0), (1, 2), (2, 0), (2, 1))]
    queue.put([begun[1], begun[3]], 0.0)
    queue.put_back([begun[0], begun[2]], 1.0)
    assert [queue.next() for _ in begun] == begun


# -- rates -------------------------------------------------------------------------------


def to(leaf: int, of: dict[int, float]) -> dict[tuple[int, int], float]:
    """By path: of paths to that leaf."""
    return {(leaf, path): value for path, value in of.items()}


def observed(rates: Rates, busy_s: dict[int, float], times: int = 2) -> None:
    """Operations that were planned for the rates as they are known, so that all paths should end together."""
    for _ in range(times):
        rates.observe(to(1, busy_s), to(1, {path: rates.factor(1, path) for path in busy_s}))


def test_a_slow_path_is_believed_the_second_time_and_a_good_one_is_left_alone() -> None:
    fabric = multi_plane(hosts=2, rates=[100.0] * 4)
    rates = Rates(0, fabric)
    even = dict.fromkeys(range(4), 1.0)
    observed(rates, {0: 1.0, 1: 1.1, 2: 1.2, 3: 4.0}, times=1)
    assert rates.fabric() == fabric
    (report,) = rates.observe(to(1, {0: 1.0, 1: 1.1, 2: 1.2, 3: 4.0}), to(1, even))
    assert rates.fabric().up[0] == (100.0, 100.0, 100.0, 25.0)
    assert rates.fabric().up[1] == (100.0,) * 4
    other = Rates(1, fabric)
    assert other.merge(report)
    assert not other.merge(report)
    assert other.fabric() == rates.fabric()


def test_what_took_a_moment_is_not_found_slow_but_may_be_found_quick() -> None:
    rates = Rates(0, multi_plane(hosts=2, rates=[100.0] * 2))
    for _ in range(4):
        assert rates.observe(to(1, {0: 0.2, 1: 0.08}), to(1, {0: 0.2, 1: 0.02})) == []
    rates.report(1, {1: 0.25})
    for _ in range(2):
        rates.observe(to(1, {0: 0.2, 1: 0.08}), to(1, {0: 0.2, 1: 0.08}))
    assert rates.factor(1, 1) == 1.0


def test_when_everything_is_slow_no_path_is() -> None:
    """One path to each of two leaves: a machine that is busy now is not compared with what it was before."""
    rates = Rates(0, leaf_spine(leaves=3, spines=2, hosts=1, rate=100.0))
    for busy in (1.0, 1.0, 2.0, 2.0, 2.0):
        assert rates.observe({(1, 0): busy, (2, 1): 1.1 * busy}, {(1, 0): 1.0, (2, 1): 1.0}) == []


def test_a_path_that_recovers_is_used_again() -> None:
    rates = Rates(0, multi_plane(hosts=2, rates=[100.0] * 2))
    observed(rates, {0: 1.0, 1: 5.0})
    assert rates.factor(1, 1) == pytest.approx(0.2)
    observed(rates, {0: 1.0, 1: 1.0})  # its small share took as long as the others', so it is as it is known to be
    assert rates.factor(1, 1) == pytest.approx(0.2)
    observed(rates, {0: 1.0, 1: 0.2})
    assert rates.factor(1, 1) == 1.0


def test_a_dead_path_is_none_and_where_all_are_dead_all_are_tried() -> None:
    rates = Rates(0, multi_plane(hosts=2, rates=[100.0] * 2))
    rates.report(1, {0: 0.0})
    assert rates.fabric().up[0] == (0.0, 100.0)
    rates.report(1, {1: 0.0})
    assert min(rates.fabric().up[0]) > 0


def test_leaves_whose_dead_paths_leave_no_way_between_them_are_still_joined() -> None:
    fabric = leaf_spine(leaves=3, spines=2, hosts=1, rate=100.0)
    rates = Rates(0, fabric)
    for leaf in (1, 2):
        rates.report(leaf, {0: 0.0})
    rates.merge({"rank": 2, "sequence": 1, "leaf": 1, "factors": {"1": 0.0}})
    found = rates.fabric()
    assert found.up[0][0] * found.down[1][0] + found.up[0][1] * found.down[1][1] > 0


def test_a_link_is_as_good_as_anybody_finds_it() -> None:
    """One rank's path to one leaf is slow: that may be the other leaf's link, and is no reason to spare its own."""
    fabric = leaf_spine(leaves=3, spines=2, hosts=1, rate=100.0)
    rates = Rates(0, fabric)
    rates.report(1, {0: 0.25})
    rates.merge({"rank": 2, "sequence": 1, "leaf": 1, "factors": {"0": 0.25}})
    rates.report(2, {0: 1.0})
    found = rates.fabric()
    assert found.down[1] == (25.0, 100.0)
    assert found.up[0] == (100.0, 100.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": 9, "sequence": 1, "leaf": 0, "factors": {"0": 1}},
        {"rank": 0, "sequence": 1, "leaf": 0, "factors": {"7": 1}},
    ],
)
def test_what_is_no_report_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Rates(0, multi_plane(hosts=2, rates=[1.0])).merge(wrong)


# -- windows -----------------------------------------------------------------------------


def test_a_window_begins_with_what_the_path_carries_in_a_few_milliseconds_within_reason() -> None:
    assert first(1e6) == LEAST_WINDOW
    assert first(25e6) == 125_000
    assert first(12.5e9) == MOST_AT_FIRST
    assert first(float("inf")) == MOST
    racks = leaf_spine(leaves=2, spines=2, hosts=2, rate=1e6).with_rate(1, 0, 5e5)
    assert rates_between(racks, 0, 2) == (5e5, 1e6)
    assert rates_between(racks, 0, 1) == (float("inf"),) * 2


def test_a_window_grows_while_nothing_queues_and_shrinks_when_buffers_overflow() -> None:
    quiet, queueing, lost = Seen(110, 100, 0), Seen(350, 100, 0), Seen(9000, 100, 5)
    assert resized(LEAST_WINDOW, quiet, quiet) == 2 * LEAST_WINDOW
    assert resized(MOST, quiet, quiet) == MOST
    assert resized(4 * LEAST_WINDOW, quiet, queueing) == 4 * LEAST_WINDOW
    assert resized(4 * LEAST_WINDOW, queueing, lost) == 2 * LEAST_WINDOW
    assert resized(LEAST_WINDOW, queueing, lost) == LEAST_WINDOW


# -- whose fault -------------------------------------------------------------------------


def awaited(rank: int, *, silent_s: float = 0.0, begun: int | None = 5, waits: bool = False) -> Awaited:
    return Awaited(rank=rank, host=f"host{rank}", silent_s=silent_s, begun=begun, waits=waits)


def test_who_is_silent_is_gone_and_who_is_there_but_does_not_come_is_late() -> None:
    assert blame(7, [awaited(1), awaited(2, silent_s=9)], 30, 3) == gone(
        2, "host2", "it has been silent on all its lanes"
    )
    late = blame(7, [awaited(1)], 30, 3)
    assert late is not None
    assert (late.kind, late.rank) == ("late", 1)
    assert "operation 6" in late.text


def test_who_waits_itself_or_has_come_is_not_to_blame() -> None:
    assert blame(7, [awaited(1, waits=True), awaited(2, begun=7), awaited(3, begun=None)], 30, 3) is None


@given(st.permutations([Failure("late", "b"), Failure("gone", "c"), Failure("gone", "a"), Failure("aborted", "a")]))
def test_all_ranks_settle_for_the_same_failure_in_whatever_order_they_hear_of_them(heard: list[Failure]) -> None:
    verdict = Verdict()
    for number, failure in enumerate(heard):
        verdict.take(failure, SETTLE_S * number / 8)
    assert verdict.settle(SETTLE_S / 2) is None
    assert verdict.settle(SETTLE_S) == Failure("gone", "a")
    assert not verdict.take(Failure("gone", "0"), 2 * SETTLE_S)
