"""`resilient run` with real launchers, ranks and kills: what comes back, how far, and what the operator reads."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from examples.steplog import read_steps

ROOT = Path(__file__).resolve().parents[2]
GPT = ROOT / "examples" / "train_gpt.py"
JOB = Path(__file__).with_name("run_job.py")
DEADLINE_S = 100.0
Eventually = Callable[..., None]


class Launched:
    """A launcher that runs, in a session of its own, and what it and its workers print."""

    def __init__(self, folder: Path, *arguments: str, node: str = "n1") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.node = node
        self.logs = folder / "logs"
        self._output = folder / f"{node}.txt"
        command = [sys.executable, "-m", "resilient.launch.cli", "run", "--log-dir", str(self.logs), *arguments]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"RESILIENT_NODE": node, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def told(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind that this node's launcher has left."""
        path = self.logs / f"resilient-{self.node}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [told for told in map(json.loads, lines) if told["event"] == event]

    def wait(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.node} did not end:\n{self.output}")

    def workers(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(entry.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(entry.parent.name))
        return found

    def leads(self) -> bool:
        """Whether rank 0 is one of its workers."""
        variables = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in self.workers()]
        return any(b"RANK=0" in each for each in variables)

    def kill(self) -> None:
        """As when the node goes: launcher and workers at once."""
        for pid in (self.process.pid, *self.workers()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Launched]


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Start]:
    """Starts launchers, and ends what is left of them."""
    started: list[Launched] = []

    def begin(folder: Path, *arguments: str, node: str = "n1") -> Launched:
        started.append(Launched(folder, *arguments, node=node))
        return started[-1]

    yield begin
    for launched in started:
        launched.kill()
    for pid in agents(runtime_dir):
        os.kill(pid, signal.SIGKILL)


