"""The scrub keeps to its rate, looks at all there is, and lets go of what is dropped meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resilient.checkpoint.digest import BLOCK_BYTES
from resilient.checkpoint.parity.scrub import Finding, Scrub, run
from resilient.checkpoint.parity.store import ParityStore
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed
from tests.checkpoint.parity.cluster import image_of, record_for


class Images:
    """`left` says how many blocks are lent before the images are gone."""

    def __init__(self, data: bytearray, left: int = 1000) -> None:
        self.data, self.left = data, left
        self.record = record_for("x", 3, 0, 1, data)

    def inventory(self) -> list[Record]:
        return [self.record]

    @contextmanager
    def lend_image(self, life: str, step: int, rank: int) -> Iterator[memoryview]:
        self.left -= 1
        if self.left < 0:
            raise LevelFailed("it is gone")
        yield memoryview(self.data)

    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None:
        raise AssertionError("nothing can be had from anybody")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def nobody(_key: Any) -> Any:
    raise DamagedImage("nobody has it")


def scrub_of(images: Images, clock: Clock, found: list[Finding], rate: float) -> Scrub:
    pace = Pace(rate, clock=clock, sleep=clock.sleep)
    return Scrub("a", images, ParityStore("a"), lambda _: None, nobody, pace, BLOCK_BYTES, found.append)


def test_the_rate_is_kept() -> None:
    clock = Clock()
    scrub = scrub_of(Images(image_of("x", 3, 0, 3 * BLOCK_BYTES + 5)), clock, [], rate=1 << 20)
    assert sum(1 for _ in scrub.walk()) == 4
    assert scrub.seen_bytes == 3 * BLOCK_BYTES + 5
    assert 11.5 < clock.now < 12.5


def test_what_cannot_be_put_right_is_reported_once() -> None:
    found: list[Finding] = []
    images = Images(image_of("x", 3, 0, 2 * BLOCK_BYTES))
    images.data[BLOCK_BYTES + 9] ^= 4
    scrub = scrub_of(images, Clock(), found, rate=1e12)
    for _ in range(3):
        for _ in scrub.walk():
            pass
    assert [(one.name, one.offset, one.error) for one in found] == [("image/x/3/0", BLOCK_BYTES, "nobody has it")]
    assert "stays so: nobody has it" in str(found[0])


def test_an_image_that_is_freed_meanwhile_is_left_alone() -> None:
    found: list[Finding] = []
    images = Images(image_of("x", 3, 0, 3 * BLOCK_BYTES), left=1)
    images.data[2 * BLOCK_BYTES] ^= 1
    assert sum(1 for _ in scrub_of(images, Clock(), found, rate=1e12).walk()) == 1
    assert not found


def test_it_goes_round_until_it_is_stopped_and_rests_when_there_is_nothing() -> None:
    rests: list[float] = []

    def stopped(seconds: float) -> bool:
        rests.append(seconds)
        return len(rests) > 20

    walks = iter([[None, None], [], [None]] + [[]] * 100)
    run(lambda: next(walks), stopped, idle_s=7.0)
    assert rests[:9] == [0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]
