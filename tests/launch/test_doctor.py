"""What the doctor concludes from facts, without a machine."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilient.launch.doctor import levels, limits, network, software, surroundings
from resilient.launch.doctor.finding import Finding, Verdict, ok, warn, worst
from resilient.launch.doctor.job import Asked, decide_pairs, launcher_of
from resilient.launch.doctor.limits import Limits
from resilient.launch.doctor.question import Question
from resilient.launch.doctor.storage import Probe, outside
from resilient.launch.doctor.surroundings import Surroundings
from resilient.policy import Policy

GIB = 1 << 30
ROOMY = Limits(
    available_bytes=100 * GIB,
    memory_limit="",
    memory_file_error="",
    huge_pages=True,
    locked_bytes=None,
    has_gpu=False,
    descriptors=None,
    most_descriptors=None,
    file_bytes=None,
)
PLAIN = Surroundings(
    job="",
    control_group="0::/user.slice",
    tracking="",
    step="",
    container="",
    folder="/tmp/resilient-0/1234",
    folder_error="",
    socket_error="",
    folder_near=True,
    from_login=False,
    private_mount="",
)


def question(image_bytes: int | None = GIB, ranks: int = 1, **policy: object) -> Question:
    return Question(
        url="/data/run", image_bytes=image_bytes, ranks_per_node=ranks, policy=Policy.from_mapping(policy, "test")
    )


def probe(**facts: object) -> Probe:
    """1 GiB/s and room for everything, unless told otherwise."""
    return replace(
        Probe(
            place="/data/run", folder="/data/run", direct=True, free_bytes=1000 * GIB, written_bytes=GIB, write_s=1.0
        ),
        **facts,  # type: ignore[arg-type]
    )


def test_the_worst_verdict_counts() -> None:
    well, doubtful = ok("a", "fine"), warn("b", "slow", "hurry")
    assert worst([]) is Verdict.OK
    assert worst([well, doubtful, well]) is Verdict.WARN
    assert Finding.from_json(doubtful.as_json()) == doubtful


@pytest.mark.parametrize(
    ("decide", "version", "verdict"),
    [
        (software.decide_python, "3.10.4", Verdict.FAIL),
        (software.decide_python, "3.13.0rc1", Verdict.OK),
        (software.decide_torch, "2.8.1+cu126", Verdict.FAIL),
        (software.decide_torch, "2.13.0+cpu", Verdict.OK),
        (software.decide_torch, None, Verdict.FAIL),
        (software.decide_deepspeed, None, Verdict.OK),
        (software.decide_deepspeed, "0.19.3", Verdict.OK),
        (software.decide_deepspeed, "0.20.0", Verdict.WARN),
        (software.decide_deepspeed, "0.1.9", Verdict.WARN),
    ],
)
def test_versions_are_compared_as_numbers(
    decide: Callable[[str | None], Finding], version: str | None, verdict: Verdict
) -> None:
    assert decide(version).verdict is verdict


@pytest.mark.parametrize("policy", [{}, {"parity": "4+1"}, {"parity": "2+2"}])
def test_a_budget_below_two_images_fails_and_the_one_that_is_named_does(policy: dict[str, Any]) -> None:
    found = limits.decide_budget(question(memory_budget="1.5 GiB", **policy))
    assert found.verdict is Verdict.FAIL
    named = int(found.change.split()[3])
    assert limits.decide_budget(question(memory_budget=named, **policy)).verdict is Verdict.OK
    assert limits.decide_budget(question(memory_budget=named - 2, **policy)).verdict is Verdict.FAIL


def test_memory_is_compared_for_all_ranks_of_the_node_with_their_parity() -> None:
    assert limits.decide_memory(question(GIB, 40).wanted_bytes(), ROOMY).verdict is Verdict.OK  # 84 GiB
    assert limits.decide_memory(question(GIB, 40, parity="2+1").wanted_bytes(), ROOMY).verdict is Verdict.FAIL  # 126
    assert limits.decide_memory(question(None, 8, memory_budget="13 GiB").wanted_bytes(), ROOMY).verdict is Verdict.FAIL
    assert "--image-bytes" in limits.decide_memory(question(None).wanted_bytes(), ROOMY).what


def test_small_pages_are_well_but_said_with_what_would_change_them() -> None:
    assert limits.decide_memory_files(ROOMY).what.startswith("images get huge pages")
    small = limits.decide_memory_files(replace(ROOMY, huge_pages=False))
    assert small.verdict is Verdict.OK
    assert "shmem_enabled" in small.what
    assert limits.decide_memory_files(replace(ROOMY, memory_file_error="no")).verdict is Verdict.FAIL


def test_the_least_limit_of_our_control_groups_counts(tmp_path: Path) -> None:
    """A job's limit stands above the step's, which has none."""
    job = tmp_path / "fs" / "system.slice" / "job_7"
    step = job / "step_0"
    step.mkdir(parents=True)
    for folder, limit in ((job, "8000000"), (step, "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("3000000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    (tmp_path / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable:   70000 kB\n")
    (tmp_path / "cgroup").write_text("0::/system.slice/job_7/step_0\n")
    files = (tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "fs")
    assert limits.memory_left(*files) == (6000000, str(job))
    (job / "memory.max").write_text("max")
    assert limits.memory_left(*files) == (70000 << 10, "")


def test_page_locked_memory_matters_with_a_gpu_only() -> None:
    tight = replace(ROOMY, locked_bytes=64 << 10)
    assert limits.decide_locked(2 * GIB, tight).verdict is Verdict.OK
    assert limits.decide_locked(2 * GIB, replace(tight, has_gpu=True)).verdict is Verdict.WARN
    assert limits.decide_locked(2 * GIB, replace(ROOMY, has_gpu=True)).verdict is Verdict.OK


def test_few_descriptors_fail_and_who_can_raise_them_is_told() -> None:
    ours = replace(ROOMY, descriptors=256, most_descriptors=4096)
    theirs = replace(ROOMY, descriptors=256, most_descriptors=256)
    assert limits.decide_descriptors(8, ours).change == "ulimit -n 512"
    assert limits.decide_descriptors(8, theirs).change.startswith("have the limit")
    assert limits.decide_descriptors(8, replace(ROOMY, descriptors=512)).verdict is Verdict.OK


def test_files_smaller_than_an_image_fail() -> None:
    tight = replace(ROOMY, file_bytes=GIB)
    assert limits.decide_file_size(2 * GIB, tight).verdict is Verdict.FAIL
    assert limits.decide_file_size(None, tight).verdict is Verdict.FAIL
    assert limits.decide_file_size(GIB, tight).verdict is Verdict.OK


def test_a_grace_time_shorter_than_a_flush_is_warned_of() -> None:
    noticed = {"preempt_signals": signal.SIGUSR1.name}
    short = levels.decide_speed("url", probe(), question(GIB, 8, grace_s=7.5, **noticed))
    assert short.verdict is Verdict.WARN
    assert "8.0 s" in short.what
    assert levels.decide_speed("url", probe(), question(GIB, 8, grace_s=9, **noticed)).verdict is Verdict.OK
    assert levels.decide_speed("local", probe(), question(GIB, 8, grace_s=7.5, **noticed)).verdict is Verdict.OK
    unknown = levels.decide_speed("url", probe(), question(GIB, 8, **noticed))
    assert unknown.verdict is Verdict.OK
    assert "grace_s would tell" in unknown.what


def test_a_write_that_cannot_end_within_its_time_fails() -> None:
    slow = probe(write_s=1000.0)
    found = levels.decide_speed("url", slow, question(GIB))
    assert found.verdict is Verdict.FAIL
    assert levels.decide_speed("url", slow, question(GIB, write_timeout_s=2000.0)).verdict is Verdict.OK
    assert levels.decide_speed("url", slow, question(None)).verdict is Verdict.OK


def test_rights_that_are_refused_fail_and_a_store_that_overwrites_is_warned_of() -> None:
    refused = levels.decide_rights("url", probe(refused=("delete", "Forbidden")))
    assert refused.verdict is Verdict.FAIL
    assert "allowed to delete there" in refused.change
    assert levels.decide_rights("url", probe(overwrites=True)).verdict is Verdict.WARN
    assert levels.decide_rights("url", probe()).verdict is Verdict.OK


def test_room_is_needed_for_what_is_kept_and_for_one_more() -> None:
    assert levels.decide_room("url", probe(free_bytes=3 * GIB), question()) == ok(
        "url room", "3.0 GiB left in /data/run; 2 snapshots and the one being written take 3.0 GiB for this node"
    )
    verdicts = {}
    for free in (2, 0.5):
        found = levels.decide_room("url", probe(free_bytes=int(free * GIB)), question())
        assert found is not None
        verdicts[free] = found.verdict
    assert verdicts == {2: Verdict.WARN, 0.5: Verdict.FAIL}
    local = levels.decide_room("local", probe(free_bytes=3 * GIB), question(local="/nvme", local_keep_last=5))
    assert local is not None
    assert "local_keep_last" in local.change


@pytest.mark.parametrize(
    ("run_id", "host", "beats", "rank_0", "verdict"),
    [
        ("theirs", "n3", True, True, Verdict.FAIL),
        ("theirs", "n3", False, True, Verdict.OK),
        ("ours", "n3", True, True, Verdict.FAIL),  # a second job of our run, on another node
        ("ours", "n3", True, False, Verdict.WARN),  # what an earlier job of our run has left is still being written
        ("ours", "here", True, True, Verdict.OK),  # the agent that waits for us
        ("ours", "n3", False, True, Verdict.OK),
    ],
)
def test_a_claim_that_lives_is_in_the_way(run_id: str, host: str, beats: bool, rank_0: bool, verdict: Verdict) -> None:
    claim = {"run_id": run_id, "process": {"pid": 17, "host": host}, "rank_0": rank_0}
    asked = replace(question(run_id="ours"), host="here")
    found = levels.decide_claim("url", probe(claim=claim, claim_beats=beats), asked)
    assert found is not None
    assert found.verdict is verdict
    assert "17" in found.what


def test_a_place_without_a_claim_says_nothing_of_one() -> None:
    assert levels.decide_claim("url", probe(), question()) is None


@pytest.mark.parametrize(
    ("skew_s", "verdict"), [(0.5, "ok"), (-4.0, "ok"), (-6.0, "warn"), (60.0, "warn"), (400, "fail")]
)
def test_clocks_may_differ_by_seconds_not_by_minutes(skew_s: float, verdict: str) -> None:
    assert levels.clock_finding("clock", "theirs", skew_s).verdict == verdict


def test_a_moment_that_may_lie_within_the_call_shows_no_skew() -> None:
    assert outside(100.0, before=100.9, after=101.2) == 0.0  # a whole second is told, 100.95 may be meant
    assert outside(90.0, before=100.0, after=101.0) == -9.0
    assert outside(111.0, before=100.0, after=101.0) == 10.0


@pytest.mark.parametrize(
    ("group", "tracking", "verdict"),
    [
        ("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0", "", Verdict.WARN),
        ("4:freezer:/slurm/uid_0/job_7/step_0", "", Verdict.WARN),
        ("0::/", "proctrack/cgroup", Verdict.WARN),
        ("0::/", "proctrack/linuxproc", Verdict.OK),
        ("0::/", "", Verdict.OK),
    ],
)
def test_a_control_group_of_slurm_ends_the_agent(group: str, tracking: str, verdict: Verdict) -> None:
    found = replace(PLAIN, job="7", control_group=group, tracking=tracking)
    assert surroundings.decide_process_tree(found).verdict is verdict
    assert surroundings.decide_process_tree(replace(found, step="answers")).verdict is Verdict.OK
    assert surroundings.decide_process_tree(replace(found, step="/x: refused")).verdict is Verdict.FAIL


def test_a_control_group_outside_of_a_job_is_nobodys_business() -> None:
    assert surroundings.decide_process_tree(replace(PLAIN, control_group="0::/slurm/old")).verdict is Verdict.OK


def test_a_folder_that_goes_away_or_is_hidden_is_warned_of() -> None:
    verdicts = {
        name: surroundings.decide_folder(replace(PLAIN, **change)).verdict  # type: ignore[arg-type]
        for name, change in {
            "plain": {},
            "login": {"from_login": True},
            "network": {"folder_near": False},
            "private": {"private_mount": "/tmp/systemd-private-1-x.service-2/tmp"},
            "long": {"folder_error": "too long"},
            "forbidden": {"socket_error": "Permission denied"},
        }.items()
    }
    assert verdicts == {
        "plain": "ok", "login": "warn", "network": "warn", "private": "warn", "long": "fail", "forbidden": "fail",
    }  # fmt: skip


def test_a_mount_of_one_service_is_found_where_it_holds_the_folder() -> None:
    """Lines as proc(5) describes them."""
    mounts = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "90 22 254:0 /tmp/systemd-private-9c-slurmd.service-X/tmp /tmp rw,relatime - ext4 /dev/vda rw\n"
        "91 22 0:40 / /run/user/0 rw - tmpfs tmpfs rw\n"
    )
    assert surroundings.private_mount(mounts, "/tmp/resilient-0/1") == "/tmp/systemd-private-9c-slurmd.service-X/tmp"
    assert surroundings.private_mount(mounts, "/run/user/0/resilient-0/1") == ""
    assert surroundings.private_mount(mounts, "/tmpother") == ""


def test_a_peer_cannot_come_to_a_loopback_address() -> None:
    asked = replace(question(parity="1+1"), peers=("n2",))
    assert network.decide_address("127.0.0.1", "", asked).verdict is Verdict.FAIL
    assert network.decide_address("127.0.0.1", "", question(parity="1+1")).verdict is Verdict.OK
    assert network.decide_address("10.0.0.1", "no such address", asked).verdict is Verdict.FAIL
    assert network.decide_address("10.0.0.1", "no such address", question()).verdict is Verdict.WARN


def test_lost_pairs_doubles_and_clocks_are_told() -> None:
    well = decide_pairs([Asked("b", 0.1, ""), Asked("c", -2.0, "")], ["a", "b", "c"])
    assert {one.verdict for one in well} == {Verdict.OK}
    assert decide_pairs([], ["a"]) == [ok("nodes", "there is no other node")]
    lost = decide_pairs([Asked("b", 0.0, "refused"), Asked("c", 30.0, "")], ["a", "b", "c", "c"])
    assert [(one.name, one.verdict) for one in lost] == [
        ("node names", Verdict.FAIL), ("nodes", Verdict.FAIL), ("node clocks", Verdict.WARN),
    ]  # fmt: skip
    assert "2 of 3" in lost[1].what
    assert "b: refused" in lost[1].what


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}, None),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMI_SIZE": "2"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMI_SIZE": "8"}, "mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # a batch script, not a step
    ],
)
def test_the_launcher_shows_in_the_environment(environment: dict[str, str], launcher: str | None) -> None:
    assert launcher_of(environment) == launcher
