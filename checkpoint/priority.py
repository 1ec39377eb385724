"""Threads that make way for the training. Imports nothing of ours: the agent and the trainer both use it."""

import os
import threading
from contextlib import suppress


def run_behind(nice: int) -> None:
    """Let the calling thread run only where others leave room (Linux: a thread has a nice value of its own)."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a system that does not let us
        if os.getpriority(os.PRIO_PROCESS, thread) < nice:
            os.setpriority(os.PRIO_PROCESS, thread, nice)
