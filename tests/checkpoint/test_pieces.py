"""Pieces and how replicas share them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.pieces import Piece, Replicated, share

tensors = st.lists(
    st.builds(
        Replicated,
        numel=st.integers(0, 3_000_000),
        itemsize=st.sampled_from([1, 2, 4, 8]),
        divisible=st.booleans(),
    ),
    max_size=30,
)


@given(tensors, st.integers(1, 9))
def test_the_shares_of_all_replicas_are_each_tensor_once(tensors: list[Replicated], replicas: int) -> None:
    for tensor, ranges in zip(tensors, share(tensors, replicas), strict=True):
        assert len(ranges) == replicas
        assert (ranges[0][0], ranges[-1][1]) == (0, tensor.numel)
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        assert all(start <= stop for start, stop in ranges)


@given(tensors, st.integers(1, 9))
def test_what_may_not_be_cut_goes_whole_to_one_replica(tensors: list[Replicated], replicas: int) -> None:
    for tensor, ranges in zip(tensors, share(tensors, replicas), strict=True):
        if not tensor.divisible:
            assert sum(stop > start for start, stop in ranges) <= 1


def test_large_tensors_are_shared_evenly() -> None:
    tensors = [Replicated(50_000_000, 4, True), *[Replicated(1000, 4, True)] * 20]
    shares = share(tensors, 3)
    loads = [sum((shares[i][r][1] - shares[i][r][0]) * t.itemsize for i, t in enumerate(tensors)) for r in range(3)]
    assert max(loads) - min(loads) < 2 << 20


def test_what_is_small_of_many_replicas_is_saved_by_few() -> None:
    shares = share([Replicated(1, 4, True)] * 2000, 4096)
    assert {rank for ranges in shares for rank, (start, stop) in enumerate(ranges) if stop > start} == {0}


def test_a_part_of_a_piece_keeps_its_box() -> None:
    box = Piece.box((8, 4), (2, 0), (2, 4))
    part = box.part(3, 5)
    assert part.same_box(box)
    assert part.numel == 2
    assert box.is_box
    assert not part.is_box
