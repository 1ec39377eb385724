"""A snapshot of one job restored by another, of more or fewer ranks, or cut another way: bit for bit."""

import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Optimizer

import resilient
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from resilient.checkpoint.levels.index_io import make_index
from resilient.checkpoint.levels.open import open_store
from tests.checkpoint.jobs import EVERY_STEP, Job
from tests.multiprocess import reshape_jobs as jobs
from tests.multiprocess.ranks import run
from tests.multiprocess.test_parity import lose
from tests.s3_server import BUCKET, KEY, SECRET, running_server

pytestmark = pytest.mark.usefixtures("runtime_dir")

Eventually = Callable[..., None]
Shape = tuple[Callable[[], Job], int]
PAIRS: list[tuple[Shape, Shape]] = [
    ((jobs.plain, 1), (jobs.ddp, 2)),
    ((jobs.ddp, 2), (jobs.plain, 1)),
    ((jobs.fsdp, 4), (jobs.fsdp, 2)),
    ((jobs.fsdp, 2), (jobs.fsdp, 3)),
    ((jobs.fsdp, 2), (jobs.plain, 1)),
    ((jobs.tensor_parallel, 2), (jobs.ddp, 3)),
    ((jobs.plain, 1), (jobs.tensor_parallel, 4)),
    ((jobs.tensor_parallel, 4), (jobs.fsdp, 3)),
    ((jobs.hsdp, 4), (jobs.tensor_parallel, 2)),
    ((jobs.tensor_parallel, 2), (jobs.ddp, 2)),
    ((jobs.ddp, 2), (jobs.fsdp, 2)),
    ((jobs.adafactor, 2), (jobs.adafactor, 3)),
    ((jobs.pipeline, 3), (jobs.pipeline, 2)),
    ((jobs.pipeline, 2), (jobs.pipeline, 1)),
]


