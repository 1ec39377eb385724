"""Real agent processes: they outlive trainers, their own death is noticed at once, and they leave nothing behind."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import Address, address_of
from resilient.checkpoint.agent.protocol import FRAME_BYTES, FrameReader, encode
from resilient.checkpoint.names import complete_steps
from resilient.errors import AgentLost, LevelFailed, UrlInUse, UsageError
from resilient.policy import Policy
from tests.checkpoint.agent.trainer import IMAGE_BYTES, Trainer, image_of

SMALL = 1000
CHECKOUT = Path(__file__).parents[3]

Eventually = Callable[..., None]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def agents(runtime_dir: Path, eventually: Eventually) -> Iterator[Callable[[], list[int]]]:
    """The process numbers of all agents in this test's folder; ends them after the test."""

    def numbers() -> list[int]:
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    command = (process / "cmdline").read_text()
                except OSError:
                    continue
                if "resilient.checkpoint.agent" in command and str(runtime_dir) in command and alive(int(process.name)):
                    found.append(int(process.name))
        return found

    yield numbers
    for log in runtime_dir.glob("*/*/agent.log"):
        with suppress(FileNotFoundError):  # an agent that ends takes its folder along
            print(log.read_text())  # shown if the test failed
    for pid in numbers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not numbers(), "no agent is left")


