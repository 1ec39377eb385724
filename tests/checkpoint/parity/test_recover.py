"""Which images can be had: any m nodes may be missing, old data are never taken for new, the newest is chosen."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.parity.layout import Key, Member, Stripe, layout_of
from resilient.checkpoint.parity.recover import Inventory, Known, decide, find, recoverable, sources_of

BLOCK = 16


def stripe_of(key: Key, n: int, m: int, nbytes: int = 100) -> Stripe:
    members = tuple(Member(node=f"n{rank}", ranks=(rank,), image_bytes=(nbytes + rank,)) for rank in range(n))
    return Stripe(life=key[0], step=key[1], world_size=n, m=m, block_bytes=BLOCK, members=members)


def inventories(key: Key, n: int, m: int, *, whole: bool = True) -> list[Inventory]:
    """What all nodes say of one snapshot."""
    stripe = stripe_of(key, n, m)
    known = Known(stripe=stripe, seals={rank: f"seal {key} {rank}" for rank in range(n)})
    return [
        Inventory(
            node=f"n{rank}",
            images={(*key, rank): (f"seal {key} {rank}", n)},
            parity={key: frozenset(layout_of(stripe).kept_by(rank))} if whole else {},
            known={key: known} if whole else {},
        )
        for rank in range(n)
    ]


def merged(first: list[Inventory], second: list[Inventory]) -> list[Inventory]:
    return [
        Inventory(
            node=one.node,
            images={**one.images, **other.images},
            parity={**one.parity, **other.parity},
            known={**one.known, **other.known},
        )
        for one, other in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (5, 2), (6, 3)])
def test_any_m_nodes_may_be_missing_and_no_more(n: int, m: int) -> None:
    all_of_them = inventories(("x", 3), n, m)
    for count in range(m + 2):
        for lost in combinations(range(n), count):
            left = [one for rank, one in enumerate(all_of_them) if rank not in lost]
            decision = decide(left, n)
            assert decision.action == ("recover" if count <= m and left else "nothing")
            for rank, found in decision.images.items():
                assert bool(found.holders) == (rank not in lost)
                assert found.reason


def test_the_newest_that_all_can_have_is_chosen() -> None:
    whole = inventories(("x", 3), 4, 1)
    newer = merged(whole, inventories(("x", 4), 4, 1, whole=False))
    assert decide(newer, 4).key == ("x", 4)
    left = newer[1:]
    decision = decide(left, 4)
    assert decision.key == ("x", 3)
    assert "newer but not whole: 4" in decision.reason
    assert [one.key for one in recoverable(left, [1])[1]] == [("x", 4), ("x", 3)]
    assert [one.key for one in recoverable(left, [0])[0]] == [("x", 3)]


def test_a_later_life_is_newer_than_any_step_of_a_former_one() -> None:
    both = merged(inventories(("1", 90), 3, 1), inventories(("2", 60), 3, 1))
    assert decide(both, 3).key == ("2", 60)


def test_a_snapshot_of_a_world_of_another_size_is_not_chosen() -> None:
    assert decide(inventories(("x", 3), 3, 1), 2).action == "nothing"
    assert decide(inventories(("x", 3), 3, 1), 4).action == "nothing"


def test_an_image_that_is_not_the_one_of_the_stripe_is_passed_over() -> None:
    said = inventories(("x", 3), 3, 1)
    said[0] = Inventory(node="n0", images={("x", 3, 0): ("another", 3)}, parity=said[0].parity, known=said[0].known)
    found = find(said, ("x", 3), 0)
    assert found is not None
    assert found.holders == ()
    assert found.stripe is not None


def test_parity_counts_only_where_its_keeper_says_so() -> None:
    said = inventories(("x", 3), 3, 1)
    said[1] = Inventory(node="n1", images=said[1].images, known=said[1].known)
    known = said[1].known["x", 3]
    assert sources_of(said, known).parity[1, 0] == []
    assert find(said[1:], ("x", 3), 0) is None
    assert find(said, ("x", 3), 0) is not None


@given(st.integers(2, 6), st.data())
def test_an_inventory_survives_its_way_through_json(n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, n - 1))
    for one in inventories(("x", 3), n, m):
        assert Inventory.from_json(one.to_json()) == one
