"""Memory that processes share: what is written is seen, who does not come or dies is named, nothing is left behind."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resilient.errors import CollectiveMismatch, CollectiveTimeout, PeerGone, UsageError
from resilient.kernels.symmetric import open_symmetric, raise_failure
from resilient.kernels.symmetric.memory import Cause
from resilient.kernels.symmetric.peers import Member, make_segment, open_segments
from tests.kernels.symmetric import jobs
from tests.multiprocess.ranks import run

_spawn = multiprocessing.get_context("spawn")


@pytest.mark.parametrize("world", [1, 4])
def test_every_rank_reads_what_others_wrote_into_its_memory(world: int) -> None:
    run(jobs.together, world, jobs.everybody_writes_to_everybody)


def test_a_signal_carries_what_was_written_before_it() -> None:
    run(jobs.together, 3, jobs.signals_carry_what_was_written_before, 1000)


def test_two_signals_count_as_two() -> None:
    run(jobs.together, 2, jobs.two_signals_count_as_two)


def test_tensors_that_do_not_lie_in_the_buffer_are_refused() -> None:
    for said in run(jobs.together, 2, jobs.what_is_refused):
        assert len(said) == 3
        assert all(one.startswith("UsageError") and "a buffer of 4096" in one for one in said)


@pytest.mark.parametrize(("name", "part"), [("barrier", "a wait for rank 1's signal"), ("opening", "has not opened")])
def test_who_does_not_come_is_named(name: str, part: str) -> None:
    said = run(jobs.together, 2, jobs.late, name)
    assert said[0].startswith("CollectiveTimeout: rank 1")
    assert part in said[0]


def test_different_sizes_are_noticed_on_all_ranks() -> None:
    said = run(jobs.together, 2, jobs.different_sizes)
    assert all(one.startswith("CollectiveMismatch") and "4096" in one and "8192" in one for one in said)


def test_nothing_stays_open() -> None:
    for found in run(jobs.together, 2, jobs.open_descriptors):
        assert found[-1] == found[1]


def test_a_death_ends_the_wait_of_others_and_leaves_nothing_behind(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    world, before = 3, set(os.listdir("/dev/shm"))
    started = [
        _spawn.Process(target=jobs.wait_for_the_dead, args=(rank, world, str(tmp_path))) for rank in range(world)
    ]
    for process in started:
        process.start()
    try:
        eventually((tmp_path / "ready").exists, "all ranks have opened the memory", 60)
        pid = started[-1].pid
        assert pid is not None
        assert "memfd:resilient-dying" in Path(f"/proc/{pid}/maps").read_text()
        os.kill(pid, signal.SIGKILL)
        said = [tmp_path / f"rank {rank}" for rank in range(world - 1)]
        eventually(lambda: all(one.exists() for one in said), "the others get an error", 30)
        assert all(f"PeerGone: rank {world - 1} is gone" in one.read_text() for one in said)
    finally:
        for process in started:
            process.kill()
            process.join()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "resilient-dying" in name]


def test_another_file_under_the_same_number_is_not_taken_for_a_ranks_memory() -> None:
    own, other = make_segment(4096, "own"), make_segment(4096, "other")
    here = {"place": "", "host": "here", "pid": os.getpid(), "sizes": (1,)}
    true = Member(fd=other.fd, nonce=other.nonce, **here)  # type: ignore[arg-type]
    assert open_segments([true, true], 0, own)[1].bytes.data_ptr() != own.bytes.data_ptr()
    false = Member(fd=other.fd, nonce=own.nonce, **here)  # type: ignore[arg-type]
    with pytest.raises(PeerGone, match="is not rank 1 any more"):
        open_segments([true, false], 0, own)
    other.close()
    with pytest.raises(PeerGone, match="rank 1 .* is gone"):
        open_segments([true, true], 0, own)
    own.close()


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(Cause.GONE, PeerGone), (Cause.LATE, CollectiveTimeout), (Cause.OTHER_CALL, CollectiveMismatch)],
)
def test_a_failure_word_says_why_and_who(cause: Cause, kind: type[Exception]) -> None:
    word = cause.word(513)
    assert ctypes.c_int32(word).value == word  # it fits a signal
    with pytest.raises(kind, match="rank 513 .*a test.*form another one"):
        raise_failure(word, "a test", 1.0)


def test_there_is_none_without_a_group_or_for_other_devices() -> None:
    with pytest.raises(UsageError, match="init_process_group"):
        open_symmetric(None, torch.device("cpu"), name="x", buffer_bytes=1, signal_words=64)
