"""Failure domains: each source by itself, which of them is taken, and what is said when a line cannot be understood."""

import pytest

from resilient.ec.domains import Document, Domains, Host, decide_domains, host_of, parse_file, parse_topology
from resilient.ec.groups import decide_groups
from resilient.errors import UsageError

FILE = """
# what shares a power supply
[nodes]
n1 = ["row 1", "switch 1"]
"n[2-3]" = ["row 1", "switch 2"]
'gpu.n4' = ["row 2", "switch 3"]
"""
TREE = """
# three levels; the last line goes on
SwitchName=leaf1 Nodes=n[1-2] LinkSpeed=400
switchname=leaf2 nodes=n[3,4]  # a comment
SwitchName=leaf3 Nodes=n5

SwitchName=spine1 Switches=leaf[1-2]
SwitchName=spine2 Switches=leaf3
SwitchName=top \\
    Switches=spine[1-2]
"""
PRINTED = """SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[1-2]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[3-4] Switches=(null)
SwitchName=empty Level=0 LinkSpeed=1 Nodes=(null)
SwitchName=top Level=1 LinkSpeed=1 Nodes=n[1-4] Switches=leaf[1-2]
"""


def hosts(*names: str) -> list[Host]:
    return [Host(name=name) for name in names]


def domains(found: Domains) -> dict[str, tuple[str, ...]]:
    return {node.name: node.domains for node in found.nodes}


def test_a_file_names_the_domains_of_one_or_many_nodes() -> None:
    assert parse_file(Document("nodes.toml", FILE)) == {
        "n1": ("row 1", "switch 1"),
        "n2": ("row 1", "switch 2"),
        "n3": ("row 1", "switch 2"),
        "gpu.n4": ("row 2", "switch 3"),
    }


