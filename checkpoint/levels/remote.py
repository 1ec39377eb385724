"""A store behind any fsspec URL: S3 above all, and whatever else fsspec has a package for.

How a write becomes visible in one step depends on what the service offers, by protocol:

- s3, s3a: a multipart upload (`s3.py`), each part retried by itself; `exclusive` is If-None-Match, decided by the
  server (a few servers ignore it: for them, and below, it is a look before the write);
- other object stores (`ATOMIC_PUT`) and objects of one part: one put, retried;
- everything else: a stream to a hidden temporary name, then a move. The stream is not retried; and where a move does
  not replace its target, overwriting removes the old file a moment before.

fsspec's listings cache is off: other processes write to the same place. Local folders are better served by `files.py`.
"""

import errno
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any

from resilient.checkpoint.levels.patience import Calls
from resilient.checkpoint.levels.s3 import LEAST_PART_BYTES, S3Write, cut, error_code
from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, LevelFailed

PART_BYTES = 32 << 20
RANGE_BYTES = 8 << 20
CONCURRENCY = 8
S3_PROTOCOLS = frozenset({"s3", "s3a"})
ATOMIC_PUT = frozenset({"memory", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "cos", "obs", "tos"})
_looking = Lock()  # makes the look before an exclusive write atomic within this process


