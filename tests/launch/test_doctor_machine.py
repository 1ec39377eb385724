"""The doctor on this machine: real probes of real places, good and bad, that leave nothing behind."""

import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the examples are no installed package

from examples.nodes import Nodes
from resilient.checkpoint.levels.claim import Claim
from resilient.checkpoint.levels.files import FileStore
from resilient.launch.doctor.examine import within
from resilient.launch.doctor.finding import ok
from tests.launch.conftest import Ended, Resilient
from tests.s3_server import BUCKET, KEY, READER, SECRET, S3Server, s3_server

__all__ = ["s3_server"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces can be made by root only")
RESILIENT = Path(sysconfig.get_path("scripts")) / "resilient"


def by_name(ended: Ended) -> dict[str, Any]:
    """The findings of the one node."""
    (findings,) = ended.json["nodes"].values()
    return {finding["name"]: finding for finding in findings}


def verdicts(ended: Ended) -> dict[str, str]:
    return {name: finding["verdict"] for name, finding in by_name(ended).items()}


@pytest.fixture(autouse=True)
def private_folder(runtime_dir: Path) -> Path:
    return runtime_dir


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, with the mount options that the test asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_good_machine_is_well_and_nothing_is_left_behind(
    script: Resilient, tmp_path: Path, runtime_dir: Path
) -> None:
    (tmp_path / "policy.toml").write_text(f'local = "{tmp_path}/local"\nmemory_budget = "4 MiB"\n')
    before = sorted(tmp_path.iterdir())
    url = tmp_path / "not" / "there"
    ended = script("doctor", "--url", url, "--policy", tmp_path / "policy.toml", "--image-bytes", "1 MiB", "--json")
    assert ended.code == 0, ended.out
    found = verdicts(ended)
    assert set(found.values()) <= {"ok", "warn"}
    assert {"url rights", "local rights", "url speed", "local speed", "memory budget"} <= found.keys()
    assert by_name(ended)["url rights"]["what"].endswith(f"(in {tmp_path}; the rest of the path will be made)")
    assert sorted(tmp_path.iterdir()) == before
    assert list(runtime_dir.iterdir()) == []
    told = script("doctor", "--url", url)
    assert told.code == 0
    assert "0 would not work" in told.out


@pytest.mark.parametrize("disk", ["size=64m,ro"], indirect=True)
def test_a_place_that_is_read_only_fails_and_says_what_to_do(disk: Path, script: Resilient) -> None:
    ended = script("doctor", "--url", disk, "--json")
    assert ended.code == 1
    found = by_name(ended)
    assert found["url rights"]["verdict"] == "fail"
    assert "read-only" in found["url rights"]["what"]
    assert "url speed" not in found


@pytest.mark.parametrize("disk", ["size=2m"], indirect=True)
def test_a_disk_with_little_room_is_not_filled_for_a_measurement(disk: Path, script: Resilient) -> None:
    ended = script("doctor", "--url", disk, "--image-bytes", "4 MiB", "--json")
    assert ended.code == 1
    assert verdicts(ended)["url room"] == "fail"
    assert "not measured" in by_name(ended)["url speed"]["what"]
    assert list(disk.iterdir()) == []


def test_a_grace_time_that_no_disk_could_keep_is_warned_of(script: Resilient, tmp_path: Path) -> None:
    size = ("--image-bytes", "1 TiB")
    notice = {"RESILIENT_PREEMPT_SIGNALS": "SIGUSR1", "RESILIENT_GRACE_S": "1", "RESILIENT_WRITE_TIMEOUT_S": "1e9"}
    ended = script("doctor", "--url", tmp_path, *size, "--json", **notice)
    assert verdicts(ended)["url speed"] == "warn"
    assert "grace_s" in by_name(ended)["url speed"]["what"]


def test_the_job_that_holds_the_url_is_named_if_it_lives(script: Resilient, tmp_path: Path) -> None:
    claim = Claim(FileStore(str(tmp_path)), "theirs")
    claim.take()
    ended = threading.Event()

    def hold() -> None:
        while not ended.wait(0.3):
            claim.beat()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        told = script("doctor", "--url", tmp_path, "--json", RESILIENT_RUN_ID="ours")
    finally:
        ended.set()
        holder.join()
        claim.release()
    assert told.code == 1
    assert f"process {os.getpid()}" in by_name(told)["url claim"]["what"]
    assert "lives" in by_name(told)["url claim"]["what"]


def test_a_claim_that_nobody_holds_any_more_is_in_nobodys_way(script: Resilient, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom resilient.checkpoint.levels.claim import Claim\n"
        "from resilient.checkpoint.levels.files import FileStore\nClaim(FileStore(sys.argv[1]), 'theirs').take()"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
    told = script("doctor", "--url", tmp_path, "--json", RESILIENT_RUN_ID="ours")
    assert told.code == 0
    assert "seems to be dead" in by_name(told)["url claim"]["what"]


@pytest.mark.parametrize(("limit", "name"), [("-n 100", "open files"), ("-f 1024", "file size")])
def test_limits_of_the_shell_are_found(limit: str, name: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"ulimit {limit}; exec {RESILIENT} doctor --json"], capture_output=True, text=True, check=False
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.code == 1, done.stderr
    assert verdicts(ended)[name] == "fail"


def test_a_folder_of_sockets_that_cannot_work_fails(script: Resilient, tmp_path: Path) -> None:
    long = script("doctor", "--json", RESILIENT_RUNTIME_DIR=str(tmp_path / ("x" * 100)))
    assert long.code == 1
    assert "too long" in by_name(long)["agent's folder"]["what"]
    (tmp_path / "r" / f"resilient-{os.getuid()}").mkdir(mode=0o755, parents=True)
    public = script("doctor", "--json", RESILIENT_RUNTIME_DIR=str(tmp_path / "r"))
    assert public.code == 1
    assert "private" in by_name(public)["agent's folder"]["what"]


def test_an_agent_step_that_nobody_runs_fails(script: Resilient, tmp_path: Path) -> None:
    ended = script("doctor", "--json", RESILIENT_AGENT_STEP=str(tmp_path / "step.sock"))
    assert ended.code == 1
    assert "does not answer" in by_name(ended)["agent's life"]["what"]


def test_peers_are_reached_even_when_they_refuse_and_unknown_names_fail(script: Resilient) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
        ended = script("doctor", "--peers", f"{nobody},no-such-host.invalid", "--json")
    assert ended.code == 1
    assert verdicts(ended)[f"peer {nobody}"] == "ok"
    assert verdicts(ended)["peer no-such-host.invalid"] == "fail"


@pytest.mark.parametrize(("option", "value"), [("--image-bytes", "8G"), ("--policy", "/no/such.toml")])
def test_options_that_cannot_be_meant_are_usage_errors(option: str, value: str, resilient: Resilient) -> None:
    ended = resilient("doctor", option, value)
    assert ended.code == 2
    assert value in ended.err


def s3(port: int, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip


def test_an_object_store_is_probed_and_left_as_it_was(script: Resilient, s3_server: S3Server) -> None:
    ended = script("doctor", "--url", f"s3://{BUCKET}/doctor", "--json", **s3(s3_server.port))
    assert ended.code == 0, ended.out + ended.err
    assert {"url rights", "url speed", "url clock"} <= verdicts(ended).keys()
    assert s3_server.store(folder="doctor").list() == []
    assert s3_server.unfinished_uploads("doctor") == []


@pytest.mark.parametrize(
    ("key", "secret", "reason"),
    [(KEY, "guessed", "signature"), (READER, SECRET, "Access Denied")],
    ids=["key", "right"],
)
def test_a_key_without_rights_is_told_with_what_the_service_said(
    key: str, secret: str, reason: str, script: Resilient, s3_server: S3Server
) -> None:
    ended = script("doctor", "--url", f"s3://{BUCKET}/doctor", "--json", **s3(s3_server.port, key, secret))
    assert ended.code == 1
    found = by_name(ended)["url rights"]
    assert "cannot write" in found["what"]
    assert reason in found["what"]


def test_a_service_that_hangs_costs_the_patience_and_no_more(script: Resilient) -> None:
    """It accepts connections, as a listening socket does by itself, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        port = silent.getsockname()[1]
        ended = script("doctor", "--url", f"s3://{BUCKET}/x", "--patience", "2", "--json", **s3(port))
    assert ended.code == 1
    assert "no answer within 2 s" in by_name(ended)["url"]["what"]
    assert time.monotonic() - began < 30.0


def test_a_check_is_waited_for_only_so_long() -> None:
    never = threading.Event()
    assert within(0.05, lambda: [ok("a", str(never.wait()))]) is None
    assert within(30.0, lambda: [ok("a", "fine")]) == [ok("a", "fine")]
    never.set()


def in_job(nodes: Nodes, names: Sequence[str]) -> list[Ended]:
    """A doctor on each node, one rank a node, as a launcher would start them; `names` are what they call themselves."""
    master = nodes.names[0]
    job = {
        "WORLD_SIZE": str(len(names)),
        "MASTER_ADDR": nodes.address(master),
        "MASTER_PORT": "29500",
        "LOCAL_RANK": "0",
    }
    started = []
    for rank, (node, name) in enumerate(zip(nodes.names, names, strict=True)):
        told = [f"{key}={value}" for key, value in {**job, "RANK": rank, "RESILIENT_NODE": name}.items()]
        command = ["env", *told, str(RESILIENT), "doctor", "--json"]
        started.append(nodes.start(node, command, output=subprocess.PIPE))
    ended = []
    for process in started:
        said = process.communicate(timeout=100)[0].decode()  # torch's remarks are in it, too
        report = "".join(line for line in said.splitlines() if line.startswith("{"))
        ended.append(Ended(process.returncode, report, said))
    return ended


@needs_root
def test_in_a_job_all_pairs_are_tried_and_rank_0_tells_of_all_nodes() -> None:
    """Nothing gets from n2 to n3, nor back; both reach n1."""
    with Nodes(3, isolated=True) as nodes:
        cut = nodes.start("n2", ["ip", "route", "add", "blackhole", nodes.address("n3")], output=subprocess.PIPE)
        assert cut.communicate(timeout=20)[0] == b""
        first, *others = in_job(nodes, nodes.names)
    assert [(ended.code, ended.out) for ended in others] == [(0, ""), (0, "")]
    assert first.code == 1, first.err
    found = {node: {finding["name"]: finding for finding in findings} for node, findings in first.json["nodes"].items()}
    assert {node: found[node]["nodes"]["verdict"] for node in found} == {"n1": "ok", "n2": "fail", "n3": "fail"}
    assert "1 of 2 other nodes not reached: n3" in found["n2"]["nodes"]["what"]
    assert "1 of 2 other nodes not reached: n2" in found["n3"]["nodes"]["what"]
    assert found["n1"]["node clocks"]["verdict"] == "ok"


@needs_root
def test_in_a_job_two_nodes_of_one_name_are_found() -> None:
    with Nodes(2, isolated=True) as nodes:
        first, _ = in_job(nodes, ["same", "same"])
    assert first.code == 1
    assert "node names" in {finding["name"] for finding in first.json["nodes"]["same"]}
