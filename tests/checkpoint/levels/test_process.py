"""Telling a living process from a dead one and from another with the same number."""

import os
import subprocess
import sys

from resilient.checkpoint.levels.process import is_dead, this_process


def test_this_process_is_alive_and_always_the_same() -> None:
    me = this_process()
    assert me == this_process()
    assert me.pid == os.getpid()
    assert not is_dead(me.pid, me.started)


def test_a_number_that_was_given_to_another_process_is_dead() -> None:
    me = this_process()
    assert is_dead(me.pid, me.started + 1)


def test_a_process_that_only_waits_to_be_reaped_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.read()  # its end of the pipe closes when it is dead
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(process.pid, 1)
    process.wait()
    process.stdout.close()
    assert is_dead(process.pid, 1)


def test_the_first_process_of_the_system_is_not_ours_and_alive() -> None:
    with open("/proc/1/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    assert not is_dead(1, started)
