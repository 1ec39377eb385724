"""The headline: the demo as a newcomer runs it, with fewer steps."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def start_demo(temporary: str, *arguments: str) -> "subprocess.Popen[str]":
    # Not pytest's folder: its name is longer than a Unix socket's may be.
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        env=os.environ | {"TMPDIR": temporary},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_naming(folder: str) -> list[str]:
    named = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if folder in command:
            named.append(command)
    return named


@pytest.mark.timeout(400)
def test_a_job_that_loses_a_trainer_and_then_a_node_comes_back_each_time_and_ends_with_the_same_bits() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        output, _ = start_demo(temporary, "--steps", "12", "--timeout-s", "180").communicate(timeout=390)
        assert "ended with the same bits" in output, output
        for row in ("blocked per save", "step without resilient", "step with a snapshot each"):
            assert row in output
        assert "recovery from a killed trainer" in output
        assert "recovery from a lost node" in output
        assert output.count(" parity") >= 1
        assert os.listdir(temporary) == []
        assert processes_naming(temporary) == []


@pytest.mark.timeout(400)
def test_an_interrupted_demo_leaves_no_process_and_no_folder() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        never = ("--die-at-step", "1000", "--lose-at-step", "1000")
        demo = start_demo(temporary, "--steps", "30", *never, "--timeout-s", "180")
        deadline = time.monotonic() + 180
        while not any(Path(temporary).glob("*/disturbed/result.json.steps")):
            assert time.monotonic() < deadline, "the second run made no step"
            with pytest.raises(subprocess.TimeoutExpired):
                demo.wait(0.1)
        assert any("resilient.checkpoint.agent" in command for command in processes_naming(temporary))
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
        assert demo.returncode == 130, output
        assert os.listdir(temporary) == []
        assert processes_naming(temporary) == []
