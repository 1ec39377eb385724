"""How `resilient run` ends, and what its last line says: bad input, jobs that cannot run, signals, two of one name."""

import signal
from pathlib import Path

import pytest

from tests.multiprocess.launched import Meet, Start, a_script, free_port, listens, meet, start, wait_for
from tests.s3_server import BUCKET, READER, SECRET, S3Server, s3_server

__all__ = ["meet", "s3_server", "start"]  # fixtures


def test_a_script_that_fails_at_once_is_tried_again_and_its_error_shown(tmp_path: Path, start: Start) -> None:
    text = "from torch.distributed.elastic.multiprocessing.errors import record\n"
    text += "@record\ndef main():\n    raise ValueError('no such data')\nmain()\n"
    launched = start(tmp_path, "--max-restarts", "1", a_script(tmp_path, text))
    assert launched.wait() == 1
    assert launched.output.count("ValueError: no such data\n") == 2
    last = launched.output.splitlines()[-1]
    assert "rank 0 on n1" in last
    assert "failed with exit code 1 (ValueError: no such data)" in last
    assert last.endswith("giving up; nothing was restored, 0 steps lost in all (exit code 1)")
    assert [told["life"] for told in launched.told("restart") + launched.told("give up")] == [0, 1]


def test_a_url_without_rights_ends_the_job_at_once_with_what_the_service_said(
    tmp_path: Path, start: Start, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = "import torch\nfrom resilient import Checkpointer\n"
    text += "from torch.distributed.elastic.multiprocessing.errors import record\n"
    text += f"@record\ndef main():\n    Checkpointer('s3://{BUCKET}/run', {{'x': torch.zeros(4)}})\nmain()\n"
    launched = start(tmp_path, "--max-restarts", "0", a_script(tmp_path, text))
    assert launched.wait() == 1
    last = launched.output.splitlines()[-1]
    assert "rank 0 on n1" in last
    assert f"s3://{BUCKET}/run" in last
    assert "Access Denied" in last


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


def test_a_program_that_cannot_be_run_is_told_and_given_up(tmp_path: Path, start: Start) -> None:
    launched = start(tmp_path, "--max-restarts", "0", "--no-python", "/no/such/program")
    assert launched.wait() == 1
    assert "resilient run: /no/such/program cannot be run: No such file or directory" in launched.output
    assert "rank 0 on n1" in launched.output.splitlines()[-1]


def test_a_launcher_to_which_too_few_nodes_come_says_so_in_its_last_line(tmp_path: Path, start: Start) -> None:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launched = start(tmp_path, *meeting, "--rdzv-conf", "join_timeout=2", a_script(tmp_path, ""))
    assert launched.wait() == 4
    last = launched.output.splitlines()[-1]
    assert last.startswith("resilient: n1: fewer than 2 nodes came to 127.0.0.1:")
    assert last.endswith("; nothing was restored, 0 steps lost in all")


def test_two_commands_that_meet_in_one_rendezvous_are_told_so(tmp_path: Path, meet: Meet) -> None:
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
    port = free_port()
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    launched = start(tmp_path, *meeting, a_script(tmp_path, ""))
    wait_for(lambda: listens(port), launched)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 75
    assert "SIGTERM while n1 waited for other nodes" in launched.output
