"""`resilient run` with real launchers, ranks and kills: what comes back, how far, and what the operator reads."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from examples.steplog import read_steps
from tests.multiprocess.launched import (
    DEADLINE_S,
    JOB,
    Launched,
    Meet,
    Start,
    agents,
    free_port,
    listens,
    meet,
    progress,
    start,
    wait_for,
)

__all__ = ["meet", "start"]  # fixtures
GPT = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"
Eventually = Callable[..., None]


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
    token = token_of(first)
    assert [words for words in command_lines() if token in words] == []
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
    last = first.output.splitlines()[-1]
    assert f"; life 1 began at step {running['restored_step']} from memory, {running['steps_lost']} step" in last
    assert len(agents(runtime_dir)) == 1

    again = start(disturbed, *command)  # whose first life is past the step of the kill
    assert again.wait() == 0, again.output
    [running] = again.told("running")[1:]
    assert (running["restored_step"], running["levels"]) == (stopped["step"], "memory")
    same = ("weights", "optimizer")
    assert [result_of(disturbed)[key] for key in same] == [result_of(calm)[key] for key in same]
    written = [path for path in (*tmp_path.rglob("*"), *runtime_dir.rglob("*")) if path.is_file()]
    assert [path for path in written if token.encode() in path.read_bytes()] == []
    eventually(lambda: agents(runtime_dir) == [], "no agent is left")
    assert list(runtime_dir.rglob("launcher")) == []


def token_of(launched: Launched) -> str:
    """The secret that the launcher has made, from the environment of a worker."""
    variables = Path(f"/proc/{launched.workers()[0]}/environ").read_bytes().split(b"\0")
    [token] = [value.partition(b"=")[2] for value in variables if value.startswith(b"RESILIENT_TOKEN=")]
    assert len(token) > 20
    return token.decode()


def command_lines() -> Iterator[str]:
    """Of all processes: what `ps` shows to every user of the machine."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield entry.read_bytes().decode(errors="replace")


@pytest.mark.timeout(400)
def test_a_job_goes_on_without_a_node_that_was_killed_and_stops_at_a_step_to_take_one_in(
    tmp_path: Path, meet: Meet, eventually: Eventually
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
    tmp_path: Path, meet: Meet, eventually: Eventually
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


@pytest.mark.timeout(200)
def test_a_launcher_that_is_killed_takes_its_workers_along_and_the_next_goes_on_from_memory(
    tmp_path: Path, start: Start, eventually: Eventually
) -> None:
    command = ["--nproc-per-node", "2", str(JOB), str(tmp_path)]
    first = start(tmp_path, *command)
    eventually(lambda: len(progress(tmp_path)) > 5, "some steps", DEADLINE_S)
    workers = first.workers()
    assert len(workers) == 2
    first.process.kill()
    first.process.wait()
    eventually(lambda: not any(map(runs, workers)), "its workers end", DEADLINE_S)
    done = progress(tmp_path)[-1][2]
    again = start(tmp_path, *command)
    eventually(lambda: progress(tmp_path)[-1][2] > done, "a step more", DEADLINE_S)
    (tmp_path / "end").touch()
    assert again.wait() == 0, again.output
    [running] = again.told("running")
    assert running["levels"] == "memory"
    assert running["restored_step"] >= done - 3  # what was on its way into memory may be lost
    assert f"; life 0 began at step {running['restored_step']} from memory, " in again.output.splitlines()[-1]


def runs(pid: int) -> bool:
    """Whether it is neither gone nor a zombie that nobody takes in."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.timeout(200)
def test_plain_torchrun_goes_on_without_a_node_that_was_killed(
    tmp_path: Path, start: Start, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESILIENT_TOKEN", "a secret that the nodes share")
    port = free_port()
    options = ["--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-id", "mine"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    options += ["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=2", str(JOB), str(tmp_path)]
    first = start(tmp_path, *options, of="torch.distributed.run")
    wait_for(lambda: listens(port), first)
    second = start(tmp_path, *options, node="n2", of="torch.distributed.run")
    eventually(lambda: any(world == 2 and step > 4 for _, world, step in progress(tmp_path)), "step 5", DEADLINE_S)
    second.kill()
    eventually(lambda: progress(tmp_path)[-1][1] == 1, "a step without it", DEADLINE_S)
    (tmp_path / "end").touch()
    assert first.wait() == 0, first.output
    done = [step for _, world, step in progress(tmp_path) if world == 2][-1]
    again = next(step for life, world, step in progress(tmp_path) if (life > 0, world) == (True, 1))
    assert done - 3 <= again <= done + 1  # from the newest snapshot; what was on its way into memory may be lost
