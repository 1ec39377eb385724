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


def test_ranks_meet_before_anything_is_done_on_a_device() -> None:
    said = run(jobs.together, 2, jobs.late, "opening", "cuda")
    assert said[0].startswith("CollectiveTimeout: rank 1 has not opened symmetric memory 'test' within 0.2 s")


def test_what_one_rank_cannot_open_fails_on_all_and_leaves_nothing_open() -> None:
    here, there = run(jobs.together, 2, jobs.one_cannot_open)
    assert [line.split(":")[0] for line in there.splitlines()] == ["OverBudget"] * 3
    assert [line.split(":")[0] for line in here.splitlines()] == ["CollectiveFailed"] * 3
    assert here.count("rank 1 cannot open") == 3
    assert "raise the limit" in here


def test_memory_that_cannot_be_mapped_leaves_no_descriptor_open() -> None:
    run(jobs.no_address_space, 1)


def test_what_a_forked_process_lets_go_of_its_parent_keeps() -> None:
    run(jobs.together, 2, jobs.a_fork_lets_go)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_different_sizes_are_noticed_on_all_ranks(device: str) -> None:
    said = run(jobs.together, 2, jobs.different_sizes, device)
    assert all(one.startswith("CollectiveMismatch") and "4096" in one and "8192" in one for one in said)


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_stays_open(closed: bool) -> None:
    for found in run(jobs.together, 2, jobs.open_descriptors, closed):
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


def test_who_exits_in_order_is_missed_only_by_who_waits_for_it(tmp_path: Path, eventually: Callable[..., None]) -> None:
    world = 3
    started = [
        _spawn.Process(target=jobs.finish_without_one, args=(rank, world, str(tmp_path))) for rank in range(world)
    ]
    for process in started:
        process.start()
    try:
        started[0].join(60)
        assert started[0].exitcode == 0
        (tmp_path / "rank 0 has ended").touch()
        said = [tmp_path / f"rank {rank}" for rank in (1, 2)]
        eventually(lambda: all(one.exists() for one in said), "the others have gone on", 30)
        for one in said:
            first, second = one.read_text().splitlines()
            assert first == "signalled"
            assert second.startswith("PeerGone: rank 0 is gone")
    finally:
        for process in started:
            process.kill()
            process.join()


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
