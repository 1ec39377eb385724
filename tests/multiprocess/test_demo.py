"""The headline: the demo as a newcomer runs it, with fewer steps."""

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.mark.timeout(400)
def test_a_job_killed_in_mid_step_comes_back_from_memory_and_ends_with_the_same_bits() -> None:
    command = [sys.executable, str(DEMO), "--steps", "12", "--timeout-s", "180"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended with the same bits" in done.stdout