class RemoteStore(Store):
    """Names below a URL. Any thread; each request has `timeout_s`, and failed ones are repeated up to `retries` times.

    `storage_options` go to fsspec (endpoint, credentials). A URL's parent (a bucket) has to exist. Building a store
    sends nothing; it raises ValueError for an unknown protocol and ImportError for a missing package (`open.py`
    explains both).
    """

    def __init__(
        self,
        url: str,
        *,
        retries: int = 5,
        timeout_s: float = 60.0,
        part_bytes: int = PART_BYTES,
        storage_options: dict[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import fsspec
        from fsspec.utils import get_protocol

        self.url = url.rstrip("/")
        self.protocol = get_protocol(url)
        if self.protocol in S3_PROTOCOLS and part_bytes < LEAST_PART_BYTES:
            raise ValueError(f"part_bytes is {part_bytes}; S3 takes no parts below {LEAST_PART_BYTES} bytes")
        options = {"use_listings_cache": False, "skip_instance_cache": True, **(storage_options or {})}
        if self.protocol in S3_PROTOCOLS:
            options["config_kwargs"] = _s3_config(timeout_s) | options.get("config_kwargs", {})
        self.fs, root = fsspec.core.url_to_fs(url, **options)
        if self.protocol in S3_PROTOCOLS:
            self.fs.retries = 1  # repeating is done here, and once is enough
        self._root = root.rstrip("/")
        self._retries, self._timeout_s, self._part_bytes, self._sleep = retries, timeout_s, part_bytes, sleep

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        """See Store. Chunks must not change until this returns."""
        calls, path = self._calls(name), self._path(name)
        if self.protocol in S3_PROTOCOLS:
            S3Write(calls, path, part_bytes=self._part_bytes, exclusive=exclusive).run(chunks)
        elif exclusive:
            with _looking:
                if self._info(calls, path) is not None:
                    raise FileExistsError(errno.EEXIST, "there already", calls.where)
                self._write(calls, path, chunks)
        else:
            self._write(calls, path, chunks)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """See Store. Ranges above RANGE_BYTES are fetched several at a time."""
        calls, path, view = self._calls(name), self._path(name), memoryview(into).cast("B")
        starts = range(0, len(view), RANGE_BYTES)
        if len(starts) <= 1:
            self._read(calls, path, offset, view)
            return
        with ThreadPoolExecutor(min(CONCURRENCY, len(starts)), thread_name_prefix="resilient-read") as pool:
            pieces = (view[start : start + RANGE_BYTES] for start in starts)
            for done in [
                pool.submit(self._read, calls, path, offset + s, p) for s, p in zip(starts, pieces, strict=True)
            ]:
                done.result()

    def size(self, name: str) -> int:
        calls = self._calls(name)
        info = self._info(calls, self._path(name))
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "not there", calls.where)
        return int(info["size"])

    def list(self, folder: str = "") -> list[str]:
        folder = folder.strip("/")
        below = self._path(folder) if folder else self._root
        try:
            found = self._calls(folder).run("find", below)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (path.removeprefix(f"{self._root}/") for path in found if path.startswith(f"{below}/"))
        return sorted(name for name in names if not _hidden(name))

    def delete(self, names: Iterable[str]) -> None:
        """See Store. Several at a time, in no order: delete in two calls what has to go in order."""
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="resilient-delete") as pool:
            for _ in pool.map(self._delete, names):
                pass

    def _delete(self, name: str) -> None:
        calls, path = self._calls(name), self._path(name)
        with suppress(FileNotFoundError, NotADirectoryError):
            calls.run("rm_file", path)
        if self.protocol not in S3_PROTOCOLS | ATOMIC_PUT:
            self._remove_empty(calls, path.rpartition("/")[0])

    def _remove_empty(self, calls: Calls, folder: str) -> None:
        while len(folder) > len(self._root):
            try:
                calls.once("rmdir", folder)
            except Exception:  # not empty, gone, or folders are not removed there: all are in order
                return
            folder = folder.rpartition("/")[0]

    def _write(self, calls: Calls, path: str, chunks: Iterable[memoryview]) -> None:
        parts = cut(chunks, self._part_bytes)
        first = next(parts)
        second = next(parts, None)
        if second is None and self.protocol in ATOMIC_PUT:
            calls.do("pipe_file", path, first)
            return
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name[:120]}.{secrets.token_hex(8)}.part"
        try:
            self._stream(calls, temporary, chain([first], [] if second is None else [second], parts))
            self._move(calls, temporary, path)
        except BaseException:
            with suppress(LevelFailed):  # best effort: the first error is the one that matters
                calls.do("rm_file", temporary)
            raise

    def _stream(self, calls: Calls, path: str, parts: Iterator[bytes]) -> None:
        if self.protocol not in ATOMIC_PUT:
            calls.do("makedirs", path.rpartition("/")[0], exist_ok=True)
        file = _tell(calls, "open", lambda: calls.timed("open", self.fs.open, path, "wb"))
        try:
            for part in parts:
                _tell(calls, "write", partial(calls.timed, "write", file.write, part))
        except BaseException:
            with suppress(Exception):  # the file is only closed to free what it holds, then removed
                calls.timed("close", file.close)
            raise
        _tell(calls, "close", lambda: calls.timed("close", file.close))

    def _move(self, calls: Calls, source: str, target: str) -> None:
        def attempt() -> None:
            try:
                calls.once("mv", source, target)
            except FileExistsError:
                calls.once("rm_file", target)
                calls.once("mv", source, target)

        calls.retry("mv", attempt, answers=())

    def _read(self, calls: Calls, path: str, offset: int, view: memoryview) -> None:
        def attempt() -> None:
            data = self._range(calls, path, offset, offset + len(view))
            if len(data) == len(view):
                view[:] = data
                return
            size = int(calls.once("info", path)["size"])
            if size < offset + len(view):
                raise DamagedImage(
                    f"{calls.where} ends {offset + len(view) - size} bytes early (at offset {offset}): "
                    f"use another snapshot or level"
                )
            raise OSError(errno.EIO, f"{len(data)} bytes came, {len(view)} were asked for")

        calls.retry("read", attempt)

    def _range(self, calls: Calls, path: str, start: int, stop: int) -> bytes:
        if start == stop:
            calls.once("info", path)
            return b""
        try:
            return bytes(calls.once("cat_file", path, start=start, end=stop))
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, "not there", calls.where) from error
        except OSError as error:
            if error_code(error) == "InvalidRange":  # the range begins behind the end
                return b""
            raise

    def _info(self, calls: Calls, path: str) -> dict[str, Any] | None:
        """What fsspec says of a file; None if there is no file."""
        try:
            info: dict[str, Any] = calls.run("info", path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info if info.get("type") == "file" else None

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise ValueError(f"{name!r} is no name for a store: relative, no hidden or empty parts")
        return f"{self._root}/{name}"

    def _calls(self, name: str) -> Calls:
        where = f"{self.url}/{name}"
        return Calls(self.fs, where, retries=self._retries, timeout_s=self._timeout_s, sleep=self._sleep)


def _tell(calls: Calls, what: str, attempt: Callable[[], Any]) -> Any:
    """One attempt whose failure is told as LevelFailed: a stream cannot be taken up again in the middle."""
    once = Calls(calls.fs, calls.where, retries=0, timeout_s=calls.timeout_s)
    return once.retry(what, attempt, answers=())


def _hidden(name: str) -> bool:
    return not name or name.endswith("/") or any(part.startswith(".") for part in name.split("/"))


def _s3_config(timeout_s: float) -> dict[str, Any]:
    return {
        "connect_timeout": min(10.0, timeout_s),
        "read_timeout": timeout_s,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 4 * CONCURRENCY,
    }
