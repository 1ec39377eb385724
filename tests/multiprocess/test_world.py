"""How ranks tell one another what they have found."""

from resilient.checkpoint.world import _HEAD_BYTES, join_world
from tests.multiprocess.ranks import run


def told(lengths: list[list[int]]) -> list[list[str]]:
    """What every rank hears when rank r says a text of `lengths[turn][r]` bytes, turn by turn."""
    world = join_world()
    return [world.gather(str(world.rank) * turn[world.rank]) for turn in lengths]


def test_all_hear_the_same_however_long_it_is() -> None:
    edge = _HEAD_BYTES - 2  # JSON adds two quotation marks
    lengths = [[0, 1, 2], [edge - 1, edge, edge + 1], [edge, edge, edge], [0, 100_000, edge + 1]]
    expected = [["".join([str(rank)] * length) for rank, length in enumerate(turn)] for turn in lengths]
    assert run(told, 3, lengths) == [expected] * 3
