"""In which order turns are begun when several parts of a collective are under way: pure, so every case is played."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from resilient.comms.collectives import choice, schedule
from resilient.comms.collectives.order import merged
from resilient.comms.collectives.schedule import Script, Turn
from resilient.comms.fabric import Fabric, leaf_spine
from resilient.comms.flows import Flow

RACKS = leaf_spine(leaves=2, spines=2, hosts=2, rate=1e6)  # ranks 0 and 1 share a leaf
WITHIN, ACROSS, NOTHING = (Turn(flows=(Flow(0, other, nbytes),)) for other, nbytes in ((1, 9), (2, 9), (2, 0)))


def begun(scripts: list[Script], fabric: Fabric = RACKS) -> list[tuple[int, int]]:
    """(part, turn) in order."""
    found: list[tuple[int, int]] = []
    for number in merged(fabric, scripts):
        found.append((number, sum(part == number for part, _ in found)))
    return found


def crossings(scripts: list[Script]) -> list[str]:
    """Letters for a part's crossings, and the part's number."""
    found = []
    for part, turn in begun(scripts):
        before = [RACKS.crosses(one.flows[0]) and one.flows[0].nbytes > 0 for one in scripts[part].turns[: turn + 1]]
        if before[-1]:
            found.append(f"{'BCDEFG'[sum(before) - 1]}{part}")
    return found


def test_links_always_have_another_parts_bytes_while_one_adds_up_or_stays_within_its_leaf() -> None:
    parts = [Script(name="x", turns=(WITHIN, ACROSS, ACROSS, WITHIN))] * 4
    assert " ".join(crossings(parts)) == "B0 B1 C0 B2 C1 B3 C2 C3"


def test_a_turn_within_a_leaf_is_begun_while_another_parts_bytes_are_on_the_links() -> None:
    order = begun([Script(name="x", turns=(WITHIN, ACROSS, WITHIN))] * 3)
    for part in (1, 2):
        assert order.index((part - 1, 1)) < order.index((part, 0)) < order.index((part, 1))
    for part in (0, 1):
        assert order.index((part + 1, 1)) < order.index((part, 2))  # behind it, links have the next part's


turns = st.lists(st.sampled_from([WITHIN, ACROSS, NOTHING]), max_size=6)


@given(st.lists(turns, max_size=5))
def test_every_turn_is_begun_once_and_behind_the_one_before_it(rows: list[list[Turn]]) -> None:
    order = begun([Script(name="x", turns=tuple(row)) for row in rows])
    assert sorted(order) == [(part, turn) for part, row in enumerate(rows) for turn in range(len(row))]


@given(turns, st.integers(2, 5))
def test_no_part_crosses_twice_in_a_row_while_others_have_not_done_so_once(row: list[Turn], parts: int) -> None:
    found = crossings([Script(name="x", turns=tuple(row))] * parts)
    for one, following in pairwise(found):
        assert one[1:] != following[1:] or int(one[1:]) == parts - 1


def test_all_ranks_begin_alike() -> None:
    for fabric in (
        RACKS,
        leaf_spine(leaves=3, spines=2, hosts=2, rate=1e6),
        leaf_spine(leaves=5, spines=2, hosts=1, rate=1e6),
    ):
        size = len(fabric.leaf_of)
        for nbytes in (4 * size, 1 << 20):
            at = tuple(schedule.parts(nbytes, size, 4))
            orders = {tuple(merged(fabric, [choice.all_reduce(fabric, rank, at)[0]] * 3)) for rank in range(size)}
            assert len(orders) == 1
