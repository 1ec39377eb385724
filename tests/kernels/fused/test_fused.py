"""The fused kernels in Triton's interpreter, among real processes: results, gradients, failures. See jobs.py."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient.kernels.fused
from tests.kernels.fused import endings, jobs
from tests.multiprocess.ranks import run

KERNEL = Path(resilient.kernels.fused.__file__).with_name("kernel.py")
_spawn = multiprocessing.get_context("spawn")

pytestmark = pytest.mark.usefixtures("runtime_dir")


def interpreted(body: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    return run(jobs.interpret, world, body, *arguments)


@pytest.mark.parametrize(
    ("world", "dtypes"),
    [
        (1, (torch.float32,)),
        (2, (torch.float16, torch.bfloat16)),
        (3, (torch.float32,)),
        (4, (torch.float32,)),
    ],
)
def test_results_are_those_of_the_whole_product(world: int, dtypes: tuple[torch.dtype, ...]) -> None:
    interpreted(jobs.every_shape, world, dtypes)


def test_rows_need_not_divide_by_the_ranks_in_an_all_reduce() -> None:
    interpreted(jobs.uneven_rows, 3)


@pytest.mark.parametrize(("world", "count"), [(2, 400), (3, 45)])
def test_memory_is_used_again_by_many_calls_and_every_number_is_right(world: int, count: int) -> None:
    assert interpreted(jobs.many_calls, world, count) == [0] * world


@pytest.mark.parametrize(("world", "count"), [(2, 3000), (3, 600)])
def test_signals_are_used_again_by_thousands_of_epochs(world: int, count: int) -> None:
    seed = random.randrange(1 << 30)
    assert interpreted(jobs.thousands_of_epochs, world, count, seed) == [(0, 0)] * world, f"seed {seed}"


def test_calls_may_be_counted_beyond_what_fits_a_signal() -> None:
    assert interpreted(jobs.last_epochs, 2) == [0, 0]


# Of one rank, and longer than a tile takes: the own ones come first. It waits for nothing.
DAWDLE = "            for _ in range(0, 1000 * rank):\n                failed(own)\n"
CHUNK = "            begin = (chunk * group * bm).to(tl.int64) * depth\n"
TILE = "            if limit > 0:\n                total = _product(\n"
SIGNAL_CHUNK = "            signal(signals, peer, ENTERED + 2 * world + rank * chunks + chunk, epoch)\n"
SIGNAL_TILE = "            signal(signals, owner, partial + rank * tiles + number, epoch)\n"
AWAIT_CHUNK = "wait(signals, own, arrived"
AWAIT_TILE = "wait(signals, own, partial + source"
NO_WAIT = (
    "\n\n@_jit\ndef _no_wait(signals, own, word, source, epoch, tries, world, interpreted):\n    tl.debug_barrier()\n"
)
MISTAKES = {  # what is replaced in the kernels' source, and by what
    "the flag of a chunk is set before its data": {CHUNK: SIGNAL_CHUNK + DAWDLE + CHUNK},
    "the flag of a tile is set before its data": {TILE: SIGNAL_TILE + DAWDLE + TILE},
    "nobody waits for a chunk": {CHUNK: DAWDLE + CHUNK, AWAIT_CHUNK: AWAIT_CHUNK.replace("wait", "_no_wait")},
    "nobody waits for a tile": {TILE: DAWDLE + TILE, AWAIT_TILE: AWAIT_TILE.replace("wait", "_no_wait")},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_kernels_with_a_mistake_give_wrong_numbers(mistake: str) -> None:
    source = KERNEL.read_text()
    for right, wrong in MISTAKES[mistake].items():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    found = interpreted(jobs.many_calls, 2, 18, source + NO_WAIT)
    assert sum(found) > 0


def test_sums_have_the_same_bits_in_every_run_and_on_every_rank() -> None:
    found = [one for rank in interpreted(jobs.same_bits, 3) for one in rank]
    assert len(found) == 9
    assert len(set(found)) == 1


@pytest.mark.parametrize("world", [1, 3])
def test_gradients_are_those_of_the_whole_computation(world: int) -> None:
    interpreted(jobs.gradients, world)


def test_backward_computes_what_is_asked_for_only() -> None:
    interpreted(jobs.only_what_is_needed, 2)


def test_groups_do_not_get_into_each_others_way_and_memory_can_be_given_back() -> None:
    interpreted(jobs.another_thread_of_calls, 2)


def test_nothing_stays_of_a_group_that_is_over() -> None:
    interpreted(endings.groups_that_are_over, 2)


def test_check_and_close_find_the_memory_by_any_name_of_the_device() -> None:
    for *kinds, said in interpreted(endings.another_name_of_the_device, 2, 0.5):
        assert kinds == ["CollectiveTimeout"] * 4
        assert "no fused call has been made" in said


@pytest.mark.parametrize("kind", ["operation", "shape", "activation", "dtype", "size", "at first"])
def test_different_calls_are_noticed_on_all_ranks(kind: str) -> None:
    for first, later in interpreted(endings.different_calls, 3, kind):
        assert first[0] == "CollectiveMismatch"
        assert later[0] == "CollectiveMismatch" or kind == "at first"
        assert first[2] < 15


def test_a_rank_that_does_not_come_is_named_on_all_ranks() -> None:
    for kind, said, _ in interpreted(endings.a_rank_that_does_not_come, 3, 0.5):
        assert kind == "CollectiveTimeout"
        assert said.startswith("rank 1 has not come to all_gather_matmul of [24, 8] x [8, 8]")


# After the entry of a reduction: the others come that far meanwhile, or give up.
ENTRY = "        enter(signals, rank, epoch, call, world)\n    owner ="
STOP = """

