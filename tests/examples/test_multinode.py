"""torchrun over nodes that die: spares take their places, and training ends with the bits of an undisturbed run."""

import io
import json
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the examples are no installed package

from examples.multinode import Job, JobFailed, _RendezvousReader
from examples.nodes import Nodes
from examples.steplog import losses, read_steps

pytestmark = pytest.mark.timeout(300)  # each life starts torch anew, which takes long on a machine with other work
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces can be made by root only")
ROOT = Path(__file__).resolve().parents[2]
TOY = str(ROOT / "tests" / "examples" / "toy_trainer.py")
DEADLINE_S = 60


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rs-") as name:
        yield Path(name)


def toy_steps(folder: Path) -> list[dict[str, Any]]:
    """What the toy trainer wrote down; a half-written last line is left out."""
    path = folder / "steps"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def runs(job: Job, folder: Path, nodes: list[str]) -> Callable[[], bool]:
    """The condition that the newest step was made by these nodes, in order of rank. Fails when the job does."""

    def condition() -> bool:
        assert not job.poll(), "the job has ended"
        return bool(steps := toy_steps(folder)) and steps[-1]["nodes"] == nodes

    return condition


@needs_root
def test_spares_replace_a_node_of_rank_0_that_lost_its_power_and_then_two_nodes_at_once(
    folder: Path, eventually: Callable[..., None]
) -> None:
    with Nodes(3, isolated=True) as nodes, Job(nodes, [TOY, str(folder)], folder=folder) as job:
        eventually(runs(job, folder, ["n1", "n2", "n3"]), "the first life", DEADLINE_S)
        assert job.replace("n1", silent=True) == "n4"
        eventually(runs(job, folder, ["n2", "n3", "n4"]), "the second life", DEADLINE_S)
        job.kill("n2")
        job.kill("n4")
        assert (job.add_spare(), job.add_spare()) == ("n5", "n6")
        eventually(runs(job, folder, ["n3", "n5", "n6"]), "the third life", DEADLINE_S)
        (folder / "stop").touch()
        job.wait(DEADLINE_S)
        lives = [step["life"] for step in toy_steps(folder)]
        assert lives == sorted(lives)
        assert (lives[0], lives[-1]) == (0, job.newest_life())
        assert [(start.rank, start.node) for start in job.starts(0)] == [(0, "n1"), (1, "n2"), (2, "n3")]


def test_a_node_whose_torchrun_fails_joins_again_and_a_killed_one_is_replaced_on_loopback_too(
    folder: Path, eventually: Callable[..., None]
) -> None:
    with (
        Nodes(2, isolated=False) as nodes,
        Job(nodes, [TOY, str(folder)], folder=folder, rejoins=1) as job,
    ):
        eventually(runs(job, folder, ["n1", "n2"]), "the first life", DEADLINE_S)
        os.kill(job.torchrun_pid("n1"), signal.SIGTERM)
        eventually(lambda: not job.poll() and job.newest_life() > 0, "the life after it had ended", DEADLINE_S)
        job.replace("n2")
        eventually(runs(job, folder, ["n1", "n3"]), "the life with the spare", DEADLINE_S)
        (folder / "stop").touch()
        job.wait(DEADLINE_S)


def test_a_trainer_that_fails_for_good_fails_the_job_with_the_end_of_its_output(folder: Path) -> None:
    trainer = folder / "trainer.py"
    trainer.write_text("raise SystemExit('no such data')")
    with (
        Nodes(1, isolated=False) as nodes,
        Job(nodes, [str(trainer)], folder=folder, max_restarts=0, rejoins=0) as job,
    ):
        with pytest.raises(JobFailed, match="(?s)torchrun ended with 1 on n1.*no such data"):
            job.wait(DEADLINE_S)
        assert [start.rank for start in job.starts(0)] == [0]


def test_a_job_that_takes_too_long_is_ended(folder: Path, eventually: Callable[..., None]) -> None:
    with Nodes(1, isolated=False) as nodes:
        with Job(nodes, [TOY, str(folder)], folder=folder, ranks_per_node=2) as job:
            eventually(runs(job, folder, ["n1", "n1"]), "the first life", DEADLINE_S)
            with pytest.raises(JobFailed, match="not ended within 0 s on n1"):
                job.wait(0)
        assert nodes.processes("n1") == []


def train(folder: Path, before_it_ends: Callable[[Job, Path], None]) -> dict[str, Any]:
    """Train the example on two nodes; returns its result and, as `all`, the losses of all lives."""
    result, url = folder / "result.json", folder / "run"
    trainer = [str(ROOT / "examples" / "train_gpt.py"), "--url", str(url), "--result", str(result)]
    trainer += ["--steps", "24", "--batch", "2", "--durable-every", "2"]
    with Nodes(2, isolated=True) as nodes, Job(nodes, trainer, folder=folder) as job:
        before_it_ends(job, url)
        job.wait(DEADLINE_S)
    steps = read_steps(result.with_name(result.name + ".steps"))
    return {**json.loads(result.read_text()), "all": losses(steps)}


@needs_root
def test_a_training_job_whose_node_is_killed_ends_with_the_bits_of_an_undisturbed_one(
    folder: Path, eventually: Callable[..., None]
) -> None:
    def kill(job: Job, url: Path) -> None:
        def is_durable() -> bool:
            assert not job.poll(), "it has ended too soon"
            return len(list(url.glob("step_00000004/rank_*.json"))) == 2

        eventually(is_durable, "step 4 is durable", DEADLINE_S)
        job.replace("n2")

    undisturbed = train(folder / "undisturbed", lambda *_: None)
    killed = train(folder / "killed", kill)
    assert (undisturbed["life"], undisturbed["restore"]) == (0, None)
    assert killed["life"] > 0
    assert killed["restore"]["step"] >= 4
    for what in ("weights", "optimizer", "all"):
        assert undisturbed[what] == killed[what]
    assert undisturbed["ranks_agree"]
    assert killed["ranks_agree"]


def test_of_the_rendezvous_state_nothing_is_made_but_what_torchrun_puts_there() -> None:
    state = _RendezvousState()
    state.round = 7
    state.deadline = datetime.now(UTC)
    state.participants[_NodeDesc("n1", 1, 0)] = 0
    assert _RendezvousReader(io.BytesIO(pickle.dumps(state))).load().round == 7
    state.wait_list = {os.system}  # type: ignore[arg-type]
    with pytest.raises(pickle.UnpicklingError, match="posix.system, which is no part of torchrun's state"):
        _RendezvousReader(io.BytesIO(pickle.dumps(state))).load()
