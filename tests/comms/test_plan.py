"""Plans against the bound, against an exhaustive search where that can be done, and against what must be refused."""

import itertools
import random
from dataclasses import replace
from fractions import Fraction
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.comms.certificate import Piece, bound, certify
from resilient.comms.colouring import colour
from resilient.comms.fabric import Fabric, leaf_spine, multi_plane
from resilient.comms.flows import (
    Flow,
    bounds,
    direct_all_to_all,
    halving_doubling_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    tree_broadcast,
)
from resilient.comms.pack import pack
from resilient.comms.plan import Plan, plan_step
from resilient.errors import UsageError

PAPER = leaf_spine(leaves=16, spines=16, hosts=16, rate=1.0)  # the fabric of the Ethereal paper, 256 ranks
RANKS = 256
BYTES = 48_000  # divides by every number of pieces that is needed here


def placed_at_random(seed: int, count: int = RANKS) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def crossing(fabric: Fabric, plan: Plan, flows: tuple[Flow, ...]) -> tuple[int, int]:
    """How many flows leave their leaf, and their pieces."""
    numbers = {n for n, flow in enumerate(flows) if fabric.crosses(flow)}
    return len(numbers), sum(piece.flow in numbers for piece in plan.pieces)


# --- the paper's workloads


@pytest.mark.parametrize(
    "flows",
    [
        halving_doubling_all_reduce(RANKS, 128 * BYTES)[6],
        tuple(Flow(one, other, BYTES) for one, other in enumerate(placed_at_random(1)) if one != other),
        ring_all_reduce(placed_at_random(2), RANKS * BYTES)[0],
        tuple(Flow(one, (one + far) % RANKS, BYTES) for one in range(RANKS) for far in (17, 40, 95)),
        tree_broadcast(RANKS, BYTES)[7],
    ],
    ids=["halving-doubling", "permutation", "ring placed at random", "three peers", "tree"],
)
def test_the_load_of_spraying_is_reached_without_cutting_where_it_can_be(flows: tuple[Flow, ...]) -> None:
    plan = plan_step(PAPER, flows)
    assert plan.certificate.ratio == 1
    count, pieces = crossing(PAPER, plan, flows)
    assert pieces == count, "Ethereal's rule, which sees one host alone, cuts each of these into 16"


def test_a_compact_ring_is_cut_only_where_the_interfaces_are_quicker_than_a_link() -> None:
    flows = ring_all_reduce(range(RANKS), RANKS * BYTES)[0]
    plan = plan_step(PAPER, flows)
    assert (plan.certificate.ratio, crossing(PAPER, plan, flows)) == (1, (16, 256))
    slow = replace(PAPER, nic=1.0)
    plan = plan_step(slow, flows)
    assert (plan.certificate.ratio, crossing(slow, plan, flows)) == (1, (16, 16))
    assert "interface of rank" in plan.reason


def test_everybody_to_everybody_needs_no_cut() -> None:
    fabric = leaf_spine(leaves=4, spines=4, hosts=4, rate=1.0)
    flows = direct_all_to_all(16, BYTES)[0]
    plan = plan_step(fabric, flows)
    assert plan.certificate.ratio == 1
    assert plan.certificate.cut == 0


# --- any fabric, any flows


@st.composite
def steps(draw: st.DrawFn, *, equal: bool) -> tuple[int, int, tuple[Flow, ...]]:
    """Leaves, spines, and flows between their ranks, two a leaf."""
    leaves, spines = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    rank = st.integers(0, 2 * leaves - 1)
    size = st.just(60 * 7 * 11) if equal else st.integers(1, 10**6)
    made = draw(st.lists(st.tuples(rank, rank, size), min_size=1, max_size=24))
    return leaves, spines, tuple(Flow(*each) for each in made if each[0] != each[1])


@given(steps(equal=True))
def test_equal_flows_reach_the_bound(step: tuple[int, int, tuple[Flow, ...]]) -> None:
    leaves, spines, flows = step
    fabric = leaf_spine(leaves=leaves, spines=spines, hosts=2, rate=3.0)
    assert plan_step(fabric, flows).certificate.ratio <= 1 + 1e-3  # the byte that a cut may be off


