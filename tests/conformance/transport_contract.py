"""What every transport promises, as tests that each kind of transport inherits.

A test module makes a subclass of `TransportContract` whose fixture `join` makes nodes that can reach one another.
`Shelf` is the simplest thing that can be served; it remembers what it was asked.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from resilient.checkpoint.digest import digest
from resilient.checkpoint.peers.memory import MemoryTransport
from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Message, Served, Transport, Wanted
from resilient.errors import DamagedImage, LevelFailed, OverBudget, ResilientError

BIG = 9 << 20
Join = Callable[[str, Served], MemoryTransport | TcpTransport]


class Shelf:
    """Byte arrays under names, served to all peers. `errors[name]` is raised for a range or a question of that name."""

    def __init__(self) -> None:
        self.held: dict[str, bytearray] = {}
        self.errors: dict[str, Exception] = {}
        self.asked: list[tuple[str, Message]] = []
        self.out = 0  # contexts that were entered and not left
        self.most_out = 0
        self.ends: list[type[BaseException] | None] = []  # how each `take` ended
        self.surplus = 0  # so many bytes more than it should are lent
        self._lock = threading.Lock()

    def answer(self, peer: str, message: Message) -> Message:
        self.asked.append((peer, message))
        self._maybe_fail(message.get("name"))
        return {"heard": message, "from": peer}

    @contextlib.contextmanager
    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._counted(name):
            yield self._view(name, offset, nbytes)

    @contextlib.contextmanager
    def take(self, peer: str, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._counted(name):
            try:
                yield self._view(name, offset, nbytes)
            except BaseException as error:
                self.ends.append(type(error))
                raise
            self.ends.append(None)

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._maybe_fail(name)
        with self._lock:
            self.out += 1
            self.most_out = max(self.most_out, self.out)
        try:
            yield
        finally:
            with self._lock:
                self.out -= 1

    def _view(self, name: str, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes > len(self.held.get(name, b"")):
            raise LevelFailed(f"there are no {nbytes} bytes at {offset} of {name}")
        return memoryview(self.held[name])[offset : offset + nbytes + self.surplus]

    def _maybe_fail(self, name: str | None) -> None:
        if name in self.errors:
            raise self.errors[name]


def wanted(name: str, offset: int, nbytes: int) -> Wanted:
    return Wanted(name=name, offset=offset, into=memoryview(bytearray(nbytes)))


def get(transport: Transport, peer: str, name: str, offset: int, nbytes: int) -> bytes:
    [found] = transport.read(peer, [wanted(name, offset, nbytes)])
    return bytes(found.into)


def put(transport: Transport, peer: str, name: str, offset: int, data: bytes) -> None:
    transport.push(peer, name, offset, memoryview(data), digest(data))


class Pair:
    """Two nodes: `alpha` asks, `beta` serves its `shelf`."""

    def __init__(self, join: Join) -> None:
        self.own_shelf, self.shelf = Shelf(), Shelf()
        self.alpha = join("alpha", self.own_shelf)
        self.beta = join("beta", self.shelf)
        self.alpha.set_peers({"beta": self.beta.address})
        self.beta.set_peers({"alpha": self.alpha.address})


class TransportContract:
    """Inherit, and give a fixture `join`: a function that makes a node's transport, closed when the test ends."""

    @pytest.fixture
    def pair(self, join: Join) -> Pair:
        return Pair(join)

    def test_a_question_is_answered_and_the_asker_is_named(self, pair: Pair) -> None:
        message = {"text": "ü", "number": 1 << 60, "list": [1.5, None, True, {"deep": []}]}
        assert pair.alpha.call("beta", message) == {"heard": message, "from": "alpha"}
        assert pair.beta.call("alpha", {}) == {"heard": {}, "from": "beta"}
        assert pair.shelf.asked == [("alpha", message)]

    def test_long_messages_pass_and_too_long_ones_are_refused_before_they_are_sent(self, pair: Pair) -> None:
        message = {"records": "r" * BIG}
        assert pair.alpha.call("beta", message)["heard"] == message
        with pytest.raises(LevelFailed, match="too long for peers"):
            pair.alpha.call("beta", {"records": "r" * (64 << 20)})
        assert len(pair.shelf.asked) == 1

    def test_what_is_asked_is_no_longer_tied_to_what_was_given(self, pair: Pair) -> None:
        message = {"list": [1]}
        answer = pair.alpha.call("beta", message)
        answer["heard"]["list"].append(2)
        assert message == {"list": [1]}
        assert pair.shelf.asked == [("alpha", {"list": [1]})]

    def test_any_ranges_are_read_in_order_and_as_they_are(self, pair: Pair) -> None:
        data = secrets.token_bytes(BIG)
        pair.shelf.held["image"] = bytearray(data)
        bounds = [(0, 1), (1, 0), (BIG - 1, 1), (4095, 4 << 20), (0, BIG), (BIG, 0), (5, 70_000), (77, 3)]
        asked = [wanted("image", offset, nbytes) for offset, nbytes in bounds]
        found = list(pair.alpha.read("beta", iter(asked)))
        assert [id(each) for each in found] == [id(each) for each in asked]
        for each, (offset, nbytes) in zip(found, bounds, strict=True):
            assert each.into == data[offset : offset + nbytes], (offset, nbytes)

    def test_bytes_land_in_a_part_of_a_bigger_buffer_of_any_type(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(b"0123456789abcdef")
        buffer = memoryview(bytearray(32))
        list(pair.alpha.read("beta", [Wanted(name="image", offset=0, into=buffer.cast("Q")[1:3])]))
        assert bytes(buffer) == bytes(8) + b"0123456789abcdef" + bytes(8)

    def test_a_read_of_nothing_is_nothing(self, pair: Pair) -> None:
        assert list(pair.alpha.read("beta", [])) == []

    def test_a_read_asks_only_a_little_ahead(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(100)
        taken = 0

        def ranges() -> Iterator[Wanted]:
            nonlocal taken
            for number in range(100):
                taken += 1
                yield wanted("image", number, 1)

        for number, _ in enumerate(pair.alpha.read("beta", ranges())):
            assert taken <= number + 4
        assert taken == 100

    def test_a_read_that_is_left_in_the_middle_harms_no_later_one(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(secrets.token_bytes(BIG))
        for _ in range(3):
            reading = pair.alpha.read("beta", (wanted("image", 0, BIG) for _ in range(10)))
            assert next(reading).into == pair.shelf.held["image"]
            reading.close()  # type: ignore[attr-defined]  # a generator
            assert get(pair.alpha, "beta", "image", 5, 10) == pair.shelf.held["image"][5:15]

    def test_an_error_of_the_callers_own_ranges_passes_through(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(10)

        def ranges() -> Iterator[Wanted]:
            yield wanted("image", 0, 1)
            raise LevelFailed("no buffer")

        with pytest.raises(LevelFailed, match="^no buffer$"):
            list(pair.alpha.read("beta", ranges()))
        assert get(pair.alpha, "beta", "image", 0, 1) == b"\0"

    def test_pushed_bytes_are_there_when_push_returns(self, pair: Pair) -> None:
        data = secrets.token_bytes(BIG)
        pair.shelf.held["parity"] = bytearray(BIG + 2)
        put(pair.alpha, "beta", "parity", 1, data)
        assert pair.shelf.held["parity"] == b"\0" + data + b"\0"
        put(pair.alpha, "beta", "parity", 3, b"")
        put(pair.alpha, "beta", "parity", BIG, b"ab")
        assert pair.shelf.held["parity"][-2:] == b"ab"
        assert pair.shelf.ends == [None] * 3

    def test_a_push_that_does_not_match_its_digest_is_not_taken(self, pair: Pair) -> None:
        pair.shelf.held["parity"] = bytearray(BIG)
        with pytest.raises(DamagedImage, match="node beta says: parity at offset 0, pushed by node alpha"):
            pair.alpha.push("beta", "parity", 0, memoryview(bytes(BIG)), digest(b"other"))
        assert pair.shelf.ends == [DamagedImage]
        put(pair.alpha, "beta", "parity", 0, b"right")
        assert pair.shelf.ends == [DamagedImage, None]

    @pytest.mark.parametrize("error", [LevelFailed("disk"), DamagedImage("bad block"), OverBudget("no room")])
    def test_errors_of_the_peer_are_raised_as_their_own_class(self, pair: Pair, error: ResilientError) -> None:
        pair.shelf.errors["bad"] = error
        pair.shelf.held["good"] = bytearray(BIG)
        attempts: list[Callable[[], object]] = [
            lambda: pair.alpha.call("beta", {"name": "bad"}),
            lambda: get(pair.alpha, "beta", "bad", 0, 1),
            lambda: put(pair.alpha, "beta", "bad", 0, bytes(BIG)),
        ]
        for attempt in attempts:
            with pytest.raises(type(error), match=f"node beta says: {error}") as caught:
                attempt()
            assert type(caught.value) is type(error)
            assert get(pair.alpha, "beta", "good", 0, 1) == b"\0"
        assert len(pair.shelf.asked) == 1, "what a peer refuses is not asked again"

    def test_ranges_before_one_that_fails_are_given_back(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(b"abc")
        reading = pair.alpha.read("beta", [wanted("image", offset, 1) for offset in range(6)])
        assert [bytes(next(reading).into) for _ in range(3)] == [b"a", b"b", b"c"]
        with pytest.raises(LevelFailed, match="no 1 bytes at 3 of image"):
            next(reading)

    def test_an_unforeseen_error_of_the_peer_says_what_it_was_and_ends_nothing(self, pair: Pair) -> None:
        pair.shelf.errors["odd"] = KeyError("odd")
        for attempt in (
            lambda: pair.alpha.call("beta", {"name": "odd"}),
            lambda: get(pair.alpha, "beta", "odd", 0, 1),
            lambda: put(pair.alpha, "beta", "odd", 0, b"1"),
        ):
            with pytest.raises(LevelFailed, match="node beta says: .*KeyError: 'odd'"):
                attempt()
        assert pair.alpha.call("beta", {"n": 1})["heard"] == {"n": 1}

    def test_a_peer_that_lends_or_has_room_for_the_wrong_number_of_bytes_is_found_out(self, pair: Pair) -> None:
        pair.shelf.held["image"] = bytearray(10)
        pair.shelf.surplus = 1
        for attempt in (
            lambda: get(pair.alpha, "beta", "image", 0, 3),
            lambda: put(pair.alpha, "beta", "image", 0, b"123"),
        ):
            with pytest.raises(LevelFailed, match="node beta says: .* 4 bytes"):
                attempt()
        pair.shelf.surplus = 0
        assert get(pair.alpha, "beta", "image", 0, 3) == bytes(3)

    def test_whatever_is_lent_or_taken_is_given_back(self, pair: Pair, eventually: Callable[..., None]) -> None:
        pair.shelf.held["image"] = bytearray(BIG)
        list(pair.alpha.read("beta", [wanted("image", 0, BIG)] * 4))
        put(pair.alpha, "beta", "image", 0, bytes(BIG))
        with pytest.raises(LevelFailed):
            get(pair.alpha, "beta", "image", BIG, 1)
        eventually(lambda: pair.shelf.out == 0, "all contexts were left")
        assert pair.shelf.most_out >= 1

    def test_a_node_that_is_no_peer_is_named(self, pair: Pair) -> None:
        for attempt in (
            lambda: pair.alpha.call("gamma", {}),
            lambda: get(pair.alpha, "gamma", "x", 0, 1),
            lambda: put(pair.alpha, "gamma", "x", 0, b""),
        ):
            with pytest.raises(LevelFailed, match="node gamma is not among the peers of node alpha"):
                attempt()

    def test_a_peer_that_is_gone_is_named_and_its_successor_is_found(self, pair: Pair, join: Join) -> None:
        assert pair.alpha.call("beta", {})["from"] == "alpha"
        pair.beta.close()
        for attempt in (
            lambda: pair.alpha.call("beta", {}),
            lambda: get(pair.alpha, "beta", "x", 0, 1),
            lambda: put(pair.alpha, "beta", "x", 0, b""),
        ):
            with pytest.raises(LevelFailed, match="node alpha cannot reach node beta"):
                attempt()
        successor = join("beta", later := Shelf())
        pair.alpha.set_peers({"beta": successor.address})
        assert pair.alpha.call("beta", {"n": 2})["heard"] == {"n": 2}
        assert [message for _, message in later.asked] == [{"n": 2}]

    def test_a_closed_transport_reaches_nobody_and_can_be_closed_again(self, pair: Pair) -> None:
        for _ in range(2):
            pair.alpha.close()
            with pytest.raises(LevelFailed, match="node alpha has closed its connections"):
                pair.alpha.call("beta", {})
        with pytest.raises(LevelFailed, match="node beta cannot reach node alpha"):
            pair.beta.call("alpha", {})

    def test_many_threads_read_push_and_ask_at_once(self, pair: Pair) -> None:
        image = secrets.token_bytes(BIG)
        pair.shelf.held["image"] = bytearray(image)
        pair.shelf.held["parity"] = bytearray(8 * 1000)

        def work(number: int) -> None:
            for turn in range(5):
                ranges = [(number * 1000 + turn, 100_000), (turn, 3), (number, 2 << 20)]
                for each, (offset, nbytes) in zip(
                    pair.alpha.read("beta", [wanted("image", *bounds) for bounds in ranges]), ranges, strict=True
                ):
                    assert each.into == image[offset : offset + nbytes]
                put(pair.alpha, "beta", "parity", number * 1000, bytes([number]) * 1000)
                assert pair.alpha.call("beta", {"n": number})["heard"] == {"n": number}

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert pair.shelf.held["parity"] == b"".join(bytes([number]) * 1000 for number in range(8))
