"""Who is where under MPI, decided from what all ranks report."""

import pytest

from resilient.errors import UsageError
from resilient.launch.mpi import Report, check_size, decide_places, shared_variables


def reports(*words: str) -> list[Report]:
    """`"a0"`: on node a, sharing memory with rank 0."""
    return [Report(node=word[0], group=int(word[1:]), host=f"host{word[1:]}") for word in words]


def test_local_ranks_count_within_a_node_however_ranks_are_dealt_out() -> None:
    places = decide_places(reports("a0", "b1", "a0", "b1", "b1"))
    assert [place.local_rank for place in places] == [0, 0, 1, 1, 2]
    assert [place.local_world_size for place in places] == [2, 3, 2, 3, 3]
    assert [place.node_rank for place in places] == [0, 1, 0, 1, 1]
    assert [place.node for place in places] == list("ababb")
    assert places[4].variables()["RANK"] == "4"
    assert places[4].variables()["GROUP_WORLD_SIZE"] == "2"


def test_nodes_of_one_machine_may_have_names_of_their_own() -> None:
    places = decide_places(reports("a0", "a0", "b0", "b0"))
    assert [(place.node_rank, place.local_rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_one_name_for_two_machines_is_refused() -> None:
    with pytest.raises(UsageError, match="ranks 0 and 1 are both on 'a'"):
        decide_places(reports("a0", "a1", "a0"))


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_of_more_ranks_than_mpi_knows_is_another_one(variable: str) -> None:
    with pytest.raises(UsageError, match=f"{variable} is 4"):
        check_size(1, {variable: "4"})
    check_size(4, {variable: "4"})
    check_size(1, {variable: "1"})
    check_size(1, {})


def test_an_mpirun_of_one_rank_within_a_larger_step_is_no_mistake() -> None:
    check_size(1, {"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"})


def test_only_variables_of_ours_that_hold_for_the_job_are_told() -> None:
    told = shared_variables({"RESILIENT_PARITY": "2+1", "RESILIENT_NODE": "n1", "PATH": "/bin", "RESILIENT_TOKEN": "t"})
    assert told == {"RESILIENT_PARITY": "2+1", "RESILIENT_TOKEN": "t"}
