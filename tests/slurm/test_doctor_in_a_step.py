"""`srun resilient doctor`: the nodes of a step find one another by what SLURM says of them."""

import json

from tests.slurm.cluster import Cluster


def test_srun_examines_all_nodes_of_the_step_and_one_of_them_tells(cluster: Cluster) -> None:
    """The nodes' names are none of this host, so the address of the first is told."""
    said = cluster.run("srun", "-N", "2", "resilient", "doctor", "--json", environment={"MASTER_ADDR": "127.0.0.1"})
    nodes = json.loads(said)["nodes"]
    assert len(nodes.keys() & set(cluster.nodes)) == 2
    for findings in nodes.values():
        found = {finding["name"]: finding for finding in findings}
        assert found["nodes"]["verdict"] == "ok"
        assert "proctrack/linuxproc" in found["agent's life"]["what"]
