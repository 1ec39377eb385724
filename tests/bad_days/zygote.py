"""Forks processes that have imported torch already, so that a test can have dozens of real ones and kill them.

Run as `python zygote.py <checkout>`; one JSON request a line on stdin, one process id a line on stdout. A forked
process runs `module:function(**arguments)`, writes what it returned (or its error) to a file, and ends as any Python
process does. `conftest.py` has the other end.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    sys.path.append(sys.argv[1])
    importlib.import_module("tests.bad_days.jobs").Training()  # torch imports much more with the first optimizer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; the test watches by pidfd
    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _work(request)
            return
        print(pid, flush=True)


def _work(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    module, _, name = request["function"].partition(":")
    answer: dict[str, Any]
    try:
        answer = {"value": getattr(importlib.import_module(module), name)(**request["arguments"])}
    except BaseException as error:  # whatever it is, the test has to see it
        traceback.print_exc()
        answer = {"error": type(error).__name__, "message": str(error)}
    result = Path(request["result"])
    unfinished = result.with_suffix(".part")
    unfinished.write_text(json.dumps(answer))
    unfinished.rename(result)


if __name__ == "__main__":
    main()
