"""The fused kernels on CUDA: results, gradients, memory used again, a rank that does not come. `make test-gpu`.

The same bodies as in tests/kernels/fused, which run them in Triton's interpreter. With fewer GPUs than ranks, ranks
share one: that proves results and the protocol, and says nothing about speed. Operands are others in every run; their
seed is printed.
"""

import random
from typing import Any

import pytest
import torch

from tests.kernels.fused import endings, jobs
from tests.kernels.overlap import jobs as overlapped
from tests.multiprocess.ranks import run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("runtime_dir"),
]
WORLDS = (1, 2, 4)
LARGE = ((256, 512, 256), (130, 1000, 264), (1024, 128, 96), (77, 129, 65))


@pytest.fixture(autouse=True)
def fresh_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = str(random.randrange(1 << 30))
    print("RESILIENT_TEST_SEED =", seed)
    monkeypatch.setenv("RESILIENT_TEST_SEED", seed)


def on_gpu(body: Any, world: int, *arguments: Any) -> list[Any]:
    return run(jobs.on_gpu, world, body, *arguments, deadline_s=300)


@pytest.mark.parametrize("world", WORLDS)
def test_results_are_those_of_the_whole_product(world: int) -> None:
    on_gpu(jobs.every_shape, world, (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.parametrize("world", WORLDS)
def test_default_tiles_give_the_same_results(world: int) -> None:
    on_gpu(jobs.every_shape, world, (torch.float32, torch.float16, torch.bfloat16), LARGE, None)


def test_rows_need_not_divide_by_the_ranks_in_an_all_reduce() -> None:
    on_gpu(jobs.uneven_rows, 2)


@pytest.mark.parametrize("world", WORLDS)
def test_memory_is_used_again_by_many_calls_and_every_number_is_right(world: int) -> None:
    assert on_gpu(jobs.many_calls, world, 2000) == [0] * world


def test_sums_have_the_same_bits_in_every_run_and_on_every_rank() -> None:
    found = [one for rank in on_gpu(jobs.same_bits, 2) for one in rank]
    assert len(set(found)) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_those_of_the_whole_computation(world: int) -> None:
    on_gpu(jobs.gradients, world)


@pytest.mark.parametrize("world", [2, 4])
def test_functions_of_the_dispatcher_give_the_gradients_of_the_whole(world: int) -> None:
    on_gpu(overlapped.gradients, world, "fused", 1, None, torch.float32)


def test_a_rank_that_does_not_come_is_named_on_all_ranks() -> None:
    for kind, said, _ in on_gpu(endings.a_rank_that_does_not_come, 2, 2.0):
        assert kind == "CollectiveTimeout"
        assert "rank 1 has not come" in said


def test_check_and_close_find_the_memory_by_any_name_of_the_device() -> None:
    for *kinds, said in on_gpu(endings.another_name_of_the_device, 2, 2.0):
        assert kinds == ["CollectiveTimeout"] * 4
        assert "no fused call has been made" in said


def test_nothing_stays_of_a_group_that_is_over() -> None:
    on_gpu(endings.groups_that_are_over, 2)
