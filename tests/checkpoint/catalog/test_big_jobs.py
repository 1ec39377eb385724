"""Jobs of many ranks: the catalog does not grow with them, and a rank finds what it needs in it, each element once."""

import math

import pytest

from bench.big_job import WAYS, boxes_of_rank, catalog_of, shapes
from resilient.checkpoint.catalog.catalog import parse_catalog
from resilient.checkpoint.catalog.meet import parts_of

TENSORS = 30


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_of_another_job_finds_all_that_it_needs(way: str) -> None:
    catalog = parse_catalog(catalog_of(way, 64, TENSORS).text(), "it")
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
    assert found == catalog.nbytes // 4 + 3 * norms  # which all four ranks of a group have


@pytest.mark.parametrize("way", WAYS)
def test_a_catalog_of_eight_times_the_ranks_is_hardly_larger(way: str) -> None:
    few, many = (catalog_of(way, ranks, TENSORS) for ranks in (256, 2048))
    for catalog in (few, many):
        catalog.files.clear()  # whose names are listed
    assert len(many.text()) < 2.5 * len(few.text())


def test_planning_does_not_look_at_every_rank() -> None:
    """What a box meets of a lattice is computed: the rows that are made do not grow with the ranks."""
    catalog = parse_catalog(catalog_of("FSDP2", 4096, 4).text(), "it")
    table = catalog.tensors["model.embed_tokens"].pieces
    assert len(table) > 4000
    assert sum(len(rows) for rows in table._candidates((64_000, 0), (64, 8192))) <= 4