@given(steps(equal=False))
def test_flows_of_any_sizes_reach_the_bound(step: tuple[int, int, tuple[Flow, ...]]) -> None:
    leaves, spines, flows = step
    fabric = leaf_spine(leaves=leaves, spines=spines, hosts=2, rate=3.0)
    certificate = plan_step(fabric, flows).certificate
    assert certificate.load_s <= certificate.bound_s + len(flows) / 3.0  # a byte for each cut


@given(steps(equal=True), st.lists(st.sampled_from([1.0, 1.0, 2.0, 4.0]), min_size=6, max_size=6))
def test_planes_of_different_rates_get_their_shares(
    step: tuple[int, int, tuple[Flow, ...]], rates: list[float]
) -> None:
    leaves, spines, flows = step
    certificate = plan_step(multi_plane(hosts=2 * leaves, rates=rates[:spines]), flows).certificate
    assert certificate.load_s <= certificate.bound_s + len(flows)  # a byte for each cut


@settings(max_examples=50)
@given(steps(equal=True), st.integers(0, 4), st.integers(0, 5), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_slow_or_failed_link_gets_what_it_can_carry(
    step: tuple[int, int, tuple[Flow, ...]], leaf: int, path: int, rate: float
) -> None:
    leaves, spines, flows = step
    fabric = leaf_spine(leaves=leaves, spines=max(2, spines), hosts=2, rate=1.0)
    fabric = fabric.with_rate(leaf % leaves, path % fabric.paths, rate)
    certificate = plan_step(fabric, flows).certificate
    assert certificate.ratio <= 1.15
    equal = _equal_pieces(fabric, flows) if rate else None
    assert equal is None or certificate.load_s <= equal * 1.03, "never worse than cutting all into equal pieces"


def _equal_pieces(fabric: Fabric, flows: tuple[Flow, ...]) -> float:
    pieces = []
    for number, flow in enumerate(flows):
        at = bounds(flow.nbytes, fabric.paths)
        if fabric.crosses(flow):
            pieces += [Piece(number, path, at[path], at[path + 1]) for path in range(fabric.paths)]
        else:
            pieces.append(Piece(number, None, 0, flow.nbytes))
    return certify(fabric, flows, pieces).load_s


def test_a_quarter_of_the_rate_on_one_plane_costs_little() -> None:
    flows = ring_all_reduce(range(4), 4 * BYTES)[0]
    fabric = multi_plane(hosts=4, rates=(40, 40, 40, 40)).with_rate(2, 1, 10)
    certificate = plan_step(fabric, flows).certificate
    assert certificate.ratio <= 1.05
    assert _equal_pieces(fabric, flows) / certificate.load_s > 2.5


def test_small_messages_stay_whole() -> None:
    flows = ring_all_reduce(range(RANKS), RANKS * 4096)[0]
    assert plan_step(PAPER, flows).certificate.cut == 16
    assert plan_step(PAPER, flows, least_bytes=8192).certificate.cut == 0


@given(steps(equal=True), st.sampled_from([2, 4, 8]))
def test_pieces_are_whole_items(step: tuple[int, int, tuple[Flow, ...]], item: int) -> None:
    leaves, spines, flows = step
    flows = tuple(replace(flow, nbytes=flow.nbytes // item * item) for flow in flows)
    plan = plan_step(leaf_spine(leaves=leaves, spines=spines, hosts=2, rate=1.0), flows, item=item)
    assert all(piece.begin % item == 0 and piece.end % item == 0 for piece in plan.pieces)


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    flows = ring_all_reduce(placed_at_random(3), RANKS * BYTES)[0]
    assert plan_step(PAPER, flows) == plan_step(PAPER, list(flows))


# --- the parts of it


@given(st.integers(1, 40), st.integers(1, 24))
def test_equal_rooms_take_as_few_pieces_as_are_possible(units: int, rooms: int) -> None:
    packed = pack(units, [Fraction(units, rooms)] * rooms)
    assert sum(map(len, packed)) == units + rooms - gcd(units, rooms)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_no_search_finds_fewer_pieces(units: int, sixths: list[int]) -> None:
    rooms = [Fraction(size, 6) for size in sixths]
    if sum(sixths) < 6 * units:
        with pytest.raises(UsageError, match="do not fit"):
            pack(units, rooms)
        return
    packed = pack(units, rooms)
    used = [
        sum((end - begin for parts in packed for at, begin, end in parts if at == room), Fraction())
        for room in range(len(rooms))
    ]
    assert all(one <= size for one, size in zip(used, rooms, strict=True))
    assert all(sum(end - begin for _, begin, end in parts) == 1 for parts in packed)
    assert sum(map(len, packed)) == _fewest(units, sixths)


def _fewest(units: int, sixths: list[int]) -> int:
    ways = [way for way in itertools.product(range(7), repeat=len(sixths)) if sum(way) == 6]
    fitting = (
        rows
        for rows in itertools.combinations_with_replacement(ways, units)
        if all(sum(column) <= size for column, size in zip(zip(*rows, strict=True), sixths, strict=True))
    )
    return min(sum(part > 0 for way in rows for part in way) for rows in fitting)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60))
def test_no_two_edges_of_a_colour_meet(edges: list[tuple[int, int]]) -> None:
    colours, count = colour(edges, 7, 7)
    assert count == max([sum(edge[side] == at for edge in edges) for side in (0, 1) for at in range(7)], default=0)
    for side in (0, 1):
        ends = [(edge[side], one) for edge, one in zip(edges, colours, strict=True)]
        assert len(set(ends)) == len(ends)


def test_schedules_send_what_their_collectives_need() -> None:
    ring = ring_all_reduce(range(5), 5003)
    assert len(ring) == 8
    for rank in range(5):
        sent = sum(flow.nbytes for step in ring for flow in step if flow.source == rank)
        assert abs(sent - 2 * 5003 * 4 / 5) < 5
    assert sum(flow.nbytes for step in ring_all_gather(range(5), 5000) for flow in step) == 5 * 4 * 1000
    assert sum(flow.nbytes for step in halving_doubling_all_reduce(8, 800) for flow in step) == 8 * 2 * 700
    reached = {0}
    for step in tree_broadcast(11, 1):
        assert {flow.source for flow in step} <= reached
        reached |= {flow.target for flow in step}
    assert reached == set(range(11))
    with pytest.raises(UsageError, match="power of two"):
        halving_doubling_all_reduce(6, 6)


# --- what is refused


def test_a_flow_of_no_bytes_asks_nothing_of_a_failed_link() -> None:
    fabric = leaf_spine(leaves=2, spines=2, hosts=1, rate=1.0).with_rate(0, 0, 0.0)
    plan = plan_step(fabric, [Flow(0, 1, 0), Flow(1, 0, 4)], item=4)
    assert plan.certificate.load_s == 4.0


def test_a_certificate_sees_gaps_overlaps_and_failed_links() -> None:
    fabric = leaf_spine(leaves=2, spines=2, hosts=1, rate=1.0)
    flows = [Flow(0, 1, 10)]
    for pieces in (
        [Piece(0, 0, 0, 5)],
        [Piece(0, 0, 0, 5), Piece(0, 1, 4, 10)],
        [Piece(0, 0, 0, 5), Piece(0, 1, 6, 10)],
        [Piece(0, None, 0, 10)],
    ):
        with pytest.raises(UsageError, match="flow 0"):
            certify(fabric, flows, pieces)
    with pytest.raises(UsageError, match="a link that has failed: \\('up', 0, 1\\)"):
        certify(fabric.with_rate(0, 1, 0.0), flows, [Piece(0, 1, 0, 10)])


def test_leaves_without_a_path_between_them_are_named() -> None:
    fabric = leaf_spine(leaves=3, spines=2, hosts=1, rate=1.0).with_rate(0, 0, 0.0).with_rate(1, 1, 0.0)
    with pytest.raises(UsageError, match="no path is left from leaf 0 to leaf 1"):
        plan_step(fabric, [Flow(0, 1, 10)])
    cut_off = fabric.with_rate(0, 1, 0.0)
    with pytest.raises(UsageError, match="leaf 0 has no path left"):
        bound(cut_off, [Flow(0, 2, 1)])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"leaf_of": (0, 2), "up": ((1.0,), (1.0,)), "down": ((1.0,), (1.0,))}, "there are 2 leaves"),
        ({"leaf_of": (0,), "up": ((1.0, 1.0),), "down": ((1.0,),)}, "same paths"),
        ({"leaf_of": (0,), "up": ((-1.0,),), "down": ((1.0,),)}, "below 0"),
    ],
)
def test_fabrics_that_make_no_sense_are_refused(how: dict[str, tuple[tuple[float, ...], ...]], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Fabric(**how)  # type: ignore[arg-type]
