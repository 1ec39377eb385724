"""Some blocks of an image: verified before they are used, coarse or fine."""

import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, FineDigests, block_count, block_range, digest
from resilient.checkpoint.levels.image_io import chunks_of, read_fine_digests, write_image
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import digests_name, image_name
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.partial import AHEAD_BYTES, Opened, Reading, read_units
from resilient.errors import DamagedImage

Eventually = Callable[..., None]
IMAGE = random.Random(3).randbytes(BLOCK_BYTES + 3 * FINE_BYTES + 77)


def record() -> Record:
    blocks = [digest(IMAGE[slice(*block_range(n, len(IMAGE)))]) for n in range(block_count(len(IMAGE)))]
    return Record(
        run_id="r",
        step=7,
        rank=0,
        world_size=1,
        plan_digest="0" * 32,
        image_name=image_name(7, 0, 1),
        image_bytes=len(IMAGE),
        blocks=tuple(blocks),
    )


def fine_of(image: bytes) -> bytes:
    digests = FineDigests()
    digests.update(memoryview(image))
    return digests.finish()


def read(image: bytes, wanted: list[tuple[int, int]], fine: bytes | None) -> dict[int, bytes]:
    found: dict[int, bytes] = {}

    def fill(offset: int, into: memoryview) -> None:
        into[:] = image[offset : offset + into.nbytes]

    def use(offset: int, part: memoryview) -> None:
        found[offset] = bytes(part)

    total = read_units(Opened(record(), "durable", fill, fine), wanted, use)
    assert total == sum(end - begin for begin, end in wanted)
    return found


WANTED = [(FINE_BYTES, 3 * FINE_BYTES), (BLOCK_BYTES + 3 * FINE_BYTES, len(IMAGE))]


def test_the_blocks_that_are_wanted_are_given_as_they_are() -> None:
    found = read(IMAGE, WANTED, fine_of(IMAGE))
    assert found == {begin: IMAGE[begin:end] for begin, end in WANTED}
    whole = [block_range(number, len(IMAGE)) for number in range(2)]
    assert read(IMAGE, whole, None) == {begin: IMAGE[begin:end] for begin, end in whole}


@pytest.mark.parametrize("at", [FINE_BYTES, 3 * FINE_BYTES - 1, len(IMAGE) - 1])
def test_a_changed_byte_in_a_fine_block_is_found(at: int) -> None:
    damaged = bytearray(IMAGE)
    damaged[at] ^= 1
    with pytest.raises(DamagedImage, match=r"image|damaged at bytes"):
        read(bytes(damaged), WANTED, fine_of(IMAGE))
    with pytest.raises(DamagedImage, match="step 7, rank 0"):
        read(bytes(damaged), [block_range(n, len(IMAGE)) for n in range(2)], None)


def test_a_changed_byte_elsewhere_is_not_this_readers_business() -> None:
    damaged = bytearray(IMAGE)
    damaged[0] ^= 1
    assert read(bytes(damaged), WANTED, fine_of(IMAGE))


@pytest.mark.parametrize("chunk", [1, 1000, FINE_BYTES - 1, FINE_BYTES, FINE_BYTES + 1, 5 * FINE_BYTES])
def test_fine_digests_do_not_depend_on_how_the_bytes_came(chunk: int) -> None:
    image = IMAGE[: 4 * FINE_BYTES + 5] if chunk > 1 else IMAGE[: FINE_BYTES + 9]
    digests = FineDigests()
    for begin in range(0, len(image), chunk):
        digests.update(memoryview(image)[begin : begin + chunk])
    assert digests.finish() == fine_of(image)


def test_fine_digests_are_kept_beside_the_image_and_known_by_its_record() -> None:
    store = MemoryStore()
    stored = write_image(store, record(), lambda: chunks_of(memoryview(IMAGE)), cancelled=lambda: False)
    assert read_fine_digests(store, stored) == fine_of(IMAGE)
    changed = bytearray(fine_of(IMAGE))
    changed[5] ^= 1
    store.write(digests_name(7, 0, 1), [memoryview(changed)])
    with pytest.raises(DamagedImage, match="changed after it was written"):
        read_fine_digests(store, stored)
    assert read_fine_digests(store, record()) is None


class Device:
    """Bytes of an image, and which ranges of them have been asked for."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.asked: list[tuple[int, int]] = []

    def opened(self) -> Opened:
        return Opened(record(), "durable", self.read, fine_of(IMAGE))

    def read(self, offset: int, into: memoryview) -> None:
        into[:] = self.image[offset : offset + into.nbytes]
        self.asked.append((offset, offset + into.nbytes))


def test_units_are_read_before_it_is_known_where_they_go(eventually: Eventually) -> None:
    device, found = Device(IMAGE), dict[int, bytes]()
    reading = Reading()
    try:
        reading.want(3, device.opened(), WANTED)
        eventually(lambda: sorted(device.asked) == WANTED, "all units are asked for", 30)
        reading.want(3, device.opened(), [(0, FINE_BYTES)])
        assert reading.finish({3: lambda begin, part: found.update({begin: bytes(part)})}) == {}
    finally:
        reading.close()
    assert found == {begin: IMAGE[begin:end] for begin, end in [*WANTED, (0, FINE_BYTES)]}
    assert reading.read_bytes == sum(map(len, found.values()))


def test_what_is_read_ahead_is_bounded_and_all_of_it_arrives(eventually: Eventually) -> None:
    device, count = Device(IMAGE), Counter[int]()
    lock = threading.Lock()
    units = [(0, BLOCK_BYTES)] * 40  # 160 MiB

    def use(begin: int, part: memoryview) -> None:
        assert part == IMAGE[begin : begin + part.nbytes]
        with lock:
            count[begin] += 1

    reading = Reading()
    try:
        reading.want(0, device.opened(), units)
        eventually(lambda: len(device.asked) == AHEAD_BYTES // BLOCK_BYTES, "as much is read as may be held", 30)
        assert reading.finish({0: use}) == {}
    finally:
        reading.close()
    assert count == {0: 40}


def test_damage_in_what_is_read_ahead_is_told_with_the_rest_and_goes_nowhere(eventually: Eventually) -> None:
    damaged, found = bytearray(IMAGE), list[int]()
    damaged[FINE_BYTES] ^= 1
    bad, well = Device(bytes(damaged)), Device(IMAGE)
    reading = Reading()
    try:
        reading.want(1, bad.opened(), [(FINE_BYTES, 3 * FINE_BYTES)])
        reading.want(2, well.opened(), [(FINE_BYTES, 3 * FINE_BYTES)])
        eventually(lambda: bad.asked and well.asked, "both images are asked for", 30)
        failed = reading.finish({1: lambda begin, part: found.append(1), 2: lambda begin, part: found.append(2)})
    finally:
        reading.close()
    assert found == [2]
    assert list(failed) == [1]
    assert isinstance(failed[1], DamagedImage)


def test_what_was_read_for_nobody_is_forgotten_and_no_thread_stays(eventually: Eventually) -> None:
    before = threading.active_count()
    device = Device(IMAGE)
    reading = Reading()
    reading.want(0, device.opened(), [(0, BLOCK_BYTES)] * 40)
    eventually(
        lambda: len(device.asked) == AHEAD_BYTES // BLOCK_BYTES, "as much is read as may be held", 30
    )  # the readers wait for room
    reading.close()
    reading.close()
    assert threading.active_count() == before
    assert reading.read_bytes == AHEAD_BYTES
