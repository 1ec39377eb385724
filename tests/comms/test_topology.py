"""Descriptions of networks: what is read from them, what they must not say, and what is told of that."""

from pathlib import Path

import pytest

from examples.fabric import LeafSpine, MultiPlane
from resilient.comms.lanes.wiring import Planes, Spines
from resilient.comms.probe import OrChance, any_port
from resilient.comms.topology import PathInfo, Topology, as_toml, from_file, load, rate
from resilient.errors import UsageError

SPINES = """
nic = "400gbit"
[leaves]
leaf0 = ["a", "c"]
leaf1 = ["b"]
[addresses]
a = ["127.0.0.1"]
[[paths]]
name = "spine0"
rate = "100gbit"
hops = ["10.255.0.2", "10.255.1.2"]
[[paths]]
name = "spine1"
rate = "50gbit"
hops = ["10.255.0.6", "10.255.1.6"]
"""


def read(folder: Path, text: str) -> Topology:
    path = folder / "network.toml"
    path.write_text(text)
    return from_file(path)


def test_a_file_says_who_is_on_which_leaf_and_how_quick_each_path_is(tmp_path: Path) -> None:
    topology = read(tmp_path, SPINES)
    fabric = topology.fabric(["a", "b", "c", "b"])
    assert fabric.leaf_of == (0, 1, 0, 1)
    assert fabric.up == fabric.down == ((12.5e9, 6.25e9), (12.5e9, 6.25e9))
    assert fabric.nic == 50e9


def test_what_is_known_of_the_paths_decides_how_they_are_reached(tmp_path: Path) -> None:
    flow = read(tmp_path, SPINES)
    assert flow.known == "flow"
    wiring = flow.wiring("a")
    assert isinstance(wiring, Spines)
    assert isinstance(wiring.find, OrChance)
    chance = read(tmp_path, SPINES.replace('hops = ["10.255.1.6", ', "").replace("hops", "# hops"))
    assert chance.known == "hash"
    blind = chance.wiring("a")
    assert isinstance(blind, Spines)
    assert blind.find is any_port
    planes = read(tmp_path, MultiPlane(hosts=2, rates=["1gbit", "2gbit"]).topology())
    assert planes.known == "interface"
    assert planes.wiring("host1") == Planes(("10.1.1.2", "10.2.1.2"))
    assert planes.fabric(["host1", "host0"]).up == ((1.25e8, 2.5e8), (1.25e8, 2.5e8))


def test_a_host_whose_address_is_not_given_takes_its_interfaces(tmp_path: Path) -> None:
    topology = read(tmp_path, 'interface = "lo"\n' + SPINES.replace("127.0.0.1", "127.0.0.9"))
    assert [topology.wiring(host).addresses for host in ("a", "b")] == [("127.0.0.9",), ("127.0.0.1",)]


def test_paths_of_addresses_that_probes_do_not_know_are_not_claimed_to_be_known(tmp_path: Path) -> None:
    topology = read(tmp_path, SPINES.replace("127.0.0.1", "fd00::1"))
    assert (topology.known, topology.reason) == ("hash", "probes know IPv4 only")


def test_hops_of_some_paths_only_are_no_knowledge(tmp_path: Path) -> None:
    assert read(tmp_path, SPINES.replace('hops = ["10.255.0.6", "10.255.1.6"]', "")).known == "hash"


def test_interfaces_are_paths_and_their_addresses_are_this_hosts() -> None:
    topology = load("interfaces: lo")
    assert topology.known == "interface"
    assert topology.wiring("wherever") == Planes(("127.0.0.1",))
    assert topology.fabric(["x", "y", "x"]).leaf_of == (0, 1, 0)


def test_a_topology_that_is_written_down_is_read_back_the_same(tmp_path: Path) -> None:
    for text in (SPINES, 'ttl = 3\ninterface = "lo"\n' + SPINES, LeafSpine().topology(), MultiPlane().topology()):
        topology = read(tmp_path, text)
        assert read(tmp_path, as_toml(topology)) == topology


def test_names_that_need_quotes_survive(tmp_path: Path) -> None:
    odd = 'a "leaf" \\ of.host'
    topology = Topology(paths=(PathInfo(name=odd),), known="hash", leaves={"h.1": odd}, addresses={"h.1": ("1.2.3.4",)})
    back = read(tmp_path, as_toml(topology))
    assert (back.paths[0].name, back.leaves, back.addresses) == (odd, {"h.1": odd}, {"h.1": ("1.2.3.4",)})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[[paths]]", "[paths]", "TOML"),
        ('name = "spine1"', 'name = "spine0"', "two paths have one name"),
        ('name = "spine1"', "", "path 1 has no name"),
        ('rate = "50gbit"', "rate = 50", "50 is no rate"),
        ('rate = "50gbit"', 'rate = "1.2.3gbit"', "no rate"),
        ('rate = "50gbit"', 'rate = "0gbit"', "no rate"),
        ('rate = "50gbit"', 'speed = "50gbit"', "'speed' is no key"),
        ('rate = "50gbit"', 'interface = "eth1"', "either all paths have an interface, or none"),
        ('rate = "50gbit"', "interface = 1", "interface is 1"),
        ('leaf1 = ["b"]', 'leaf1 = ["b", "a"]', "host 'a' is on two leaves, 'leaf0' and 'leaf1'"),
        ('leaf1 = ["b"]', 'leaf1 = "b"', "leaf leaf1: 'b' is no list"),
        ('nic = "400gbit"', "ttl = 0", "ttl is 0"),
        ('nic = "400gbit"', "ttl = true", "ttl is True"),
        ('nic = "400gbit"', "interface = 3", "interface is 3"),
        ('nic = "400gbit"', "leafs = 1", "'leafs' is no key"),
        ('nic = "400gbit"', 'nic = "many"', "nic: 'many' is no rate"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SPINES
    with pytest.raises(UsageError, match=r"network\.toml") as told:
        read(tmp_path, SPINES.replace(old, new))
    assert said in str(told.value)


def test_a_file_without_paths_or_without_itself_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a topology needs a"):
        read(tmp_path, "[leaves]\nleaf0 = ['a']\n")
    with pytest.raises(UsageError, match=r"cannot read the topology .*absent: No such file"):
        from_file(tmp_path / "absent")


def test_a_host_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    topology = read(tmp_path, SPINES)
    with pytest.raises(UsageError, match=r"says nothing of host 'd'.*RESILIENT_NODE.*a, b, c"):
        topology.fabric(["a", "d"])
    with pytest.raises(UsageError, match=r"has no address of host 'b'"):
        topology.wiring("b")


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("interfaces:", "names no interface"),
        ("interfaces:lo,lo", "two paths have one name"),
        ("slurm:topology.conf", "resilient net write --slurm topology.conf"),
        ("discover", "needs the ranks of a job"),
    ],
)
def test_descriptions_that_lead_nowhere_say_what_does(description: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(description)


def test_an_interface_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"'nothing7': No such device; there are .*lo"):
        load("interfaces:nothing7").wiring("x")


def test_rates_are_bits_a_second() -> None:
    assert [rate(text, "") for text in ("8bit", "8kbit", "100mbit", "1.5 Gbit", "1tbit")] == [
        1,
        1e3,
        12.5e6,
        187.5e6,
        125e9,
    ]