@pytest.fixture
def spawn(agents: object) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a trainer process; on return it has saved. (the process, its agent's number)"""
    started = []

    def start(rank: int, world_size: int, sealed: int, half_filled: int = 0) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "tests.checkpoint.agent.trainer", str(rank), str(world_size), str(sealed)]
        path = os.pathsep.join([*(entry for entry in sys.path if entry), str(CHECKOUT)])
        process = subprocess.Popen(
            [*command, str(half_filled)],
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the trainer of rank {rank} died"
        return process, json.loads(line)["agent"]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


# --- trainers that die


def test_images_outlive_a_trainer_that_is_killed_and_are_read_back_bit_for_bit(
    spawn: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    process, agent = spawn(0, 1, sealed=3, half_filled=4)
    process.kill()
    process.wait()
    trainer = Trainer(0, 1)
    assert trainer.client.status()["pid"] == agent
    assert [(image.step, image.complete) for image in trainer.client.images()] == [(3, True)]
    assert trainer.image(0, 3) == image_of(0, 3)
    slots = trainer.plan(slots=3)
    trainer.save(4)
    trainer.wait_for("complete", 4)
    assert len(slots) == 3
    assert trainer.client.status()["bytes"] < 3 * IMAGE_BYTES + 3 * 4096, "the slots of the dead trainer are used again"


def test_a_rank_that_dies_one_step_behind_costs_no_complete_snapshot(
    spawn: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    behind, _ = spawn(1, 2, sealed=2, half_filled=3)
    ahead, _ = spawn(0, 2, sealed=3)
    for process in (behind, ahead):
        process.kill()
        process.wait()
    trainer = Trainer(0, 2)
    complete = {(image.rank, image.step) for image in trainer.client.images() if image.complete}
    assert complete == {(0, 2), (1, 2)}
    assert trainer.image(1, 2) == image_of(1, 2)


def test_a_second_process_with_the_same_rank_is_refused_while_the_first_one_lives(
    spawn: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    process, _ = spawn(0, 1, sealed=1)
    with pytest.raises(UrlInUse, match=f"rank 0 is served by another living process, {process.pid}: a second job"):
        Trainer(0, 1)
    with pytest.raises(UrlInUse, match=f"served by another living process, {process.pid}"):
        Trainer(1, 2)
    process.kill()
    process.wait()
    assert Trainer(0, 1).image(0, 1) == image_of(0, 1)


def test_a_trainer_whose_forked_child_lives_on_is_dead_all_the_same(agents: object, eventually: Eventually) -> None:
    code = (
        "import os, time; from tests.checkpoint.agent.trainer import Trainer; t = Trainer(); t.plan(); t.save(1)\n"
        "t.wait_for('complete', 1); child = os.fork()\n"
        "if child == 0: time.sleep(120)\n"
        "print(child, flush=True); os._exit(0)"
    )
    path = os.pathsep.join([*(entry for entry in sys.path if entry), str(CHECKOUT)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd="/", env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait()
    try:
        assert Trainer(0, 1).image(0, 1) == image_of(0, 1)
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


# --- agents that die


def test_when_the_agent_is_killed_everybody_who_waits_hears_it_at_once(agents: Callable[[], list[int]]) -> None:
    trainer = Trainer(0, 2)
    trainer.plan(SMALL, slots=1)
    trainer.fill(1, SMALL)
    errors: list[Exception] = []

    def wait_for_a_slot() -> None:
        try:
            trainer.client.take_free_slot(100)
        except AgentLost as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_a_slot)
    waiting.start()
    (agent,) = agents()
    began = time.monotonic()
    os.kill(agent, signal.SIGKILL)
    waiting.join(20)
    assert time.monotonic() - began < 10
    assert str(trainer.wait_lost()) == str(errors[0])
    assert trainer.client.lost
    with pytest.raises(AgentLost, match="connecting again starts another agent"):
        trainer.client.status()
    with pytest.raises(AgentLost):
        trainer.client.failed("memory", 1, 0, "lost")
    trainer.client.close(keep=False)


def test_a_request_that_waits_when_the_agent_is_killed_fails_at_once(
    agents: Callable[[], list[int]], eventually: Eventually
) -> None:
    trainer = Trainer()
    (agent,) = agents()
    os.kill(agent, signal.SIGSTOP)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            trainer.client.status()
        except AgentLost as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: trainer.client._connection._waiting, "the request is sent")
    os.kill(agent, signal.SIGKILL)
    asking.join(20)
    assert len(errors) == 1


def test_after_the_agent_was_killed_connecting_starts_another_one(agents: Callable[[], list[int]]) -> None:
    trainer = Trainer()
    trainer.plan(SMALL)
    (first,) = agents()
    os.kill(first, signal.SIGKILL)
    trainer.wait_lost()
    again = Trainer()
    again.plan(SMALL)
    again.save(1, size=SMALL)
    again.wait_for("complete", 1)
    assert again.client.status()["pid"] not in (first, os.getpid())
    assert again.image(0, 1) == image_of(0, 1, SMALL)


def test_of_many_ranks_that_start_together_one_starts_the_agent(agents: Callable[[], list[int]]) -> None:
    found: list[int] = []

    def connect(rank: int) -> None:
        found.append(Trainer(rank, 6).client.status()["pid"])

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert set(found) == set(agents())


# --- strangers


@pytest.fixture
def address(agents: object) -> Address:
    Trainer(0, 2)
    return address_of("run", None)


def speak(address: Address, data: bytes) -> list[dict[str, object]]:
    """Send bytes to the agent; what it answers before it ends the connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(address.socket))
        reader = FrameReader()
        try:
            sock.sendall(data)
            while received := sock.recv(65536):
                reader.feed(received)
        except ConnectionError:
            pass
        return [message for message, _ in reader.messages()]


def hello(address: Address, **changes: object) -> bytes:
    fields = {
        "op": "hello",
        "id": 1,
        "token": address.token.read_text(),
        "protocol": 1,
        "run_id": "run",
        "url": None,
        "rank": 1,
        "world_size": 2,
        "node_ranks": [0, 1],
        "policy": {},
    }
    return encode({**fields, **changes})


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_a_wrong_token_is_refused(address: Address, token: str) -> None:
    (answer,) = speak(address, hello(address, token=token))
    assert "the token is wrong" in str(answer)


def test_another_version_of_the_protocol_is_refused(address: Address) -> None:
    (answer,) = speak(address, hello(address, protocol=2))
    assert "two versions of the library" in str(answer)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", FRAME_BYTES + 1),
        struct.pack(">I", 1 << 20),
        struct.pack(">I", 5) + b"{{{{{",
        encode({"op": "status", "id": 1}),
        encode({"op": ["hello"], "id": 1}),
        encode({"op": "hello", "id": "one"}),
        encode({"id": 1}),
    ],
)
def test_what_is_no_hello_ends_the_connection_and_the_agent_goes_on(address: Address, data: bytes) -> None:
    assert speak(address, data) == []
    assert Trainer.all[0].client.status()["pid"]


@pytest.mark.parametrize(
    "message",
    [
        {"op": "nothing of the kind", "id": 2},
        {"op": "begin", "slot": 77, "step": 1},
        {"op": "begin", "slot": -1, "step": 1},
        {"op": "seal", "slot": 1, "step": 1, "image_bytes": 1, "levels": "local"},
        {"op": "filled"},
        {"op": "plan", "id": 2, "plan_digest": 1},
        {"op": "unmap", "slot": 1},
        {"op": "complete", "level": "moon", "step": 1},
        {"op": "hello", "id": 2},
    ],
)
def test_a_trainer_that_sends_what_cannot_be_loses_its_connection_and_the_agent_goes_on(
    address: Address, message: dict[str, object]
) -> None:
    answers = speak(address, hello(address) + encode(message))
    assert [answer.get("ok") for answer in answers] == [True]
    assert Trainer.all[0].client.status()["pid"]


def test_the_folder_and_the_token_are_private(address: Address) -> None:
    assert address.folder.stat().st_mode & 0o777 == 0o700
    assert address.token.stat().st_mode & 0o777 == 0o600
    assert address.socket.stat().st_mode & 0o077 == 0 or address.folder.stat().st_mode & 0o077 == 0


# --- ends


def test_a_clean_close_ends_the_process_and_removes_its_folder(
    agents: Callable[[], list[int]], eventually: Eventually
) -> None:
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.client.close(keep=False)
    eventually(lambda: not agents(), "the agent has ended")
    assert not address_of("run", None).folder.exists()


def test_an_agent_without_trainers_ends_after_its_idle_time(
    agents: Callable[[], list[int]], eventually: Eventually
) -> None:
    trainer = Trainer(policy=Policy(agent_idle_s=0.5))
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    trainer.client.close(keep=True)
    eventually(lambda: not agents(), "the agent has ended")
    assert not address_of("run", None).folder.exists()


def test_a_run_that_begins_right_after_another_ended_gets_an_agent_of_its_own(agents: object) -> None:
    for _ in range(5):
        trainer = Trainer()
        trainer.plan(SMALL)
        assert trainer.client.images() == []
        trainer.save(1, size=SMALL)
        trainer.wait_for("complete", 1)
        trainer.client.close(keep=False)


def test_sigterm_finishes_what_is_being_written_and_ends(
    agents: Callable[[], list[int]], eventually: Eventually, tmp_path: Path
) -> None:
    url = str(tmp_path / "durable")
    trainer = Trainer(url=url)
    trainer.plan()
    trainer.save(1, levels=["durable"])
    trainer.wait_for("sealed", 1)
    (agent,) = agents()
    os.kill(agent, signal.SIGTERM)
    trainer.wait_lost()
    eventually(lambda: not agents(), "the agent has ended")
    names = [path.relative_to(url).as_posix() for path in Path(url).rglob("*") if path.is_file()]
    assert complete_steps(names) == {1: 1}
    assert "claim.json" not in names


def test_images_reach_real_disks_and_the_old_ones_go(agents: object, tmp_path: Path, eventually: Eventually) -> None:
    url, local = str(tmp_path / "durable"), str(tmp_path / "local")
    trainer = Trainer(url=url, policy=Policy(local=local, local_keep_last=1, keep_last=2))
    trainer.plan(SMALL)
    for step in range(1, 6):
        trainer.save(step, levels=["local", "durable"], size=SMALL)
        trainer.wait_for("complete", step, "durable")
    assert trainer.client.flush(20) == []

    def steps(folder: str) -> set[str]:
        return {path.name for path in Path(folder).iterdir() if path.is_dir() and path.name.startswith("step_")}

    eventually(lambda: steps(url) == {"step_00000004", "step_00000005"}, "the durable level is tidy")
    eventually(lambda: steps(local) == {"step_00000005"}, "the local level is tidy")


# --- what it costs


def test_the_agent_does_not_import_torch(agents: object) -> None:
    code = "import sys, resilient.checkpoint.agent.__main__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    trainer = Trainer()
    maps = Path(f"/proc/{trainer.client.status()['pid']}/maps").read_text()
    assert "torch" not in maps


def test_the_agent_yields_to_training(agents: Callable[[], list[int]]) -> None:
    Trainer()
    (agent,) = agents()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, agent) == min(19, own + 5)
    assert os.getsid(agent) != os.getsid(0)


def test_hundreds_of_saves_grow_neither_memory_nor_descriptors_nor_threads(agents: object, tmp_path: Path) -> None:
    policy = Policy(local=str(tmp_path / "local"), local_keep_last=1)
    trainers = [Trainer(rank, 2, policy=policy) for rank in (0, 1)]
    for trainer in trainers:
        trainer.plan(SMALL)

    def save(first: int, last: int) -> tuple[dict[str, int], int, int]:
        for step in range(first, last):
            for trainer in trainers:
                trainer.save(step, levels=["local"] if step % 10 == 0 else [], size=SMALL)
                if step % 7 == 0:
                    trainer.client.failed("memory", step, trainer.rank, "now and then")
        for trainer in trainers:
            trainer.client.flush(60)
        trainers[0].save(last, size=SMALL)
        trainers[1].save(last, size=SMALL)
        trainers[0].wait_for("complete", last, "memory")
        status = trainers[0].client.status()
        keys = ("threads", "fds", "bytes", "snapshots", "resident_bytes")
        return {key: status[key] for key in keys}, threading.active_count(), len(os.listdir("/proc/self/fd"))

    before, own_threads, own_fds = save(1, 60)
    for trainer in trainers:
        trainer.events.clear()
    after, own_threads_after, own_fds_after = save(61, 420)
    assert after["bytes"] == before["bytes"]
    assert after["threads"] <= before["threads"]
    assert after["fds"] <= before["fds"] + 1
    assert after["snapshots"] <= before["snapshots"] + 2
    assert after["resident_bytes"] < before["resident_bytes"] + (4 << 20)
    assert (own_threads_after, own_fds_after) <= (own_threads, own_fds + 1)


# --- what cannot be started


def test_an_agent_that_cannot_start_says_why(agents: object, runtime_dir: Path) -> None:
    address = address_of("run", None)
    address.folder.mkdir(parents=True, mode=0o700)
    address.folder.parent.chmod(0o755)
    with pytest.raises(UsageError, match="is not a folder private to user"):
        Trainer()
    address.folder.parent.chmod(0o700)
    address.token.mkdir()
    with pytest.raises(LevelFailed, match="the agent could not be started: IsADirectoryError"):
        Trainer(timeout_s=20)


def test_a_forked_child_cannot_use_or_end_its_parents_connection(agents: object) -> None:
    code = (
        "import os, sys; from tests.checkpoint.agent.trainer import Trainer; from resilient.errors import AgentLost\n"
        "t = Trainer(); t.plan(1000)\n"
        "if os.fork() == 0:\n"
        "    try: t.client.failed('memory', 1, 0, 'child')\n"
        "    except AgentLost: t.client.close(keep=False); os._exit(7)\n"
        "    os._exit(1)\n"
        "status = os.waitstatus_to_exitcode(os.wait()[1])\n"
        "t.save(1, size=1000); t.wait_for('complete', 1)\n"
        "sys.exit(status)"
    )
    path = os.pathsep.join([*(entry for entry in sys.path if entry), str(CHECKOUT)])
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 7
