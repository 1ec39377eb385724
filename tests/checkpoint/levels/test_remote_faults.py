"""S3 behind a proxy that loses, delays and cuts answers: each write ends well or with LevelFailed, in bounded time."""

import random
import secrets
import time
from collections.abc import Iterator
from io import BytesIO

import pytest

from resilient.checkpoint.levels.remote import RemoteStore
from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, LevelFailed
from tests.conformance.store_contract import get, put
from tests.s3_proxy import Fault, Proxy, Request
from tests.s3_server import BUCKET, S3Server, free_ports, s3_server

__all__ = ["s3_server"]  # a fixture

MIB = 1 << 20
PART = 5 * MIB
NAME = "step_00000001/image"
OLD = b"old"
LIMIT_S = 2.0


def no_sleep(seconds: float) -> None:
    """Pauses between attempts are tested where no real server is waited for."""


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def plain(s3_server: S3Server) -> RemoteStore:
    """The same place as `store`, without the proxy, and with an old object in it."""
    plain = s3_server.store(part_bytes=PART)
    put(plain, NAME, OLD)
    return plain


@pytest.fixture
def store(s3_server: S3Server, proxy: Proxy, plain: RemoteStore) -> RemoteStore:
    folder = plain.url.rpartition("/")[2]
    return s3_server.store(
        port=proxy.port, folder=folder, part_bytes=PART, retries=3, timeout_s=LIMIT_S, sleep=no_sleep
    )


def folder_of(store: RemoteStore) -> str:
    return store.url.rpartition("/")[2]


def image(parts: int = 3) -> bytes:
    return secrets.token_bytes((parts - 1) * PART + 1000)


def test_a_part_whose_connection_drops_is_sent_again_and_no_other(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy
) -> None:
    proxy.choose = lambda request: Fault(drop_after=MIB) if request.part == 2 and request.number == 0 else None
    data = image()
    put(store, NAME, data)
    assert get(plain, NAME) == data
    assert sorted(request.part for request in proxy.seen if request.part) == [1, 2, 2, 3]


@pytest.mark.parametrize("status", [500, 503])
def test_every_request_may_be_refused_twice(store: RemoteStore, plain: RemoteStore, proxy: Proxy, status: int) -> None:
    proxy.choose = lambda request: Fault(answer=status) if request.number < 2 else None
    data = image()
    put(store, NAME, data)
    assert get(store, NAME) == get(plain, NAME) == data
    assert store.list() == [NAME]
    store.delete([NAME])
    assert plain.list() == []


def test_a_server_that_refuses_every_part_fails_the_write_and_nothing_is_left(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy, s3_server: S3Server
) -> None:
    proxy.choose = lambda request: Fault(answer=503) if request.part else None
    with pytest.raises(LevelFailed, match="upload_part failed in 4 attempts"):
        put(store, NAME, image())
    assert get(plain, NAME) == OLD
    assert s3_server.unfinished_uploads(folder_of(plain)) == []


def test_a_server_that_never_answers_fails_every_operation_in_bounded_time(
    s3_server: S3Server, plain: RemoteStore, proxy: Proxy
) -> None:
    store = s3_server.store(port=proxy.port, folder=folder_of(plain), retries=1, timeout_s=1, sleep=no_sleep)
    proxy.choose = lambda request: Fault(hang=True)
    begin = time.monotonic()
    for operation in (
        lambda: put(store, NAME, b"new"),
        lambda: get(store, NAME),
        lambda: store.list(),
    ):
        with pytest.raises(LevelFailed, match="within 1 s"):
            operation()
    # Three operations of two attempts each; a write also asks after each of its own whether it was done after all.
    assert time.monotonic() - begin < 8 * (1 + 1) + 5
    assert get(plain, NAME) == OLD


def test_a_stalled_part_is_sent_again(store: RemoteStore, plain: RemoteStore, proxy: Proxy) -> None:
    proxy.choose = lambda request: Fault(hang=True) if request.part == 1 and request.number == 0 else None
    data = image()
    put(store, NAME, data)
    assert get(plain, NAME) == data


def test_a_slow_server_is_waited_for(store: RemoteStore, plain: RemoteStore, proxy: Proxy) -> None:
    proxy.choose = lambda request: Fault(delay_s=LIMIT_S / 8)
    data = image(2)
    put(store, NAME, data)
    assert get(plain, NAME) == data
    assert all(request.number == 0 for request in proxy.seen if request.part)


def test_a_completion_whose_answer_is_lost_counts_as_done(store: RemoteStore, plain: RemoteStore, proxy: Proxy) -> None:
    proxy.choose = lambda request: Fault(lose_answer=True) if request.completes else None
    data = image()
    put(store, NAME, data)
    assert get(plain, NAME) == data


@pytest.mark.parametrize("size", [100, PART + 100])
def test_an_exclusive_write_whose_answer_is_lost_counts_as_ours(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy, size: int
) -> None:
    def choose(request: Request) -> Fault | None:
        makes_visible = request.completes or (request.method == "PUT" and not request.part)
        return Fault(lose_answer=True) if makes_visible and request.number == 0 else None

    proxy.choose = choose
    put(store, "claim.json", bytes(size), exclusive=True)
    assert plain.size("claim.json") == size
    with pytest.raises(FileExistsError):
        put(store, "claim.json", b"x", exclusive=True)


