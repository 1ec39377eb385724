"""A real S3 server behind a network that loses, delays and cuts: durable in the end, or failed by name; never wrong."""

import secrets
from collections.abc import Callable, Iterator

import pytest

from resilient.errors import LevelFailed, RestoreError
from tests.bad_days.conftest import Agents, Make
from tests.bad_days.training import Training, differing, undisturbed
from tests.s3_proxy import Fault, Proxy, Request
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, running_server

LONG_S = 60.0
Choose = Callable[[Request], Fault | None]


@pytest.fixture(scope="module")
def server() -> S3Server:
    return running_server()


@pytest.fixture
def network(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, which every process that starts now will use."""
    with Proxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield proxy


def is_image(request: Request, method: str) -> bool:
    return request.method == method and ".safetensors" in request.target


def first(fault: Fault, times: int = 1) -> Choose:
    """The fault for the first requests that carry an image up, and none for later ones."""
    left = [fault] * times
    return lambda request: left.pop() if left and is_image(request, "PUT") else None


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after=10_000),
        Fault(lose_answer=True),
        Fault(delay_s=1.0),
        Fault(answer=503),
    ],
    ids=["dropped", "answer lost", "late", "503"],
)
def test_a_fault_of_the_network_is_got_over_and_the_snapshot_restores(
    fault: Fault, network: Proxy, checkpointer: Make, agents: Agents
) -> None:
    network.choose = first(fault)
    url = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    training = Training()
    saving = checkpointer(url, training.state, durable_every=3)
    assert training.run(1, 3, saving)[-1].durable("durable").result(LONG_S) == 3
    assert saving.close() == []
    network.choose = lambda request: (
        Fault(cut_answer_after=5_000) if is_image(request, "GET") and not request.number else None
    )
    again = Training(seed=3)
    loading = checkpointer(url, again.state, durable_every=3)
    assert loading.restore() == 3
    assert loading.last_restore is not None
    assert loading.last_restore.levels == {0: "durable"}
    assert differing(again.tensors(), undisturbed(3)) == []


def test_a_store_that_is_down_fails_the_level_by_name_and_is_used_again_when_it_is_back(
    network: Proxy, checkpointer: Make
) -> None:
    url = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    training = Training()
    saving = checkpointer(url, training.state, durable_every=2, retries=1)
    network.choose = lambda request: Fault(answer=503)
    *_, second = training.run(1, 2, saving)
    with pytest.raises(LevelFailed, match=r"step_00000002.*failed in 2 attempts.*Unavailable"):
        second.durable("durable").result(LONG_S)
    assert second.durable("memory").result(LONG_S) == 2
    network.choose = lambda request: None
    assert training.run(3, 4, saving)[-1].durable("durable").result(LONG_S) == 4


def test_a_store_that_cannot_be_listed_is_never_taken_for_an_empty_one(
    network: Proxy, checkpointer: Make, agents: Agents
) -> None:
    url = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    training = Training()
    saving = checkpointer(url, training.state, durable_every=1)
    training.run(1, 1, saving)[-1].durable("durable").result(LONG_S)
    assert saving.close() == []
    again = Training(seed=3)
    before = again.tensors()
    loading = checkpointer(url, again.state, durable_every=1, retries=1)
    network.choose = lambda request: Fault(answer=503) if "list-type" in request.target else None
    with pytest.raises((LevelFailed, RestoreError), match="not every level could be looked at"):
        loading.restore()
    assert differing(again.tensors(), before) == []
    network.choose = lambda request: None
    assert loading.restore() == 1


def test_an_object_that_was_cut_short_is_damage_and_the_older_snapshot_is_used(
    server: S3Server, network: Proxy, checkpointer: Make, agents: Agents
) -> None:
    folder = secrets.token_hex(6)
    training = Training()
    saving = checkpointer(f"s3://{BUCKET}/{folder}", training.state, durable_every=2)
    for step in (2, 4):
        training.run(step - 1, step, saving)[-1].durable("durable").result(LONG_S)
    assert saving.close() == []
    store = server.store(folder=folder)
    name = "step_00000004/rank_00000-of-00001.safetensors"
    half = bytearray(store.size(name) // 2)
    store.read(name, 0, memoryview(half))
    store.write(name, [memoryview(half)])
    again = Training(seed=3)
    assert checkpointer(f"s3://{BUCKET}/{folder}", again.state, durable_every=2).restore() == 2
    assert differing(again.tensors(), undisturbed(2)) == []
