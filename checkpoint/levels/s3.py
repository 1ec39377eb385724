"""One object written to S3 (or a server that speaks it) as a multipart upload, part by part.

An object becomes visible with the last request only. A part that fails is sent again by itself; the parts that went
through stay. When a part fails for good the upload is aborted, so that nothing is left to pay for; what a writer that
was killed has left behind, the next upload of a process under the same name aborts, of whatever step. Each object
carries a random token as metadata, for one question that S3 leaves open: whether a request whose answer was lost has
been done. See https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html. Reading and listing are in
`remote.py`.
"""

import errno
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from threading import Event, Lock
from typing import Any

from resilient.checkpoint.levels.patience import Calls
from resilient.errors import LevelFailed

MOST_PARTS = 10_000
LEAST_PART_BYTES = 5 << 20
PARTS_UNDER_WAY = 4
_TOKEN = "resilient-write"
_lock = Lock()
_under_way: set[str] = set()  # ids of this process' uploads
_looked_for: set[tuple[str, str, str]] = (
    set()
)  # buckets, folders above and names whose abandoned uploads this process has looked for


def cut(chunks: Iterable[memoryview], part_bytes: int) -> Iterator[bytes]:
    """The same bytes in parts of equal size, the last one shorter; at least one part, if an empty one."""
    held: list[memoryview] = []
    room = part_bytes
    given = False
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            if not room:
                yield b"".join(held)
                held, room, given = [], part_bytes, True
            held.append(view[:room])
            view, room = view[room:], room - len(held[-1])
    if held or not given:
        yield b"".join(held)


