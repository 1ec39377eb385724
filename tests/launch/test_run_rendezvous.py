"""What launchers agree on where they meet: threads for nodes, a store of torch's for the rendezvous."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, Store
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.launcher.api import LaunchConfig

from resilient.errors import LevelFailed, UsageError
from resilient.launch.run.rendezvous import (
    LOCAL,
    Agreed,
    Told,
    agree,
    announce_failure,
    announced_failure,
    open_rendezvous,
)


def agreed_by(*nodes: Told, store: Store | None = None) -> list[Agreed]:
    shared = store or HashStore()
    shared.set_timeout(timedelta(seconds=20))
    with ThreadPoolExecutor(len(nodes)) as threads:
        return list(threads.map(lambda rank: agree(shared, rank, len(nodes), nodes[rank]), range(len(nodes))))


def test_a_fresh_job_agrees_on_its_first_life_and_a_new_token() -> None:
    first, second = agreed_by(Told(node="n1"), Told(node="n2"))
    assert first == second
    assert (first.life, first.nodes, first.lost, first.new) == (0, ("n1", "n2"), (), ())
    assert len(first.token) == 64
    another = agreed_by(Told(node="n1"))[0]
    assert another.token != first.token
    assert another.launch != first.launch


def test_a_token_that_was_given_to_one_node_is_known_to_all() -> None:
    assert agreed_by(Told(node="n1"), Told(node="n2", token="given"))[0].token == "given"


def test_the_node_that_has_seen_the_newest_life_knows_the_number_the_token_and_who_is_missing() -> None:
    spare = Told(node="n4", token="older")
    survivors = [
        Told(node=node, life=4, token="kept", launch="ours", nodes=("n1", "n2", "n3")) for node in ("n1", "n3")
    ]
    for agreed in agreed_by(spare, *survivors):
        assert agreed.launch == "ours"
        assert (agreed.life, agreed.token, agreed.nodes) == (5, "kept", ("n4", "n1", "n3"))
        assert (agreed.lost, agreed.new) == (("n2",), ("n4",))


def test_two_commands_are_refused_on_every_node() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    nodes = [Told(node="n1", command="a"), Told(node="n2", command="b")]
    with ThreadPoolExecutor(2) as threads:
        tries = [threads.submit(agree, store, rank, 2, nodes[rank]) for rank in range(2)]
    for tried in tries:
        assert isinstance(tried.exception(), UsageError)
        assert "two different commands" in str(tried.exception())


def test_a_node_that_never_tells_anything_fails_the_meeting_in_time() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError):
        agree(store, 0, 2, Told(node="n1"))


def test_the_failure_that_was_told_first_is_everybodys() -> None:
    store = HashStore()
    assert announced_failure(store) is None
    assert announce_failure(store, {"rank": 3}) == {"rank": 3}
    assert announce_failure(store, {"rank": 0}) == {"rank": 3}
    assert announced_failure(store) == {"rank": 3}


def a_config(endpoint: str, nodes: int = 1) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=1,
        run_id="run",
        rdzv_endpoint=endpoint,
        rdzv_backend="c10d",
        rdzv_configs={"read_timeout": 2},
        local_addr="127.0.0.1",
    )


def listening() -> set[str]:
    """Addresses of listening TCP sockets of IPv4 and IPv6, as the kernel writes them."""
    lines = [line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()]
    return {line[1] for line in lines if line[3] == "0A"}


def test_a_job_on_one_node_meets_itself_in_a_private_file(tmp_path: Path) -> None:
    handler, _ = open_rendezvous(a_config(LOCAL), tmp_path)
    found: RendezvousInfo = handler.next_rendezvous()
    assert (found.rank, found.world_size) == (0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rendezvous"]
    assert handler.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_the_store_listens_at_the_one_address_that_is_named_and_others_of_the_machine_join_it(tmp_path: Path) -> None:
    port = free_port()
    opened = [open_rendezvous(a_config(f"127.0.0.1:{port}", nodes=2), tmp_path) for _ in range(2)]
    handlers = [handler for handler, _ in opened]
    assert [serves for _, serves in opened] == [True, False]
    assert [address for address in listening() if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda handler: handler.next_rendezvous(), handlers))
    assert {info.rank for info in found} == {0, 1}
    stores = [info.bootstrap_store_info for info in found]
    assert stores[0] == stores[1]
    for handler in handlers:
        handler.shutdown()


def test_a_rendezvous_that_is_not_there_is_said_in_time(tmp_path: Path) -> None:
    config = a_config(f"127.0.0.1:{free_port()}", nodes=2)
    config.rdzv_configs["is_host"] = "0"
    with pytest.raises(LevelFailed, match="cannot be reached .* is the node up"):
        open_rendezvous(config, tmp_path)
