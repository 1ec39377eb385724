"""The agent step with real processes: agents outlive the process group of their trainers, and are waited for."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.agent.protocol import encode
from resilient.checkpoint.agent.step import VARIABLE, ask, receive
from resilient.checkpoint.names import complete_steps
from resilient.errors import LevelFailed, UsageError
from resilient.launch.agent_step import STOP_S, AgentStep, Facts, decide
from resilient.policy import Policy
from tests.checkpoint.agent.trainer import Trainer, image_of

CHECKOUT = Path(__file__).parents[2]
SERVING = Facts(living=1, started=1, until_done=False, asked_s=None, hurried=False, grace_s=60.0)

Eventually = Callable[..., None]
StartStep = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def step_path(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = runtime_dir / "step" / "agents.sock"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.fixture
def start_step(step_path: Path) -> Iterator[StartStep]:
    """Runs `resilient agent`; on return trainers can connect. Its agents are ended, too."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "resilient.launch.cli", "agent", "--socket", str(step_path), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == f"export {VARIABLE}={step_path}\n"
        return process

    yield start
    for trainer in Trainer.all:
        trainer.vanish()
    Trainer.all.clear()
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
        process.wait(40)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def trainers() -> Iterator[Callable[[], tuple["subprocess.Popen[str]", int]]]:
    """A trainer process that has saved a step, alone in its process group, and the number of its agent."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple["subprocess.Popen[str]", int]:
        path = os.pathsep.join([*(entry for entry in sys.path if entry), str(CHECKOUT)])
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.agent.trainer", "0", "1", "1", "0"],
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())["agent"]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def agents_of(step_path: Path) -> list[int]:
    return [one["pid"] for one in ask(step_path, {"op": "status"}, within_s=10)["agents"]]


def test_the_agent_is_a_child_of_the_step_and_outlives_the_process_group_of_its_trainers(
    start_step: StartStep, trainers: Callable[[], tuple["subprocess.Popen[str]", int]], step_path: Path
) -> None:
    step = start_step()
    trainer, agent = trainers()
    assert parent_of(agent) == step.pid
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()

    again = Trainer()

    assert again.client.status()["pid"] == agent
    assert again.image(0, 1) == image_of(0, 1)
    assert agents_of(step_path) == [agent]


def test_a_notice_to_all_processes_leaves_the_trainers_their_agent_until_they_have_saved(
    start_step: StartStep, tmp_path: Path, eventually: Eventually
) -> None:
    step = start_step()
    durable = tmp_path / "durable"
    trainer = Trainer(url=str(durable), policy=Policy(durable_every=1))
    trainer.plan()
    agent = trainer.client.status()["pid"]

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        for process in (step.pid, agent):
            os.kill(process, number)
    trainer.save(7, ["durable"])
    trainer.wait_for("complete", 7, "durable")

    assert step.poll() is None
    trainer.client.close(keep=True)
    assert step.wait(20) == 0  # although the memory was to be kept: the step was asked to finish
    assert complete_steps([path.relative_to(durable).as_posix() for path in durable.rglob("*")]) == {7: 1}


def test_until_done_waits_for_pending_writes_and_then_ends_by_itself(start_step: StartStep, tmp_path: Path) -> None:
    step = start_step("--until-done")
    trainer = Trainer(url=str(tmp_path / "durable"), policy=Policy(durable_every=1))
    trainer.plan()
    trainer.save(1, ["durable"])
    trainer.client.close(keep=False)
    assert step.wait(20) == 0
    assert list((tmp_path / "durable").rglob("*.safetensors"))


def test_finish_returns_when_the_agents_have_ended(
    start_step: StartStep, trainers: Callable[[], tuple["subprocess.Popen[str]", int]], step_path: Path
) -> None:
    step = start_step()
    trainer, agent = trainers()
    command = [sys.executable, "-m", "resilient.launch.cli", "agent", "--finish"]
    finishing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    trainer.kill()
    _, said = finishing.communicate(timeout=30)
    assert (finishing.returncode, said) == (0, "the agent step has ended; it had started 1 agent(s)\n")
    assert not Path(f"/proc/{agent}").exists()
    assert step.wait(10) == 0
    assert not step_path.exists()


def test_a_step_whose_grace_is_over_stops_agents_that_trainers_still_use(
    start_step: StartStep, trainers: Callable[[], tuple["subprocess.Popen[str]", int]]
) -> None:
    step = start_step("--grace", "0.2")
    _, agent = trainers()
    step.terminate()
    assert step.wait(40) == 0
    assert not Path(f"/proc/{agent}").exists()


def test_a_trainer_whose_step_is_gone_starts_an_agent_by_itself_and_says_so(
    start_step: StartStep, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = start_step()
    step.kill()
    step.wait()
    trainer = Trainer()
    agent = trainer.client.status()["pid"]
    assert parent_of(agent) != step.pid
    assert "did not start an agent (" in caplog.text
    assert "starts one itself" in caplog.text
    trainer.client.close(keep=False)


def test_a_step_that_was_asked_to_finish_starts_no_more_agents(
    start_step: StartStep, trainers: Callable[[], tuple["subprocess.Popen[str]", int]], step_path: Path
) -> None:
    step = start_step()
    trainers()  # keeps the step from ending
    step.terminate()
    request = {"op": "start", "folder": "/nowhere", "executable": sys.executable, "environment": {}, "patience_s": 5}

    def refused() -> str:
        try:
            ask(step_path, request, within_s=10)
        except LevelFailed as error:
            return str(error)
        return ""

    deadline = time.monotonic() + 10
    while "asked to finish" not in refused():
        assert time.monotonic() < deadline


def test_an_agent_that_cannot_start_is_told_with_its_own_words(start_step: StartStep, step_path: Path) -> None:
    start_step()
    folder = address_of("run", None).folder
    folder.parent.mkdir(mode=0o755)
    request = {
        "op": "start",
        "folder": str(folder),
        "executable": sys.executable,
        "environment": dict(os.environ),
        "patience_s": 20,
    }
    with pytest.raises(LevelFailed, match="is not a folder private to user"):
        ask(step_path, request, within_s=30)
    with pytest.raises(LevelFailed, match="/no/such/python could not be run on this node"):
        ask(step_path, {**request, "executable": "/no/such/python"}, within_s=30)


@pytest.mark.parametrize(
    "frame",
    [
        encode({"op": "start", "id": 1}),
        encode({"op": "start", "folder": "/x", "executable": "/x", "environment": {"A": 1}, "patience_s": 1, "id": 1}),
        encode({"op": "start", "folder": "/x", "executable": "/x", "environment": {}, "patience_s": -1, "id": 1}),
        encode({"op": "dance", "id": 1}),
        b"\x00\x00\x00\x02[]",
        b"\xff\xff\xff\xff",
    ],
)
def test_a_request_that_is_none_ends_the_connection_and_not_the_step(
    start_step: StartStep, step_path: Path, frame: bytes
) -> None:
    start_step()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(step_path))
        sock.sendall(frame)
        with contextlib.suppress(ConnectionResetError):
            assert receive(sock) is None
    assert agents_of(step_path) == []


def test_the_socket_is_private_and_a_folder_of_everybody_is_refused(start_step: StartStep, step_path: Path) -> None:
    start_step()
    assert stat.S_IMODE(step_path.parent.stat().st_mode) == 0o700
    with pytest.raises(UsageError, match="another agent step listens"):
        AgentStep(step_path).run()
    open_folder = Path(tempfile.mkdtemp(prefix="rs-"))
    open_folder.chmod(0o755)
    try:
        with pytest.raises(UsageError, match="is not a folder private to user"):
            AgentStep(open_folder / "agents.sock").run()
        with pytest.raises(UsageError, match="too long for a socket"):
            AgentStep(open_folder / ("a" * 120)).run()
    finally:
        shutil.rmtree(open_folder)


def test_detached_it_prints_the_line_for_a_shell_and_stays(step_path: Path) -> None:
    command = [sys.executable, "-m", "resilient.launch.cli", "agent", "--socket", str(step_path)]
    printed = subprocess.run([*command, "--detach"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed == f"export {VARIABLE}={step_path}\n"
    assert agents_of(step_path) == []
    finished = subprocess.run([*command, "--finish"], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    again = subprocess.run([*command, "--finish"], capture_output=True, text=True, timeout=60, check=False)
    assert (again.returncode, again.stderr) == (0, f"no agent step is at {step_path}: there is nothing to wait for\n")


def test_the_decision_follows_from_what_is_known() -> None:
    def action(**facts: object) -> str:
        return decide(replace(SERVING, **facts)).action  # type: ignore[arg-type]

    assert action() == "serve"
    assert action(living=0) == "serve"
    assert action(living=0, until_done=True) == "end"
    assert action(living=0, started=0, until_done=True) == "serve"  # nobody has come yet
    assert action(asked_s=0.0, living=0) == "end"
    assert action(asked_s=59.0) == "finish"
    assert action(asked_s=60.0) == "stop"
    assert action(asked_s=1.0, hurried=True) == "stop"
    assert action(asked_s=60.0 + STOP_S) == "kill"
