"""Jobs of many ranks: the catalog does not grow with them, and a rank finds what it needs in it, each element once."""

import math

import pytest

from bench.big_job import WAYS, boxes_of_rank, index_of, part_of, shapes
from resilient.checkpoint.catalog.index import merged, parse_index
from resilient.checkpoint.catalog.meet import parts_of
from resilient.checkpoint.catalog.native import native_catalog

TENSORS = 30
MEMBER_BYTES = 60  # of each rank's image: plan and lengths


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_of_another_job_finds_all_that_it_needs(way: str) -> None:
    catalog = native_catalog(parse_index(index_of(way, 64, TENSORS).text(), "it"))
    found = 0
    for rank in range(16):
        for name, box in boxes_of_rank(shapes(TENSORS), rank, 4, 4).items():
            parts = parts_of(catalog.tensors[f"model.{name}"], *box)  # raises where an element is missing, or twice
            found += sum(part.numel for part in parts)
            assert all(
                part.offset >= 0 and part.offset + part.span_bytes(4) <= catalog.files[part.file].nbytes
                for part in parts
            )
    norms = sum(math.prod(shape) for shape in shapes(TENSORS).values() if len(shape) == 1)
    parameters = sum(tensor.numel for tensor in catalog.of_kind("parameter"))
    assert found == parameters + 3 * norms  # which all four ranks of a group have


@pytest.mark.parametrize("way", WAYS)
def test_a_catalog_of_eight_times_the_ranks_is_hardly_larger(way: str) -> None:
    few, many = (len(index_of(way, ranks, TENSORS).text()) - ranks * MEMBER_BYTES for ranks in (256, 2048))
    assert many < 2.5 * few


def test_planning_does_not_look_at_every_rank() -> None:
    """What a box meets of a lattice is computed: the rows that are made do not grow with the ranks."""
    catalog = native_catalog(parse_index(index_of("FSDP2", 4096, 4).text(), "it"))
    table = catalog.tensors["model.embed_tokens"].pieces
    assert len(table) > 4000
    assert len(table.near((64_000, 0), (64, 8192))) <= 4


@pytest.mark.parametrize("way", WAYS)
def test_what_ranks_send_one_another_to_make_the_catalog_does_not_grow_with_them(way: str) -> None:
    """Of 1,024 ranks that read two records each, the one that hears most: along the tree, from ever larger parts."""
    index = index_of(way, 2048, TENSORS)
    held, end, heard = part_of(index, 0, 2), 2, []
    while end < 2048:
        sent = part_of(index, end, 2 * end).text()
        heard.append(len(sent) - end * MEMBER_BYTES)
        held, end = merged([held, parse_index(sent, "a part")]), 2 * end
    assert held.text() == index.text()
    assert max(heard) < 1.1 * (len(index.text()) - 2048 * MEMBER_BYTES)
