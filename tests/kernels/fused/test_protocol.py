"""The signals of the fused kernels, in every interleaving of a small world; and that the search finds mistakes."""

from itertools import product

import pytest

from resilient.kernels.fused.shapes import OPERATIONS
from tests.kernels.fused.interleavings import Read, Release, Store, Wait, explore
from tests.kernels.fused.protocol import AFTER_GIVING_UP, MUTATIONS, Kernel, Mutation, ranks


@pytest.mark.parametrize("kernels", list(product(OPERATIONS, repeat=3)))
@pytest.mark.parametrize("at_once", [True, False])
def test_two_ranks_never_read_old_data_or_get_stuck(kernels: tuple[Kernel, ...], at_once: bool) -> None:
    outcome = explore(ranks(kernels, 2), at_once=at_once)
    assert outcome.wrong is None
    assert outcome.states > 50  # it was a search


@pytest.mark.parametrize("kernels", list(product(OPERATIONS, repeat=2)))
def test_three_ranks_never_read_old_data_or_get_stuck(kernels: tuple[Kernel, ...]) -> None:
    assert explore(ranks(kernels, 3), at_once=False).wrong is None


@pytest.mark.parametrize("kernel", OPERATIONS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mistake_in_the_protocol_is_found(kernel: Kernel, mutation: Mutation) -> None:
    kernels: tuple[Kernel, ...] = (kernel, "all_gather_matmul", kernel)
    assert explore(ranks(kernels, 2, mutation), at_once=True).wrong is not None


@pytest.mark.parametrize("kernels", list(product(OPERATIONS, repeat=2)))
@pytest.mark.parametrize("at_once", [True, False])
def test_who_does_not_give_up_reads_no_wrong_data_when_another_has(kernels: tuple[Kernel, ...], at_once: bool) -> None:
    assert explore(ranks(kernels, 2), at_once=at_once, timeouts=1).wrong is None


@pytest.mark.parametrize("kernel", OPERATIONS)
def test_neither_does_one_of_three_ranks(kernel: Kernel) -> None:
    assert explore(ranks([kernel], 3), at_once=False, timeouts=2).wrong is None


@pytest.mark.parametrize("mutation", AFTER_GIVING_UP)
def test_a_mistake_after_giving_up_is_found(mutation: Mutation) -> None:
    wrong = ranks(("matmul_all_reduce", "all_gather_matmul"), 2, mutation)
    assert explore(wrong, at_once=False).wrong is None
    assert "found" in (explore(wrong, at_once=False, timeouts=1).wrong or "")


def test_plain_stores_may_arrive_in_any_order() -> None:
    data, flag = (1, "data"), (1, "flag")
    reader = (((Wait(flag, 1), Read(data, 1)),),)
    assert "found 0" in (explore([(((Store(data, 1), Store(flag, 1)),),), reader], at_once=True).wrong or "")
    assert explore([(((Store(data, 1), Release(flag, 1)),),), reader], at_once=True).wrong is None


def test_programs_that_wait_for_later_ones_of_their_own_grid_get_stuck_only_one_after_another() -> None:
    flag = (0, "flag")
    rank = (((Wait(flag, 1),), (Release(flag, 1),)),)
    assert explore([rank], at_once=True).wrong is None
    assert "nobody can go on" in (explore([rank], at_once=False).wrong or "")