def name(pair: tuple[Shape, Shape]) -> str:
    return "-to-".join(f"{make.__name__}{size}" for make, size in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_a_snapshot_is_restored_by_a_job_of_another_shape(pair: tuple[Shape, Shape], tmp_path: Path) -> None:
    (before, size), (after, other) = pair
    run(jobs.save, size, before, str(tmp_path / "run"), str(tmp_path))
    for levels, *_ in run(jobs.restore, other, after, str(tmp_path / "run"), str(tmp_path), size):
        assert levels == dict.fromkeys(range(size), "durable")


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (2, 3), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("optimizer", [jobs.Lion, jobs.muon, jobs.Factored])
def test_the_state_of_any_optimizer_is_cut_anew(
    optimizer: Callable[[Any], Optimizer], sizes: tuple[int, int], tmp_path: Path
) -> None:
    # Where nothing says how the state is to lie that is not cut like its parameter, it lies as the live one does.
    before, after = (partial(jobs.matrices, optimizer, sharded=size > 1, steps=int(sizes[0] == 1)) for size in sizes)
    run(jobs.save, sizes[0], before, str(tmp_path / "run"), str(tmp_path))
    run(jobs.restore, sizes[1], after, str(tmp_path / "run"), str(tmp_path), sizes[0])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL in a real S3 server, which every process that starts now can reach."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running_server().port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


def test_what_all_ranks_of_a_node_need_comes_over_the_network_once(bucket: str, tmp_path: Path) -> None:
    run(jobs.save, 2, jobs.tensor_parallel, bucket, str(tmp_path))
    images = sum(file.nbytes for file in open_source(Reference(url=bucket)).catalog.files)
    found = run(jobs.restore, 3, jobs.ddp, bucket, str(tmp_path), 2)
    # Once for all, and some for the objects and to compare what is replicated.
    assert images <= sum(read for _, read, _ in found) < 1.9 * images


INDEX = "step_00000002/catalog.json"


def spoilt(url: Path, how: str, again: Callable[[], object]) -> None:
    """Make the index of a snapshot one that is of no use; `again`: another attempt at the steps."""
    index = url / INDEX
    before = index.read_bytes()
    if how == "missing":
        index.unlink()
    elif how == "damaged":
        index.write_bytes(before[:-100] + b"X" + before[-99:])
    elif how == "of another attempt":
        again()
        assert index.read_bytes() != before
        index.write_bytes(before)


@pytest.mark.parametrize("how", ["right", "missing", "damaged", "of another attempt"])
def test_no_rank_reads_every_record_whatever_there_is_of_the_index(how: str, tmp_path: Path) -> None:
    url = tmp_path / "run"
    run(jobs.save, 6, jobs.even, str(url), str(tmp_path))
    right = (url / INDEX).read_bytes()
    spoilt(url, how, lambda: run(jobs.save, 6, jobs.even, str(url), str(tmp_path)))
    found = run(jobs.restore, 2, jobs.even, str(url), str(tmp_path), 6, replace(EVERY_STEP, keep_last=9))
    # Of the three images that a rank needs, of the one whose objects it takes, and of the one with all counters; those
    # that it has read for the others, where there was no index, are the same.
    assert [records for _, _, records in found] == [3, 5]
    after = (url / INDEX).read_bytes()
    assert (after == right) == (how != "of another attempt")
    assert make_index(open_store(str(url)), 2, range(6), 6).text().encode() == after


def test_what_is_read_while_the_rest_is_planned_is_read_once(tmp_path: Path) -> None:
    run(jobs.save, 2, jobs.wide, str(tmp_path / "run"), str(tmp_path))
    images = sum(path.stat().st_size for path in (tmp_path / "run/step_00000002").glob("*.safetensors"))
    found = run(jobs.restore, 4, jobs.wide, str(tmp_path / "run"), str(tmp_path), 2)
    assert images < sum(read for _, read, _ in found) < 1.1 * images


def test_a_job_that_may_not_write_makes_the_index_for_itself(tmp_path: Path) -> None:
    """Five ranks, of which some read no record for the others, from three."""
    url = tmp_path / "run"
    run(jobs.save, 3, jobs.fsdp, str(url), str(tmp_path))
    (url / INDEX).unlink()
    (url / INDEX).mkdir()  # what cannot be written, whoever one is
    for levels, *_ in run(jobs.restore, 5, jobs.fsdp, str(url), str(tmp_path), 3):
        assert levels == dict.fromkeys(range(3), "durable")


MEMORY = resilient.Policy(durable_every=0, agent_idle_s=60, fence_timeout_s=40)


@pytest.mark.parametrize("pair", [PAIRS[2], PAIRS[3], PAIRS[0], PAIRS[1], PAIRS[9]], ids=name)
def test_fewer_or_more_ranks_go_on_from_memory(pair: tuple[Shape, Shape], tmp_path: Path) -> None:
    (before, size), (after, other) = pair
    run(jobs.save, size, before, str(tmp_path / "run"), str(tmp_path), MEMORY, "memory")
    for levels, *_ in run(jobs.restore, other, after, str(tmp_path / "run"), str(tmp_path), size, MEMORY, "memory"):
        assert levels == dict.fromkeys(range(size), "memory")


def test_images_in_the_memory_of_other_nodes_are_sent(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "run"), str(tmp_path))
    run(jobs.save, 4, jobs.fsdp, *arguments, MEMORY, "memory", nodes=("a", "a", "b", "c"))
    found = run(jobs.restore, 3, jobs.fsdp, *arguments, 4, MEMORY, "memory", nodes=("c", "a", "b"))
    assert [levels for levels, *_ in found] == [dict.fromkeys(range(4), "memory")] * 3


PARITY = resilient.Policy(parity="2+1", durable_every=0, agent_idle_s=60, fence_timeout_s=40)


def test_the_survivors_of_a_lost_node_go_on_with_fewer_ranks_from_parity(
    tmp_path: Path, eventually: Eventually
) -> None:
    arguments = (str(tmp_path / "run"), str(tmp_path))
    run(jobs.save, 3, jobs.fsdp, *arguments, PARITY, "parity", nodes=("a", "b", "c"))
    lose(str(tmp_path), "b", eventually)
    policy = replace(PARITY, parity="1+1")
    found = run(jobs.restore, 2, jobs.fsdp, *arguments, 3, policy, "memory", nodes=("a", "c"))
    assert [levels for levels, *_ in found] == [{0: "memory", 1: "parity", 2: "memory"}] * 2


@pytest.mark.parametrize("where", ["data", "header", "digests", "record"])
def test_damage_on_disk_leads_to_an_older_snapshot(where: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    run(jobs.save, 2, jobs.fsdp, url, str(tmp_path))
    assert run(jobs.go_back, 3, jobs.fsdp, url, str(tmp_path), 2, where) == [[]] * 3


def test_where_nothing_undamaged_is_left_no_live_tensor_is_touched(tmp_path: Path) -> None:
    url = tmp_path / "run"
    run(jobs.save, 2, jobs.fsdp, str(url), str(tmp_path))
    shutil.rmtree(url / "step_00000001")
    for said in run(jobs.go_back, 3, jobs.fsdp, str(url), str(tmp_path), 2, "data"):
        assert len(said) == 1
        assert "no undamaged snapshot is left" in said[0]
