"""Rows and groups: any m losses can be borne, everybody stores the same, and domains are kept apart."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resilient.ec.codec import Codec
from resilient.ec.groups import Node, decide_groups
from resilient.ec.placement import rows
from resilient.errors import UsageError

SIZES = st.lists(st.integers(0, 30_000), min_size=2, max_size=9)


@given(SIZES, st.data())
def test_every_byte_is_in_one_row_apart_from_its_parity(sizes: list[int], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, len(sizes) - 1))
    found = rows(sizes, m, align=64)
    assert len(found) == len(sizes)
    covered: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for row in found:
        assert len(row.data) == len(sizes) - m
        assert {segment.member for segment in row.data} | set(row.parity) == set(range(len(sizes)))
        assert row.nbytes == max(segment.nbytes for segment in row.data)
        for segment in row.data:
            covered[segment.member].append((segment.begin, segment.end))
    for size, parts in zip(sizes, covered, strict=True):
        joined = sorted(part for part in parts if part[0] < part[1])
        assert sum(end - begin for begin, end in joined) == size
        assert all(first[1] == second[0] for first, second in pairwise(joined))
    kept = Counter(member for row in found for member in row.parity)
    assert set(kept.values()) == {m}


def test_equal_images_cost_m_of_k_and_no_more() -> None:
    for n, m in ((2, 1), (4, 2), (9, 1), (10, 2)):
        size = 4096 * (n - m) * 3
        found = rows([size] * n, m)
        for member in range(n):
            assert sum(row.nbytes for row in found if member in row.parity) == size * m // (n - m)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_any_m_nodes_of_a_group_may_be_lost(sizes: list[int], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, min(3, len(sizes) - 1)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    images = [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    found = rows(sizes, m, align=64)
    codec = Codec(len(sizes) - m, m)
    parity: list[list[NDArray[np.uint8]]] = []
    for row in found:
        shards = [_padded(images[one.member][one.begin : one.end], row.nbytes) for one in row.data]
        parity.append([np.empty(row.nbytes, dtype=np.uint8) for _ in row.parity])
        codec.encode(shards, parity[-1])
    lost = data.draw(st.sampled_from(list(combinations(range(len(sizes)), m))))
    again = {member: np.zeros(sizes[member], dtype=np.uint8) for member in lost}
    for row, kept in zip(found, parity, strict=True):
        members = [one.member for one in row.data] + list(row.parity)
        whole = [_padded(images[one.member][one.begin : one.end], row.nbytes) for one in row.data] + kept
        left = {number: shard for number, shard in enumerate(whole) if members[number] not in lost}
        gone = {n: np.empty(row.nbytes, dtype=np.uint8) for n, one in enumerate(row.data) if one.member in lost}
        codec.decode(left, gone)
        for number, shard in gone.items():
            one = row.data[number]
            again[one.member][one.begin : one.end] = shard[: one.nbytes]
    assert all(np.array_equal(again[member], images[member]) for member in lost)


def _padded(part: NDArray[np.uint8], nbytes: int) -> NDArray[np.uint8]:
    return np.concatenate([part, np.zeros(nbytes - len(part), dtype=np.uint8)])


def test_too_small_a_group_is_refused() -> None:
    for sizes, m in (([1], 1), ([1, 2], 2), ([1, 2], 0)):
        with pytest.raises(UsageError, match="parities in a group"):
            rows(sizes, m)


@given(st.integers(0, 60), st.integers(1, 8), st.integers(1, 4), st.integers(1, 7))
def test_every_node_is_in_one_group_that_is_large_enough(count: int, k: int, m: int, switches: int) -> None:
    nodes = [Node(f"n{number}", (f"s{number % switches}",)) for number in range(count)]
    found = decide_groups(nodes, k, m)
    if count <= m:
        assert found.groups == ()
        assert "no parity" in found.reason
        return
    assert sorted(number for group in found.groups for number in group.members) == list(range(count))
    for group in found.groups:
        assert group.k >= min(k, count - m)
        assert group is found.of(group.members[0])
    sizes = [len(group.members) for group in found.groups]
    assert max(sizes) - min(sizes) <= 1
    fullest = max(Counter(node.domains for node in nodes).values())
    for group in found.groups:
        together = Counter(nodes[number].domains for number in group.members)
        assert max(together.values()) <= -(-fullest // len(found.groups)), "a domain could have been spread wider"


def test_the_reason_says_which_domains_may_be_lost() -> None:
    nodes = [Node(f"n{number:02}", (f"row {number // 8}", f"switch {number // 4}")) for number in range(16)]
    assert decide_groups(nodes, 3, 1).reason == (
        "4 groups of 4 nodes, any 1 of each may be lost; "
        "also a whole domain such as 'switch 0' (at most 1 of a group); "
        "not a whole domain such as 'row 0', which may hold 2 nodes of a group"
    )
    assert "also a whole domain such as 'row 0'" in decide_groups(nodes, 2, 2).reason
    assert decide_groups([Node("a"), Node("b")], 8, 1).reason == "1 group of 2 nodes, any 1 of each may be lost"


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="k = 0, m = 1"):
        decide_groups([Node("a"), Node("b")], 0, 1)
    with pytest.raises(UsageError, match="'a'"):
        decide_groups([Node("a"), Node("a")], 1, 1)