def _stop():
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set("entered", "")
    store.wait(["given up"])


_stop.__triton_builtin__ = True
"""


def test_a_rank_that_has_given_up_hands_no_wrong_sums_to_one_that_comes_late() -> None:
    source = KERNEL.read_text()
    assert source.count(ENTRY) == 1
    stopped = source.replace(ENTRY, ENTRY.replace("\n", "\n        _stop()\n", 1)) + STOP
    for kind, said, _ in interpreted(endings.a_rank_that_is_late_for_others, 2, stopped, 0.5):
        assert kind == "CollectiveTimeout", said


def test_a_rank_that_dies_is_named_on_the_others(runtime_dir: Path, eventually: Callable[..., None]) -> None:
    world = 3
    processes = [
        _spawn.Process(target=endings.go_or_report, args=(rank, world, str(runtime_dir))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        eventually(lambda: list(runtime_dir.glob("ready *")), "the ranks make their first call", 60)
        killed = time.monotonic()
        pid = processes[-1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        said = [runtime_dir / f"rank {rank}" for rank in range(world - 1)]
        eventually(lambda: all(one.exists() for one in said), "the others get an error", 25)
        assert time.monotonic() - killed < 20  # less than the timeout: death is noticed, not waited out
        assert all(one.read_text().startswith(f"PeerGone: rank {world - 1} is gone") for one in said)
    finally:
        for process in processes:
            process.kill()
            process.join()


# Before a shard goes to rank 0, of three: rank 2 has it already, and is done.
BEFORE_CHUNK = "            if peer == 0:\n                _stop()\n"
STOP_UNTIL_ENDED = """

def _stop():
    import os, pathlib, time

    end = time.monotonic() + 60
    path = pathlib.Path(os.environ["RESILIENT_RUNTIME_DIR"], "ended")
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


_stop.__triton_builtin__ = True
"""


def test_a_rank_that_exits_after_its_last_call_does_not_fail_that_call_for_others(
    runtime_dir: Path, eventually: Callable[..., None]
) -> None:
    source = KERNEL.read_text()
    assert source.count(CHUNK) == 1
    stopped = source.replace(CHUNK, BEFORE_CHUNK + CHUNK) + STOP_UNTIL_ENDED
    processes = [
        _spawn.Process(target=endings.go_or_report, args=(rank, 3, str(runtime_dir), stopped)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    try:
        processes[2].join(60)
        assert processes[2].exitcode == 0
        (runtime_dir / "ended").touch()
        said = [runtime_dir / f"rank {rank}" for rank in range(2)]
        eventually(lambda: all(one.exists() for one in said), "the others have made another call", 25)
        for one in said:
            second, first = one.read_text().splitlines()
            assert first == "first: no error"
            assert second.startswith("PeerGone: rank 2 is gone")
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_operands_that_do_not_fit_are_refused_before_anything_is_launched() -> None:
    said = interpreted(jobs.unfit_operands, 2)[0]
    parts = [
        "[8, 6] and [8, 6]",
        "[6, 8] and [6, 4]",
        "strides [1, 8]",
        "torch.float16",
        "torch.float64",
        "bias of [4]",
    ]
    parts += ["7 rows do not divide by 2 ranks", "empty product", "'tanh'", "not for meta"]
    assert len(said) == len(parts)
    for message, part in zip(said, parts, strict=True):
        assert part in message


def test_what_is_not_supported_is_said_in_words() -> None:
    first, *others = interpreted(jobs.reasons, 2)[0]
    assert first is None
    parts = [
        "there is no fused 'gather'",
        "7 rows do not divide",
        "empty",
        "32 bits",
        "float64",
        "meta",
        "interpreter only",
    ]
    assert all(part in (said or "") for part, said in zip(parts, others, strict=True))