def test_a_file_comes_before_all_else_and_the_reason_names_it_and_whom_it_does_not_know() -> None:
    told = [Host(name=name, address=f"s.{name}", pattern="switch.node") for name in ("n1", "n2.cluster", "n9")]
    found = decide_domains(told, file=Document("nodes.toml", FILE), topology=Document("topology.conf", TREE))
    assert domains(found) == {"n1": ("row 1", "switch 1"), "n2.cluster": ("row 1", "switch 2"), "n9": ()}
    assert found.reason == "domains from nodes.toml, which does not name n9"
    many = decide_domains(hosts("n1", *"abcde"), file=Document("nodes.toml", FILE))
    assert many.reason.endswith("which does not name a, b, c and 2 more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[nodes]\nn1 = \n", r"nodes.toml: .*line 2"),
        ('n1 = ["a"]', r"nodes.toml: there is no table \[nodes\]"),
        ('[nodes]\nn1 = ["a"]\nn2 = "b"', r"line 3: 'n2' needs a list"),
        ('[nodes]\nn1 = ["a", ""]', r"line 2: 'n1' needs a list"),
        ("[nodes]\nn1 = [7]", r"line 2: 'n1' needs a list"),
        ('[nodes]\nn1 = ["a"]\n\nn2 = ["a", "b"]', r"line 4: 'n2' has 2 domains and 'n1' has 1"),
        ('[nodes]\nn2 = ["a"]\n"n[1-3]" = ["b"]', r"line 3: node 'n2' is named for the second time"),
        ('[nodes]\n"n[1-" = ["a"]', r"line 2: 'n\[1-': a bracket that is not closed"),
        ('[nodes]\nother = ["a"]', r"nodes.toml names none of the nodes, such as 'n1'"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decide_domains(hosts("n1"), file=Document("nodes.toml", text))


def test_inside_a_job_slurm_tells_each_node_its_switches() -> None:
    def told(name: str, address: str) -> Host:
        return host_of(
            name, {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node", "PATH": "/bin"}
        )

    found = decide_domains([told("n1", "top.leaf[1-2].n1"), told("n2.a.b", "top.leaf3.n2.a.b")])
    assert domains(found) == {"n1": ("top", "leaf[1-2]"), "n2.a.b": ("top", "leaf3")}
    assert found.reason == "domains from SLURM_TOPOLOGY_ADDR"


@pytest.mark.parametrize(
    ("address", "pattern", "reason"),
    [
        ("", "", "n2 has no SLURM_TOPOLOGY_ADDR"),
        ("n2", "switch.node", "SLURM_TOPOLOGY_ADDR 'n2' of n2 does not fit 'switch.node'"),
        ("s1.n2", "", "does not fit ''"),
        ("n2", "node", "SLURM_TOPOLOGY_ADDR names no switches"),
    ],
)
def test_where_slurm_does_not_tell_all_nodes_the_next_source_is_asked(address: str, pattern: str, reason: str) -> None:
    first = Host(name="n1", address="n1", pattern="node")
    second = Host(name="n2", address=address, pattern=pattern)
    found = decide_domains([first, second])
    assert domains(found) == {"n1": (), "n2": ()}
    assert reason in found.reason
    found = decide_domains([first, second], topology=Document("topology.conf", TREE))
    assert domains(found) == {"n1": ("top", "spine1", "leaf1"), "n2": ("top", "spine1", "leaf1")}
    assert found.reason == "domains from topology.conf"


def test_a_tree_of_switches_is_read_as_the_file_has_it_and_as_scontrol_prints_it() -> None:
    known = parse_topology(Document("topology.conf", TREE))
    assert known["n4"] == ("top", "spine1", "leaf2")
    assert known["n5"] == ("top", "spine2", "leaf3")
    assert parse_topology(Document("scontrol show topology", PRINTED)) == {
        "n1": ("top", "leaf1"),
        "n2": ("top", "leaf1"),
        "n3": ("top", "leaf2"),
        "n4": ("top", "leaf2"),
    }


def test_blocks_are_read_too_and_trees_need_not_be_even() -> None:
    blocks = "BlockName=b1 Nodes=n[1-18]\nBlockName=b2 Nodes=n[19-36]\nBlockSizes=18,36\n"
    assert parse_topology(Document("topology.conf", blocks))["n19"] == ("b2",)
    uneven = "SwitchName=a Nodes=n1\nSwitchName=b Nodes=n2\nSwitchName=top Switches=a\n"
    assert parse_topology(Document("t", uneven)) == {"n1": ("top", "a"), "n2": ("b",)}


def test_a_node_on_two_switches_has_both_as_its_domain() -> None:
    text = "SwitchName=a Nodes=n[1-2]\nSwitchName=b Nodes=n1\nSwitchName=x Switches=a,b\nSwitchName=y Switches=[a,b]\n"
    with pytest.raises(UsageError, match="t, line 4: .*'a' is neither a number nor a range"):
        parse_topology(Document("t", text))
    assert parse_topology(Document("t", text.replace("[a,b]", "b"))) == {"n1": ("x,y", "a,b"), "n2": ("x", "a")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SwitchName=a Nodes=n1\nSwitchName b", "t, line 2: 'SwitchName' is not of the form key=value"),
        ("\nNodeName=n1 CPUs=4", "t, line 2: neither SwitchName= nor BlockName="),
        ("SwitchName=a Nodes=n1\n# x\nSwitchName=b \\\n Switches=a[1-", r"t, line 3: 'a\[1-': a bracket"),
        ("SwitchName=a Nodes=n1\nSwitchName=b Switches=a\nSwitchName=a Switches=b", "t: switch 'b' is below itself"),
    ],
)
def test_what_is_wrong_in_a_topology_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_topology(Document("t", text))


def test_numbers_in_host_names_tell_racks_and_chassis_if_they_divide_the_nodes() -> None:
    names = [f"dc1-rack{rack}c{chassis}n{node}.example" for rack in (3, 4) for chassis in (1, 2) for node in (1, 2)]
    found = decide_domains(hosts(*names), topology=Document("topology.conf", TREE))
    assert domains(found)["dc1-rack4c1n2.example"] == ("dc1-rack4", "dc1-rack4c1")
    assert found.reason == (
        "domains from the numbers in host names, such as 'dc1-rack3c1' "
        "(dc1-rack3c1n1.example has no SLURM_TOPOLOGY_ADDR; topology.conf names none of the nodes)"
    )
    assert "also a whole domain such as 'dc1-rack3c1'" in decide_groups(found.nodes, 3, 1).reason


@pytest.mark.parametrize(
    "names",
    [
        ["node1", "node2", "node3"],
        ["r1n1", "login1", "r2n2"],
        ["job7-worker-0", "job7-worker-1"],
        ["a1-0", "a2-0", "a3-0"],
        ["ip-10-0-3-17", "ip-10-0-4-18", "ip-10-0-4-19"],
        ["alpha", "beta"],
        ["n1"],
    ],
)
def test_names_that_tell_nothing_give_no_domains(names: list[str]) -> None:
    found = decide_domains(hosts(*names))
    assert all(node.domains == () for node in found.nodes)
    assert found.reason == f"no domains: {names[0]} has no SLURM_TOPOLOGY_ADDR; host names do not tell any"


def test_no_nodes_are_no_error() -> None:
    assert decide_domains([]).nodes == ()
