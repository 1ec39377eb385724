"""What NCCL is told about several paths."""

import pytest

from resilient.comms.nccl import as_environment, settings
from resilient.comms.topology import PathInfo, Topology


def spines(count: int) -> Topology:
    paths = tuple(PathInfo(name=f"spine{number}") for number in range(count))
    return Topology(paths=paths, known="hash", source="test")


@pytest.mark.parametrize(
    ("flows", "paths", "pairs"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (3, 4, 4), (8, 4, 1), (1, 64, 16)]
)
def test_queue_pairs_are_the_fewest_pieces_that_spread_evenly(flows: int, paths: int, pairs: int) -> None:
    told = as_environment(settings(spines(paths), flows=flows))
    assert told["NCCL_IB_QPS_PER_CONNECTION"] == str(pairs)
    assert told["NCCL_IB_SPLIT_DATA_ON_QPS"] == "1"


@pytest.mark.parametrize("paths", [1, 3, 8, 200])
def test_over_tcp_there_is_a_socket_for_each_piece_within_nccls_limit(paths: int) -> None:
    told = as_environment(settings(spines(paths), sockets=True))
    count = int(told["NCCL_SOCKET_NTHREADS"]) * int(told["NCCL_NSOCKS_PERTHREAD"])
    assert min(paths, 64) <= count <= 64 + 3


def test_planes_are_named_and_kept_apart() -> None:
    paths = tuple(PathInfo(name=f"plane{number}", interface=f"eth{number}") for number in range(2))
    topology = Topology(paths=paths, known="interface", source="test")
    told = as_environment(settings(topology, sockets=True))
    assert told == {"NCCL_SOCKET_IFNAME": "=eth0,eth1", "NCCL_CROSS_NIC": "0"}
    assert "NCCL_IB_HCA" in as_environment(settings(topology))
