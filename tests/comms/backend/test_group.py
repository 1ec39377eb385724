"""The backend "resilient" in processes of its own, on loopback addresses that stand for hosts with two planes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.comms.backend import jobs
from tests.multiprocess import ranks

Topology = Callable[..., list[str]]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Topology:
    """`hosts(4)`: a topology of so many hosts with two planes, for this test; their names."""

    def made(count: int, planes: int = 2, **more: str) -> list[str]:
        addresses = [json.dumps([f"127.2.{host}.{plane + 1}" for plane in range(planes)]) for host in range(count)]
        lines = ["[addresses]", *(f"host{host} = {said}" for host, said in enumerate(addresses))]
        for plane in range(planes):
            lines += ["[[paths]]", f'name = "plane{plane}"', f'interface = "eth{plane}"', 'rate = "1gbit"']
        path = tmp_path / "topology.toml"
        path.write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("RESILIENT_TOPOLOGY", str(path))
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        return [f"host{host}" for host in range(count)]

    return made


def run(body: Callable[[], Any], size: int, nodes: list[str]) -> list[Any]:
    return ranks.run(body, size, nodes=nodes)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_equal_gloos(size: int, hosts: Topology) -> None:
    run(jobs.all_as_gloo, size, hosts(size))


def test_several_ranks_may_be_on_a_host(hosts: Topology) -> None:
    run(jobs.all_as_gloo, 4, [name for name in hosts(2) for _ in range(2)])


def test_collectives_work_in_every_manner_that_torch_has(hosts: Topology) -> None:
    run(jobs.in_every_manner, 3, hosts(3))


def test_functional_collectives_compile(hosts: Topology) -> None:
    run(jobs.compiled, 2, hosts(2))


def test_ddp_trains_to_the_same_losses(hosts: Topology) -> None:
    run(jobs.trains_with_ddp, 2, hosts(2))


def test_fsdp2_trains_to_the_same_losses(hosts: Topology) -> None:
    run(jobs.trains_with_fsdp2, 2, hosts(2))


def test_wrong_calls_are_the_same_clear_error_on_all_ranks_and_harm_nothing(hosts: Topology) -> None:
    texts = run(jobs.wrong_calls, 2, hosts(2))
    assert texts[0] == texts[1]
    causes = ["torch.int16", "BAND", "2 times", "ranks 0 to 1", "splits", "float64"]
    assert [cause for cause, text in zip(causes, texts[0], strict=True) if cause not in text] == []


def test_ranks_that_call_different_collectives_all_learn_which(hosts: Topology) -> None:
    texts = run(jobs.disagreement, 3, hosts(3))
    assert len(set(texts)) == 1
    assert "all_reduce" in texts[0]
    assert "rank 1 called broadcast" in texts[0]


def test_a_group_that_was_aborted_can_be_made_again(hosts: Topology) -> None:
    texts = run(jobs.abort_and_again, 3, hosts(3))
    assert len(set(texts)) == 1
    assert "rank 1 (host1) has aborted" in texts[0]


def test_lists_go_the_same_way_on_all_ranks_whatever_their_sizes(hosts: Topology) -> None:
    run(jobs.lists_of_other_sizes, 3, hosts(3))


def test_any_ranks_can_be_striped_whatever_others_have_done_before(hosts: Topology) -> None:
    run(jobs.stripes_of_subgroups, 3, hosts(3))


def test_it_can_be_the_default_group_and_be_made_again(hosts: Topology) -> None:
    run(jobs.as_the_default_group, 2, hosts(2))


# -- where lanes do not pay --------------------------------------------------------------


def test_without_a_topology_or_a_second_path_or_host_the_group_is_gloos_own(
    hosts: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = hosts(2, planes=1)
    assert {row[0] for row in run(jobs.which_group_it_is, 2, names)} == {"ProcessGroup"}
    names = hosts(2)
    assert {row[0] for row in run(jobs.which_group_it_is, 2, names)} == {"ResilientProcessGroup"}
    assert {row[0] for row in run(jobs.which_group_it_is, 2, ["host0", "host0"])} == {"ProcessGroup"}
    monkeypatch.setenv("RESILIENT_TOPOLOGY", "")
    assert {row[0] for row in run(jobs.which_group_it_is, 2, names)} == {"ProcessGroup"}
    assert "set RESILIENT_TOPOLOGY" in run(jobs.no_lanes, 2, names)[0]


def test_a_topology_that_one_rank_cannot_use_is_an_error_on_all(hosts: Topology) -> None:
    names = hosts(2)
    texts = run(jobs.refused, 2, [names[0], "elsewhere"])
    assert texts[0] == texts[1]
    assert "rank 1 (elsewhere)" in texts[0]
    assert "eth0" in texts[0] or "elsewhere" in texts[0]