def agents(runtime_dir: Path) -> list[int]:
    """Processes of agents whose folders are in there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"resilient.checkpoint.agent" in (words := entry.read_bytes()) and str(runtime_dir).encode() in words:
                found.append(int(entry.parent.name))
    return found


def gpt(folder: Path, *arguments: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    urls = ["--url", str(folder / "run"), "--result", str(folder / "result.json"), "--durable-every", "0"]
    return [str(GPT), "--steps", "12", *urls, *arguments]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def steps_of(folder: Path) -> list[int]:
    path = folder / "result.json.steps"
    return [step.step for step in read_steps(path)] if path.exists() else []


@pytest.mark.timeout(400)
def test_a_killed_rank_and_a_preempted_job_go_on_and_end_with_the_same_bits(
    tmp_path: Path, start: Start, eventually: Eventually, runtime_dir: Path
) -> None:
    calm = tmp_path / "calm"
    assert start(calm, "--nproc-per-node", "2", *gpt(calm)).wait() == 0

    disturbed = tmp_path / "disturbed"
    command = ["--nproc-per-node", "2", *gpt(disturbed, "--die-at-step", "4", "--die-rank", "1")]
    first = start(disturbed, *command)
    eventually(lambda: 5 in steps_of(disturbed), "step 5, after the kill", DEADLINE_S)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.output

    [failed] = first.told("restart")
    assert (failed["failure"]["rank"], failed["failure"]["exit_code"]) == (1, -signal.SIGKILL)
    assert "rank 1 on n1" in failed["text"]
    assert "was killed by SIGKILL" in failed["text"]
    [running] = first.told("running")
    assert running["levels"] == "memory"
    assert running["steps_lost"] <= 1
    [stopped] = first.told("preempted")
    assert stopped["step"] >= 5
    assert len(agents(runtime_dir)) == 1

    again = start(disturbed, *command)  # whose first life is past the step of the kill
    assert again.wait() == 0, again.output
    [running] = again.told("running")[1:]
    assert (running["restored_step"], running["levels"]) == (stopped["step"], "memory")
    same = ("weights", "optimizer")
    assert [result_of(disturbed)[key] for key in same] == [result_of(calm)[key] for key in same]
    eventually(lambda: agents(runtime_dir) == [], "no agent is left")
    assert list(runtime_dir.rglob("launcher")) == []


def progress(folder: Path) -> list[tuple[int, int, int]]:
    """Life, world size and number of each step that rank 0 has done."""
    path = folder / "progress"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(life), int(world), int(step)) for life, world, step in map(str.split, lines)]


class Nodes:
    """Starts the same command on nodes of one job, which meet at a rendezvous of its own: any node may be killed."""

    def __init__(self, folder: Path, count: str, start: Start) -> None:
        command = [sys.executable, "-m", "resilient.launch.cli", "rendezvous", "127.0.0.1:0"]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._server.stderr is not None
        endpoint = self._server.stderr.readline().split()[-1]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
        sooner = ["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=1"]
        self._options = ["--nnodes", count, "--nproc-per-node", "1", *meeting, *sooner]
        self._start = start
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._server:
            self._server.terminate()
            assert self._server.wait(DEADLINE_S) == 0

    def start(self, node: str, *command: str) -> Launched:
        job = command or (str(JOB), str(self._folder))
        return self._start(self._folder, *self._options, *job, node=node)


@pytest.fixture
def meet(tmp_path: Path, start: Start) -> Iterator[Callable[[str], Nodes]]:
    """`meet("1:3")`: nodes of a job that may have so many."""
    with ExitStack() as open_:
        yield lambda count: open_.enter_context(Nodes(tmp_path, count, start))


@pytest.mark.timeout(400)
def test_a_job_goes_on_without_a_node_that_was_killed_and_stops_at_a_step_to_take_one_in(
    tmp_path: Path, meet: Callable[[str], Nodes], eventually: Eventually
) -> None:
    nodes = meet("1:3")
    first = nodes.start("n1")
    second = nodes.start("n2")  # perhaps late: then the first begins without it
    eventually(lambda: any(world == 2 and step > 4 for _, world, step in progress(tmp_path)), "step 5", DEADLINE_S)
    second.kill()
    alone = running_life(first, "without n2")
    assert alone["steps_lost"] <= 2
    third = nodes.start("n3")
    together = running_life(first, "with n3")
    regrouped = first.told("regroup")[-1]
    assert (together["restored_step"], together["steps_lost"]) == (regrouped["step"], 0)
    eventually(lambda: progress(tmp_path)[-1][1] == 2, "a step with the new node", DEADLINE_S)
    steps = [step for _, _, step in progress(tmp_path)]
    assert steps[-1] <= len(steps) <= steps[-1] + 3  # none was left out, few were done again
    (tmp_path / "end").touch()
    assert (first.wait(), third.wait()) == (0, 0), first.output + third.output
    assert len(first.told("restart")) == 1


def running_life(launched: Launched, words: str) -> dict[str, Any]:
    """What the launcher tells of the life of which it says that; waits for it."""

    def found() -> list[dict[str, Any]]:
        return [told for told in launched.told("running") if words in told["text"]]

    wait_for(lambda: bool(found()), launched)
    return found()[-1]


@pytest.mark.timeout(400)
def test_a_spare_steps_in_for_the_node_of_rank_0_and_a_signal_to_it_stops_all(
    tmp_path: Path, meet: Callable[[str], Nodes], eventually: Eventually
) -> None:
    nodes = meet("2")
    launched = {node: nodes.start(node) for node in ("n1", "n2")}
    eventually(lambda: len(progress(tmp_path)) > 2, "some steps", DEADLINE_S)
    spare = nodes.start("n3")
    lost = next(node for node, each in launched.items() if each.leads())
    launched.pop(lost).kill()
    [stayed] = launched.values()
    running = running_life(stayed, f"without {lost}, with n3")
    assert running["steps_lost"] <= 2
    spare.process.send_signal(signal.SIGTERM)  # one launcher hears it, the ranks of all nodes stop
    assert (stayed.wait(), spare.wait()) == (75, 75), stayed.output + spare.output
    assert stayed.told("preempted")[0]["safe_step"] == spare.told("preempted")[0]["safe_step"]


def a_script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_script_that_fails_at_once_is_tried_again_and_its_error_shown(tmp_path: Path, start: Start) -> None:
    text = "from torch.distributed.elastic.multiprocessing.errors import record\n"
    text += "@record\ndef main():\n    raise ValueError('no such data')\nmain()\n"
    launched = start(tmp_path, "--max-restarts", "1", a_script(tmp_path, text))
    assert launched.wait() == 1
    assert launched.output.count("ValueError: no such data\n") == 2
    last = launched.output.splitlines()[-1]
    assert "rank 0 on n1" in last
    assert "failed with exit code 1 (ValueError: no such data)" in last
    assert "giving up (exit code 1)" in last
    assert [told["life"] for told in launched.told("restart") + launched.told("give up")] == [0, 1]


def test_a_second_launcher_of_the_same_run_on_a_node_is_told_so(tmp_path: Path, start: Start) -> None:
    script = a_script(tmp_path, "import signal\nsignal.pause()\n")
    first = start(tmp_path / "first", "--rdzv-id", "mine", script)
    wait_for(lambda: bool(first.workers()), first)
    second = start(tmp_path / "second", "--rdzv-id", "mine", script)
    assert second.wait() == 2
    assert f"the run 'mine' is already running on this node, under process {first.process.pid}" in second.output
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75  # start it again: nothing was lost, for nothing was done
    assert "SIGTERM came before any rank had made its Checkpointer" in first.output


def wait_for(condition: Callable[[], bool], launched: Launched) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, launched.output
        time.sleep(0.02)


def test_two_commands_that_meet_in_one_rendezvous_are_told_so(tmp_path: Path, meet: Callable[[str], Nodes]) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for script in (one, other):
        script.touch()
    nodes = meet("2")
    launched = [nodes.start("n1", "--rdzv-id", "mine", str(one)), nodes.start("n2", "--rdzv-id", "mine", str(other))]
    for node in launched:
        assert node.wait() == 2
        assert "two different commands met in one rendezvous (on n1, n2)" in node.output


def test_an_interrupt_given_twice_ends_workers_that_do_not_listen(tmp_path: Path, start: Start) -> None:
    ignores = "for name in (signal.SIGUSR1, signal.SIGTERM):\n    signal.signal(name, signal.SIG_IGN)\n"
    waits = f"open({str(tmp_path / 'ready')!r}, 'w').close()\nwhile True:\n    signal.pause()\n"
    text = f"import signal\n{ignores}{waits}"
    launched = start(tmp_path, "--shutdown-timeout", "0", a_script(tmp_path, text))
    wait_for(lambda: (tmp_path / "ready").exists(), launched)
    launched.process.send_signal(signal.SIGINT)
    wait_for(lambda: bool(launched.told("stopping")), launched)
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait() == 130
    assert "was stopped" in launched.output


def test_a_launcher_that_waits_for_other_nodes_ends_at_once_when_it_is_asked_to(tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    launched = start(tmp_path, *meeting, a_script(tmp_path, ""))
    wait_for(lambda: listens(port), launched)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 75
    assert "SIGTERM while n1 waited for other nodes" in launched.output


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