class S3Write:
    """One write of one object; `run` once. The calling thread blocks; up to PARTS_UNDER_WAY more carry parts."""

    def __init__(self, calls: Calls, path: str, *, part_bytes: int, exclusive: bool) -> None:
        bucket, _, key = path.partition("/")
        self._calls = calls
        self._path = path
        self._target = {"Bucket": bucket, "Key": key}
        self._part_bytes = part_bytes
        self._exclusive = exclusive
        self._condition = {"IfNoneMatch": "*"} if exclusive else {}
        self._token = secrets.token_hex(16)
        self._stop = Event()

    def run(self, chunks: Iterable[memoryview]) -> None:
        """Write the object. Holds at most PARTS_UNDER_WAY + 2 parts in memory.

        Raises LevelFailed, FileExistsError if it is there and `exclusive`, and what the iterator raises.
        """
        if self._exclusive and self._head() is not None:
            raise FileExistsError(errno.EEXIST, "there already", self._calls.where)
        parts = cut(chunks, self._part_bytes)
        first = next(parts)
        second = next(parts, None)
        if second is None:
            self._last_request("put_object", first, **self._metadata())
        else:
            self._multipart(first, second, parts)

    def _multipart(self, first: bytes, second: bytes, rest: Iterator[bytes]) -> None:
        self._abort_abandoned()
        upload = self._request("create_multipart_upload", **self._target, **self._metadata())["UploadId"]
        with _lock:
            _under_way.add(upload)
        try:
            sent = self._send(upload, first, second, rest)
            self._last_request("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": sent})
        except BaseException:
            with suppress(LevelFailed):  # best effort: the first error is the one that matters
                self._request("abort_multipart_upload", **self._target, UploadId=upload)
            raise
        finally:
            with _lock:
                _under_way.discard(upload)

    def _abort_abandoned(self) -> None:
        """Abort what dead writers of this name have begun, in this folder and in those beside it; once in a process.

        One process at a time writes a name (`claim.py`). Best effort: a server may not let us look.
        """
        bucket, key = self._target["Bucket"], self._target["Key"]
        above, name = _around(key)
        with _lock:
            if (bucket, above, name) in _looked_for:
                return
            _looked_for.add((bucket, above, name))
        with suppress(Exception):  # whatever a server says to this, the image can be written all the same
            found = self._once("list_multipart_uploads", Bucket=bucket, Prefix=f"{above}/" if above else "")
            for upload in found.get("Uploads") or ():
                if _around(upload["Key"]) == (above, name) and upload["UploadId"] not in _under_way:
                    abandoned = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._once("abort_multipart_upload", **abandoned)

    def _send(self, upload: str, first: bytes, second: bytes, rest: Iterator[bytes]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        under_way: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(PARTS_UNDER_WAY, thread_name_prefix="resilient-part") as pool:
            try:
                for number, part in enumerate(_chain(first, second, rest), 1):
                    self._check_count(number)
                    if len(under_way) == PARTS_UNDER_WAY:
                        sent.append(under_way.popleft().result())
                    under_way.append(pool.submit(self._send_part, upload, number, part))
                sent.extend(future.result() for future in under_way)
            except BaseException:
                self._stop.set()  # the other parts give up at their next failure
                for future in under_way:
                    future.cancel()
                raise
        return sent

    def _send_part(self, upload: str, number: int, part: bytes) -> dict[str, Any]:
        request = {**self._target, "UploadId": upload, "PartNumber": number}

        # aiohttp asks for large bodies as files; each attempt reads its own from the beginning.
        def attempt() -> dict[str, Any]:
            return self._once("upload_part", **request, Body=BytesIO(part))

        done = self._calls.retry("upload_part", attempt, stop=self._stop, answers=())
        return {"PartNumber": number, "ETag": done["ETag"]}

    def _check_count(self, number: int) -> None:
        if number > MOST_PARTS:
            raise LevelFailed(
                errno.EFBIG,
                f"{self._calls.where}: more than {MOST_PARTS} parts of {self._part_bytes} bytes, the most that S3 "
                f"takes; open the store with larger part_bytes",
            )

    def _last_request(self, method: str, body: bytes | None = None, **kwargs: Any) -> None:
        """The request that makes the object visible, repeated until it is known to have been done, or not."""

        def attempt() -> None:
            data = {} if body is None else {"Body": BytesIO(body)}
            try:
                self._once(method, **self._target, **data, **kwargs, **self._condition)
            except Exception as error:  # of whatever kind: the answer may be lost although the work is done
                if self._is_ours():
                    return
                if error_code(error) == "NotImplemented" and self._condition:
                    self._condition = {}  # such a server leaves us with the look before
                if error_code(error) == "PreconditionFailed" or isinstance(error, FileExistsError):
                    raise FileExistsError(errno.EEXIST, "there already", self._calls.where) from error
                raise

        self._calls.retry(method, attempt, answers=(FileExistsError,))

    def _is_ours(self) -> bool:
        """Whether the object that is there now is the one this write put there."""
        try:
            head = self._once("head_object", **self._target)
        except Exception:  # not there, or the store is out of reach: not known to be ours
            return False
        return bool(head.get("Metadata", {}).get(_TOKEN) == self._token)

    def _head(self) -> dict[str, Any] | None:
        try:
            return self._calls.retry("head_object", lambda: self._once("head_object", **self._target))
        except FileNotFoundError:
            return None

    def _request(self, method: str, **kwargs: Any) -> dict[str, Any]:
        return self._calls.retry(method, lambda: self._once(method, **kwargs), answers=())

    def _once(self, method: str, **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._calls.once("call_s3", method, **kwargs)
        return answer

    def _metadata(self) -> dict[str, Any]:
        return {"Metadata": {_TOKEN: self._token}}


def error_code(error: BaseException | None) -> str:
    """S3's own code for an error ("NoSuchKey"), wherever in the chain of causes it is; "" if there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _around(key: str) -> tuple[str, str]:
    """What is above the folder of an object, and the object's name."""
    folder, _, name = key.rpartition("/")
    return folder.rpartition("/")[0], name


def _chain(first: bytes, second: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield second
    yield from rest
