"""Work that several threads share: what goes wrong on one of them."""

import ctypes

import pytest

from resilient.checkpoint.copying import Move, SharedWork
from resilient.errors import AgentLost


def test_an_error_while_telling_of_progress_reaches_who_waits_and_not_who_helps() -> None:
    source, target = ctypes.create_string_buffer(b"abcd", 4), ctypes.create_string_buffer(4)
    moves = [Move(ctypes.addressof(target) + at, ctypes.addressof(source) + at, 1) for at in range(4)]

    def progress(done: int) -> None:
        if done == 2:
            raise AgentLost("gone")

    work = SharedWork(moves, progress)
    work.help()  # the training thread at its fence: it must not see the agent's death inside optimizer.step()
    with pytest.raises(AgentLost):
        work.wait(5)
    assert target.raw == b"ab\0\0"
