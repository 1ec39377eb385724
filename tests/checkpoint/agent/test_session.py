"""One connection on the agent's side: what ends it, and that it never waits."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.protocol import FrameReader, Message, encode
from resilient.checkpoint.agent.session import Session


class Bench:
    """A session, what came of it, and the loop that it runs on only when a test turns it."""

    def __init__(self, sock: socket.socket) -> None:
        self.loop = Loop()
        self.messages: list[Message] = []
        self.closed: list[str] = []
        self.session = Session(1, sock, self.loop)
        self.session.start(lambda _, message: self.on_message(message), lambda _, reason: self.closed.append(reason))

    def on_message(self, message: Message) -> None:
        if message.get("op") == "mistake":
            raise KeyError("a mistake of ours")
        self.messages.append(message)

    def turn(self, times: int = 5) -> None:
        for _ in range(times):
            self.loop.turn(0.05)


@pytest.fixture
def pair() -> Iterator[tuple[Bench, socket.socket]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    bench = Bench(here)
    yield bench, there
    bench.session.close("the test is over")
    bench.loop.close()
    there.close()


def test_messages_arrive_and_answers_carry_descriptors(pair: tuple[Bench, socket.socket]) -> None:
    bench, there = pair
    there.sendall(encode({"op": "one"}) + encode({"op": "two"}))
    bench.turn()
    assert [message["op"] for message in bench.messages] == ["one", "two"]
    with open(os.devnull) as file:
        bench.session.send({"id": 1}, [file.fileno()])
    data, fds, _, _ = socket.recv_fds(there, 1000, 4)
    reader = FrameReader()
    reader.feed(data, fds)
    assert list(reader.messages()) == [({"id": 1}, fds)]
    assert os.fstat(fds[0]).st_rdev == os.stat(os.devnull).st_rdev
    os.close(fds[0])


def test_the_end_of_the_connection_is_told_once(pair: tuple[Bench, socket.socket]) -> None:
    bench, there = pair
    there.close()
    bench.turn()
    bench.session.close("again")
    assert bench.closed == ["it ended its connection"]


def test_a_mistake_in_handling_one_request_ends_that_connection_only(
    pair: tuple[Bench, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    bench, there = pair
    there.sendall(encode({"op": "mistake"}))
    bench.turn()
    assert bench.closed == ["its request could not be handled"]
    assert "a mistake of ours" in caplog.text


def test_a_trainer_that_reads_nothing_is_let_go_and_no_descriptor_is_left(pair: tuple[Bench, socket.socket]) -> None:
    bench, _ = pair
    before = len(os.listdir("/proc/self/fd"))
    large = "x" * (30 << 20)
    with open(os.devnull) as file:
        for _ in range(6):
            bench.session.send({"event": large}, [file.fileno()])
    assert bench.closed == ["it does not read what it is sent"]
    assert len(os.listdir("/proc/self/fd")) <= before


def test_large_messages_go_out_in_parts_as_they_are_read(pair: tuple[Bench, socket.socket]) -> None:
    bench, there = pair
    large = "x" * (3 << 20)
    bench.session.send({"event": large})
    bench.session.send({"event": "small"})
    reader = FrameReader()
    found: list[str] = []
    while len(found) < 2:
        bench.turn(1)
        reader.feed(there.recv(1 << 20))
        found += [message["event"] for message, _ in reader.messages()]
    assert found == [large, "small"]


def test_what_a_dead_process_still_sent_counts_and_then_it_is_known_to_be_dead(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.readline();"
            f"s.sendall({encode({'op': 'last'})!r}); print(flush=True); sys.stdin.readline()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        sock, _ = listener.accept()
    bench = Bench(sock)
    assert process.stdin is not None
    assert process.stdout is not None
    assert not bench.session.end_if_dead(), "it lives"
    assert bench.session.pid == process.pid
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    process.kill()
    process.wait()
    assert bench.session.end_if_dead(), "and the loop has not turned"
    assert [message["op"] for message in bench.messages] == ["last"]
    assert len(bench.closed) == 1
    process.stdin.close()
    process.stdout.close()
    bench.loop.close()
