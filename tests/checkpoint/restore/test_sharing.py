"""Who reads an image that several ranks of a node want."""

from resilient.checkpoint.restore.sharing import rounds_of

SIZES = {0: 100, 1: 100, 2: 100}


def test_what_all_ranks_of_a_node_want_is_read_once_each_by_another_of_them() -> None:
    whole = dict.fromkeys(SIZES, 100)
    assert rounds_of([whole, whole], SIZES, ("a", "a")) == [{0: 0, 1: 1}, {0: 2}]


def test_every_node_reads_for_itself() -> None:
    whole = dict.fromkeys(SIZES, 100)
    assert rounds_of([whole] * 4, SIZES, ("a", "a", "b", "b")) == [{0: 0, 1: 1, 2: 0, 3: 1}, {0: 2, 2: 2}]


def test_ranks_that_want_different_parts_read_these_themselves() -> None:
    assert rounds_of([{0: 50}, {0: 60, 1: 100}], SIZES, ("a", "a")) == []
    assert rounds_of([{0: 100}, {1: 100}], SIZES, ("a", "b")) == []


def test_a_single_rank_has_nobody_to_share_with() -> None:
    assert rounds_of([{0: 100, 1: 100}], SIZES, ("a",)) == []
