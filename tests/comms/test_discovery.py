"""What hosts' probes say of a network together: pure, from surveys that are written here."""

import ipaddress

import pytest

from resilient.comms.discovery import Survey, Way, as_data, from_data, merge
from resilient.comms.topology import Topology


def survey(host: int, hosts: int, leaves: int, spines: int, cable: int = 4) -> Survey:
    """Of a leaf-spine network of routers, hosts dealt out to the leaves in turn; cables have subnets of `cable`."""

    def end(leaf: int, spine: int, upper: bool) -> str:
        base = int(ipaddress.IPv4Address("10.9.0.0")) + cable * (leaf * spines + spine)
        return str(ipaddress.IPv4Address(base + (cable == 4) + upper))

    ways = []
    for other in range(hosts):
        one, far = host % leaves, other % leaves
        if other == host:
            continue
        if one == far:
            ways.append(Way(target=f"h{other}", routers=1, middle={f"10.1.{host}.1": ""}))
            continue
        middle = {end(one, spine, True): end(far, spine, False) for spine in range(spines)}
        ways.append(Way(target=f"h{other}", routers=3, middle=middle))
    return Survey(host=f"h{host}", address=f"10.1.{host}.2", ways=tuple(ways))


def network(hosts: int, leaves: int, spines: int, cable: int = 4) -> Topology:
    return merge([survey(host, hosts, leaves, spines, cable) for host in range(hosts)])


@pytest.mark.parametrize("cable", [2, 4])
@pytest.mark.parametrize(("hosts", "leaves", "spines"), [(2, 2, 2), (4, 2, 4), (6, 3, 5), (8, 4, 16)])
def test_spines_and_leaves_are_found_by_subnets_of_two_and_of_four_addresses(
    hosts: int, leaves: int, spines: int, cable: int
) -> None:
    topology = network(hosts, leaves, spines, cable)
    assert topology.known == "flow"
    assert len(topology.paths) == spines
    first = int(ipaddress.IPv4Address("10.9.0.0")) + (cable == 4) + 1
    for spine, path in enumerate(topology.paths):
        wanted = {str(ipaddress.IPv4Address(first + cable * (leaf * spines + spine))) for leaf in range(leaves)}
        assert set(path.hops) == wanted
    assert topology.fabric([f"h{host}" for host in range(hosts)]).leaf_of == tuple(
        host % leaves for host in range(hosts)
    )


def test_one_host_alone_sees_who_is_together_and_the_paths_from_itself() -> None:
    topology = merge([survey(0, 6, 3, 4)])
    assert topology.known == "flow"
    assert [len(path.hops) for path in topology.paths] == [1] * 4
    assert len(set(topology.leaves.values())) == 3
    assert topology.leaves["h1"] == topology.leaves["h4"] != topology.leaves["h2"]


def test_surveys_survive_the_store() -> None:
    one = survey(1, 4, 2, 3)
    assert from_data(as_data(one)) == one


def test_routers_that_answer_everybody_from_one_address_are_one_path() -> None:
    rows = [
        Survey(
            host=host,
            address=f"10.1.0.{number}",
            ways=(Way(target=other, routers=3, middle={"10.0.0.1": "10.2.0.1", "10.0.0.2": "10.2.0.1"}),),
        )
        for number, (host, other) in enumerate((("a", "b"), ("b", "a")))
    ]
    topology = merge(rows)
    assert (topology.known, [path.hops for path in topology.paths]) == ("flow", [("10.0.0.1",), ("10.0.0.2",)])


def test_answers_that_cannot_be_told_to_be_of_one_router_are_not_claimed_to_be() -> None:
    rows = [
        Survey(
            host=host,
            address=f"10.1.0.{number}",
            ways=(Way(target=other, routers=3, middle={f"10.{number}.0.1": "", f"10.{number}.7.1": ""}),),
        )
        for number, (host, other) in enumerate((("a", "b"), ("b", "a")))
    ]
    topology = merge(rows)
    assert topology.known == "hash"
    assert len(topology.paths) == 2
    assert "describe the network in a file" in topology.reason


def test_a_path_that_one_leaf_has_not_seen_is_not_claimed() -> None:
    rows = [survey(host, 2, 2, 3) for host in range(2)]
    (way,) = rows[1].ways
    short = dict(list(way.middle.items())[:2])
    rows[1] = Survey(host="h1", address="10.1.1.2", ways=(Way(target="h0", routers=3, middle=short),))
    assert merge(rows).known == "hash"


def test_silence_and_hosts_that_were_not_reached_are_said() -> None:
    def silent(routers: int | None) -> Topology:
        pairs = (("a", "b"), ("b", "a"))
        return merge(
            [
                Survey(host=one, address="10.1.0.1", ways=(Way(target=other, routers=routers, middle={}),))
                for one, other in pairs
            ]
        )

    assert "do not answer probes" in silent(3).reason
    assert "from a have not arrived at b" in silent(None).reason
    assert {silent(3).known, silent(None).known} == {"hash"}
    assert len(silent(3).paths) == 1


def test_hosts_with_one_way_between_them_share_a_leaf_whether_it_is_a_router_or_not() -> None:
    for routers, middle in ((0, {}), (1, {"10.0.0.1": ""})):
        rows = [
            Survey(host=one, address="10.1.0.1", ways=(Way(target=other, routers=routers, middle=middle),))
            for one, other in (("a", "b"), ("b", "a"))
        ]
        topology = merge(rows)
        assert len(set(topology.leaves.values())) == 1
        assert topology.reason == "all hosts share a leaf"


def test_leaves_that_are_no_routers_are_seen_by_several_ways_over_one() -> None:
    rows = [
        Survey(
            host=one, address="10.1.0.1", ways=(Way(target=other, routers=1, middle={"10.0.0.1": "", "10.0.0.2": ""}),)
        )
        for one, other in (("a", "b"), ("b", "a"))
    ]
    topology = merge(rows)
    assert (topology.known, topology.ttl, len(topology.paths)) == ("flow", 1, 2)
    assert topology.leaves["a"] != topology.leaves["b"]
