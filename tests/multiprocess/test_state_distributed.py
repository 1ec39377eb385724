"""The state of jobs of several ranks: nothing stored twice, everything back where it was, bit for bit."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import LayoutMismatch
from tests.checkpoint.jobs import Job
from tests.multiprocess import distributed_jobs as jobs
from tests.multiprocess.ranks import run, scratch

pytestmark = pytest.mark.usefixtures("runtime_dir")

WORLDS: dict[Callable[[], Job], int] = {
    jobs.ddp: 2,
    jobs.ddp_with_a_layer_of_its_own: 2,
    jobs.ddp_of_two_pairs: 4,
    jobs.fsdp: 2,
    jobs.fsdp_uneven: 2,
    jobs.fsdp_partly: 2,
    jobs.hsdp: 4,
    jobs.fsdp_and_tensor_parallel: 4,
    jobs.own: 2,
}


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_a_job_of_several_ranks_comes_back_bit_for_bit_from_memory_and_from_disk(
    make: Callable[[], Job], tmp_path: Path
) -> None:
    run(jobs.save_and_restore, WORLDS[make], make, str(tmp_path / "run"))
    ranges, sizes = jobs.stored(tmp_path / "run", 2)
    assert len(sizes) == WORLDS[make]
    if make is not jobs.ddp_of_two_pairs:  # there the same names stand for two tensors
        for (name, _, box, _), parts in ranges.items():
            inside = sorted(part for part in parts if part[0] < part[1])
            assert inside == [] or (inside[0][0], inside[-1][1]) == (0, math.prod(box)), name
            assert all(before[1] == after[0] for before, after in pairwise(inside)), name
            assert len(parts) == max(1, len(inside)), f"{name} is stored twice"
    if make in (jobs.ddp, jobs.hsdp):
        assert max(sizes) < 1.03 * min(sizes)


@pytest.mark.parametrize(
    ("make", "records"),
    [(jobs.fsdp_with_momentum, [1, 1, 1]), (jobs.fsdp, [1, 2, 2]), (jobs.own, [1, 1]), (jobs.hsdp, [2, 3, 2, 3])],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_rank_knows_no_image_but_its_own_and_those_that_have_what_it_shares(
    make: Callable[[], Job], records: list[int], tmp_path: Path
) -> None:
    """Of a sharded model that is none; rank 0 has the counters of AdamW; of hybrid sharding each box has a replica."""
    run(jobs.save_for, len(records), make, str(tmp_path / "run"), str(tmp_path))
    assert run(jobs.restore_from, len(records), make, str(tmp_path / "run"), str(tmp_path)) == records


def test_what_a_rank_thought_nobody_wants_it_tells_when_another_lacks_it(tmp_path: Path) -> None:
    run(jobs.save_for, 2, jobs.small_ddp, str(tmp_path / "run"), str(tmp_path))
    found = run(jobs.restore_from, 2, jobs.small_and_no_longer_shared, str(tmp_path / "run"), str(tmp_path))
    assert found == [1, 2]


def test_two_nodes_come_back_from_their_memories_after_a_trainer_was_killed(tmp_path: Path) -> None:
    scratch("facts").mkdir()
    arguments = (jobs.ddp, str(tmp_path), str(scratch("facts")))
    assert run(jobs.train_and_die, 2, *arguments, nodes=("a", "b")) == [None, None]
    levels = run(jobs.come_back, 2, *arguments, nodes=("a", "b"))
    assert levels == [{0: "memory", 1: "memory"}] * 2


def test_what_does_not_fit_one_rank_is_refused_on_all_and_overwrites_nothing(tmp_path: Path) -> None:
    messages = run(jobs.refuse, 2, jobs.own, jobs.own_misfit, str(tmp_path))
    assert all("'model.weight'" in message for message in messages)
    assert "rank 1" in messages[0]


def test_modules_that_each_rank_has_alone_are_not_joined_by_guessing(tmp_path: Path) -> None:
    run(jobs.save_and_restore, 2, jobs.own, str(tmp_path))
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    checkpointer = Checkpointer(str(tmp_path), {"model": model})
    with pytest.raises(LayoutMismatch, match="2 ranks of the job that made the snapshot have different ones"):
        checkpointer.restore()
    checkpointer.close()
    assert torch.equal(model.weight, before)
