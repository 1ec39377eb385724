"""What any test may use: waiting with a deadline, a private folder for sockets, and imports from the checkout.

Only what many folders need stands here; a folder's own fixtures stand in its own conftest.py or test file. The
checkout is put last on the path, so that tests, and processes that they spawn, can import `tests.conformance...`,
`examples...` and `bench...`, while nothing of it hides an installed package. The library itself is installed.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))


# A shell starts what it puts into the background with SIGINT ignored, and every child inherits that: tests that
# interrupt a process would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """`eventually(condition, "what", deadline_s=20)`: polls until `condition()` is true; fails with "what" if late.

    For conditions in real processes only; code that can be given a clock is tested with one.
    """

    def wait(condition: Callable[[], object], what: str, deadline_s: float = 20.0) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not within {deadline_s:g} s: {what}")
            time.sleep(0.01)

    return wait


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private folder that RESILIENT_RUNTIME_DIR names; gone afterwards.

    Not below tmp_path: the path of a Unix socket is limited to 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    monkeypatch.setenv("RESILIENT_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
