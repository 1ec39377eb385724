"""Nodes that are lost with all they held: the others bring their images back. Nodes are names here, agents real."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multiprocess import distributed_jobs as jobs
from tests.multiprocess import parity_jobs as parity
from tests.multiprocess.ranks import run, scratch

pytestmark = pytest.mark.usefixtures("runtime_dir")

Eventually = Callable[..., None]


@pytest.fixture
def folder() -> str:
    made = scratch("facts")
    made.mkdir()
    return str(made)


def lose(folder: str, node: str, eventually: Eventually) -> None:
    """Kill the node's agent, and with it all that was in its memory; its trainers are dead already."""
    pid = json.loads(Path(folder, f"agent-{node}.json").read_text())
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists() or _is_dead(pid), f"agent {pid} of node {node} ends")


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_lost_node_is_replaced_by_a_spare_that_gets_its_image_from_parity(
    tmp_path: Path, folder: str, eventually: Eventually
) -> None:
    arguments = (jobs.fsdp, str(tmp_path), folder, "2+1")
    run(parity.train_and_die, 3, *arguments, nodes=("a", "b", "c"))
    lose(folder, "c", eventually)
    levels = run(parity.come_back, 3, *arguments, nodes=("a", "b", "d"))
    assert levels == [["memory", "memory", "parity"]] * 3


def test_two_of_four_nodes_may_be_lost_at_once(tmp_path: Path, folder: str, eventually: Eventually) -> None:
    arguments = (jobs.own_four, str(tmp_path), folder, "2+2")
    run(parity.train_and_die, 4, *arguments, nodes=("a", "b", "c", "d"))
    lose(folder, "a", eventually)
    lose(folder, "c", eventually)
    levels = run(parity.come_back, 4, *arguments, nodes=("a", "b", "e", "d"))
    assert levels == [["parity", "memory", "parity", "memory"]] * 4


def test_ranks_that_come_back_on_other_nodes_get_their_images_from_there(tmp_path: Path, folder: str) -> None:
    arguments = (jobs.own, str(tmp_path), folder, "1+1")
    run(parity.train_and_die, 2, *arguments, nodes=("a", "b"))
    assert run(parity.come_back, 2, *arguments, nodes=("b", "a")) == [["parity", "parity"]] * 2


def test_a_lost_node_is_not_replaced_and_the_others_take_its_ranks(
    tmp_path: Path, folder: str, eventually: Eventually
) -> None:
    arguments = (jobs.own_four, str(tmp_path), folder, "2+1")
    run(parity.train_and_die, 4, *arguments, nodes=("a", "b", "c", "c"))
    lose(folder, "a", eventually)
    levels = run(parity.come_back, 4, *arguments[:3], "1+1", nodes=("b", "b", "c", "c"))
    assert levels == [["parity", "memory", "memory", "memory"]] * 4


def test_when_more_nodes_are_lost_than_parity_bears_nothing_is_made_up(
    tmp_path: Path, folder: str, eventually: Eventually
) -> None:
    arguments = (jobs.own, str(tmp_path), folder, "1+1")
    run(parity.train_and_die, 2, *arguments, nodes=("a", "b"))
    for node in ("a", "b"):
        lose(folder, node, eventually)
    assert run(parity.start_anew, 2, jobs.own, str(tmp_path), "1+1", nodes=("a", "b")) == [None, None]


@pytest.mark.parametrize("in_mid_save", [False, True])
def test_when_an_agent_is_lost_the_snapshots_after_it_are_protected_again(tmp_path: Path, in_mid_save: bool) -> None:
    arguments = (jobs.fsdp, str(tmp_path), in_mid_save)
    outcomes = run(parity.lose_an_agent_and_go_on, 3, *arguments, nodes=("a", "b", "c"))
    assert all(one[0] == "safe" for one in outcomes), outcomes
    assert all(one[-2:] == ["safe", "safe"] for one in outcomes), outcomes


def test_a_byte_that_changed_in_memory_is_found_put_right_and_reported(tmp_path: Path) -> None:
    assert run(parity.damage_is_mended, 3, jobs.fsdp, str(tmp_path), nodes=("a", "b", "c")) == [True] * 3


def test_a_rank_that_cannot_join_the_others_keeps_nobody_waiting(tmp_path: Path) -> None:
    messages = run(parity.join_without_an_address, 2, jobs.own, str(tmp_path), nodes=("a", "b"), deadline_s=30)
    assert all("set peer_address" in message for message in messages), messages
    assert messages[0].startswith("rank 1: ")


def test_images_and_parity_keep_to_the_least_budget_that_is_accepted(tmp_path: Path) -> None:
    """Three nodes where the policy is for five: k is 2, so parity takes a third of the budget and not a fifth."""
    found = run(parity.save_within, 3, jobs.fsdp, str(tmp_path), "4+1", 4, nodes=("a", "b", "c"))
    for least, outcomes in found:
        assert outcomes == ["safe"] * 4
        assert least % 3 == 0
