"""Blocks in rows: each in one place, the inverse agrees, and what a row needs is on different nodes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.parity.layout import (
    Layout,
    Member,
    Place,
    Stripe,
    image_range,
    parity_range,
    parse_range_name,
)
from resilient.errors import UsageError

BLOCK = 64


@st.composite
def stripes(draw: st.DrawFn) -> Stripe:
    sizes = draw(st.lists(st.lists(st.integers(0, 700), min_size=0, max_size=3), min_size=2, max_size=6))
    m = draw(st.integers(1, len(sizes) - 1))
    members, rank = [], 0
    for number, images in enumerate(sizes):
        ranks = tuple(range(rank, rank + len(images)))
        rank += len(images)
        members.append(Member(node=f"n{number}", ranks=ranks, image_bytes=tuple(images)))
    return Stripe(life="a", step=3, world_size=max(1, rank), m=m, block_bytes=BLOCK, members=tuple(members))


@given(stripes())
def test_every_block_is_in_one_place_and_the_inverse_finds_it(stripe: Stripe) -> None:
    layout = Layout(stripe)
    seen: Counter[tuple[int, int]] = Counter()
    for row in range(stripe.n):
        for number in range(layout.blocks(row)):
            for block in layout.shards(row, number):
                seen[block.rank, block.block] += 1
                assert layout.where(block.rank, block.block) == Place(row, block.shard, number)
                assert 0 < block.nbytes <= layout.nbytes(row, number) <= BLOCK
                assert block.member not in layout.keepers(row)
    expected = {
        (rank, block): 1
        for one in stripe.members
        for rank, nbytes in zip(one.ranks, one.image_bytes, strict=True)
        for block in range(-(-nbytes // BLOCK))
    }
    assert seen == expected


@given(stripes(), st.integers(1, 5))
def test_a_stretch_is_its_row_blocks_end_to_end(stripe: Stripe, most: int) -> None:
    layout = Layout(stripe)
    for row in range(stripe.n):
        number = 0
        while number < layout.blocks(row):
            found = layout.stretch(row, number, most)
            assert 1 <= found.count <= most
            for block in found.blocks:
                alone = [layout.shards(row, number + after) for after in range(found.count)]
                ours = [one for each in alone for one in each if one.shard == block.shard]
                assert [(one.rank, one.block) for one in ours] == [
                    (block.rank, block.block + after) for after in range(found.count)
                ]
                assert all(one.nbytes == BLOCK for one in ours[:-1])
                assert sum(one.nbytes for one in ours) == block.nbytes
            widths = [layout.nbytes(row, number + after) for after in range(found.count)]
            assert sum(widths) == found.width
            assert all(len(each) == len(found.blocks) for each in alone)
            number += found.count


@given(stripes())
def test_all_bytes_of_all_images_are_covered(stripe: Stripe) -> None:
    layout = Layout(stripe)
    found: Counter[int] = Counter()
    for row in range(stripe.n):
        for number in range(layout.blocks(row)):
            for block in layout.shards(row, number):
                found[block.rank] += block.nbytes
    assert all(
        found[rank] == nbytes for one in stripe.members for rank, nbytes in zip(one.ranks, one.image_bytes, strict=True)
    )


@given(stripes())
def test_the_parity_of_a_row_is_on_m_nodes_and_its_primary_is_the_member_of_that_number(stripe: Stripe) -> None:
    layout = Layout(stripe)
    kept = [pair for member in range(stripe.n) for pair in layout.kept_by(member)]
    assert sorted(kept) == [(row, j) for row in range(stripe.n) for j in range(stripe.m)]
    for row in range(stripe.n):
        assert layout.keepers(row)[0] == row
        assert len(set(layout.keepers(row))) == stripe.m
        count = layout.blocks(row)
        assert layout.parity_bytes(row) <= count * BLOCK
        assert not count or layout.nbytes(row, count - 1) > 0


@given(stripes())
def test_a_stripe_survives_its_way_through_json(stripe: Stripe) -> None:
    assert Stripe.from_json(stripe.to_json()) == stripe


def test_what_cannot_be_is_refused() -> None:
    one = Member(node="a", ranks=(0,), image_bytes=(5,))
    with pytest.raises(UsageError, match="each node and each rank once"):
        Stripe(life="a", step=1, world_size=2, m=1, block_bytes=8, members=(one, one))
    with pytest.raises(UsageError, match="parities"):
        Stripe(life="a", step=1, world_size=2, m=1, block_bytes=8, members=(one,))
    with pytest.raises(UsageError, match="images of"):
        Member(node="a", ranks=(0, 1), image_bytes=(5,))


def test_names_of_ranges_are_parsed_and_others_are_not() -> None:
    found = parse_range_name(parity_range("0af3", 12, 3, 1))
    assert found is not None
    assert (found.kind, found.life, found.step, found.numbers) == ("parity", "0af3", 12, (3, 1))
    image = parse_range_name(image_range("0af3", 12, 7))
    assert image is not None
    assert image.numbers == (7,)
    for name in ("", "image", "image/a/1", "image/a/1/2/3", "parity/a/1/2", "parity/a/1/-2/3", "other/a/1/2"):
        assert parse_range_name(name) is None