def test_a_read_that_is_cut_short_is_asked_for_again(store: RemoteStore, plain: RemoteStore, proxy: Proxy) -> None:
    data = image(4)
    put(plain, NAME, data)
    proxy.choose = lambda request: (
        Fault(cut_answer_after=70_000) if request.method == "GET" and request.number == 0 else None
    )
    assert get(store, NAME) == data


def test_reads_that_are_always_cut_short_fail_the_level_and_are_not_called_damage(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy
) -> None:
    put(plain, NAME, image(2))
    proxy.choose = lambda request: Fault(cut_answer_after=70_000) if request.method == "GET" else None
    with pytest.raises(LevelFailed, match=NAME):
        get(store, NAME)


def test_a_server_that_is_not_there_is_told(s3_server: S3Server) -> None:
    store = s3_server.store(port=free_ports(1)[0], retries=1, timeout_s=LIMIT_S, sleep=no_sleep)
    with pytest.raises(LevelFailed, match="look at the store's service"):
        put(store, NAME, b"x")


@pytest.mark.parametrize("size", [10, PART + 10])
def test_a_bucket_that_is_not_there_is_told(s3_server: S3Server, size: int) -> None:
    store = RemoteStore(
        f"s3://absent-{BUCKET}/run",
        storage_options={**s3_server.options(), "secret": "wrong"},
        part_bytes=PART,
        retries=1,
        timeout_s=LIMIT_S,
        sleep=no_sleep,
    )
    with pytest.raises(LevelFailed, match="check the credentials"):
        put(store, NAME, bytes(size))


@pytest.mark.parametrize("seed", range(3))
def test_under_random_faults_the_old_or_the_new_object_is_visible(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy, s3_server: S3Server, seed: int
) -> None:
    chance = random.Random(seed)
    faults = [
        Fault(answer=500),
        Fault(answer=503),
        Fault(drop_after=100),
        Fault(drop_after=2 * MIB),
        Fault(lose_answer=True),
        Fault(cut_answer_after=50),
        Fault(delay_s=0.2),
    ]

    def choose(request: Request) -> Fault | None:
        return chance.choice(faults) if chance.random() < 0.35 else None

    held = OLD
    for _ in range(4):
        data = image(chance.choice([1, 2, 3]))
        proxy.choose = choose
        written = tried(store, data)
        seen = tried_to_read(store)
        proxy.choose = lambda request: None
        now = get(plain, NAME)
        assert now == data if written else now in (held, data)
        assert seen in (None, now)
        held = now


def uploads(store: RemoteStore) -> set[str]:
    """The keys of all uploads that were begun and neither completed nor aborted, below the store's parent."""
    prefix = f"{folder_of(store)}"
    found = store.fs.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
    return {upload["Key"] for upload in found.get("Uploads") or ()}


def begin_and_die(store: RemoteStore, name: str) -> str:
    """What a writer leaves that is killed after its first part."""
    target = {"Bucket": BUCKET, "Key": f"{folder_of(store)}/{name}"}
    upload = store.fs.call_s3("create_multipart_upload", **target)["UploadId"]
    store.fs.call_s3("upload_part", **target, UploadId=upload, PartNumber=1, Body=BytesIO(bytes(PART)))
    return str(target["Key"])


def test_what_a_killed_writer_began_is_aborted_by_the_next_of_its_name_and_nothing_else(plain: RemoteStore) -> None:
    name = f"rank_{secrets.randbelow(10**5):05d}-of-99999.safetensors"
    gone = {begin_and_die(plain, f"step_00000001/{name}"), begin_and_die(plain, f"step_00000002/{name}")}
    kept = {begin_and_die(plain, f"step_00000001/{name}.other"), begin_and_die(plain, f"deeper/step_00000001/{name}")}
    assert uploads(plain) == gone | kept
    data = image()
    put(plain, f"step_00000003/{name}", data)
    assert uploads(plain) == kept
    assert get(plain, f"step_00000003/{name}") == data


def test_a_server_that_does_not_tell_of_uploads_is_written_to_all_the_same(
    store: RemoteStore, plain: RemoteStore, proxy: Proxy
) -> None:
    refused: list[Request] = []

    def choose(request: Request) -> Fault | None:
        if request.method == "GET" and "uploads" in request.target:
            refused.append(request)
            return Fault(answer=500)
        return None

    proxy.choose = choose
    data, name = image(2), f"step_00000001/{secrets.token_hex(4)}"
    put(store, name, data)
    assert get(plain, name) == data
    assert refused


def tried(store: Store, data: bytes) -> bool:
    try:
        put(store, NAME, data)
    except LevelFailed:
        return False
    return True


def tried_to_read(store: Store) -> bytes | None:
    try:
        return get(store, NAME)
    except LevelFailed:
        return None


def test_an_object_that_shrank_is_damage_and_not_a_fault_of_the_network(store: RemoteStore) -> None:
    with pytest.raises(DamagedImage, match="ends 7 bytes early"):
        store.read(NAME, 0, memoryview(bytearray(10)))
