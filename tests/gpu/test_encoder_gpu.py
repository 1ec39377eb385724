"""Parity made on the device: kernel and plain torch against the host's codec, bit for bit. `make test-gpu`.

The kernel without a device: tests/ec/test_gpu_kernel.py.
"""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from resilient.ec.codec import Codec
from resilient.ec.gpu import DeviceCodec

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = [1, 3, 4, 5, 2047, 2048, 2052, (1 << 20) + 7]


def random_shards(count: int, nbytes: int) -> list[Tensor]:
    # At multiples of 256 bytes, as the allocator gives them.
    return [torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda") for _ in range(count)]


def check(codec: DeviceCodec, data: list[Tensor], parity: list[Tensor]) -> None:
    """Encode on the device and on the host, and compare."""
    codec.encode(data, parity)
    expected = [torch.empty(len(one), dtype=torch.uint8) for one in parity]
    Codec(codec.k, codec.m).encode([one.cpu() for one in data], expected)
    for ours, theirs in zip(parity, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@needs_cuda
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("plain", [False, True])
def test_the_device_makes_the_parity_that_the_host_makes(nbytes: int, plain: bool) -> None:
    for k, m in ((1, 1), (4, 1), (4, 2), (8, 4), (16, 4), (5, 6)):
        check(DeviceCodec(k, m, plain=plain), random_shards(k, nbytes), random_shards(m, nbytes))


@needs_cuda
def test_every_loss_that_it_can_bear_comes_back() -> None:
    codec = DeviceCodec(4, 3)
    whole = random_shards(7, 4099)
    codec.encode(whole[:4], whole[4:])
    for count in (1, 2, 3):
        for lost in combinations(range(7), count):
            found = {number: torch.zeros_like(whole[number]) for number in lost}
            codec.decode({n: shard for n, shard in enumerate(whole) if n not in lost}, found)
            assert all(torch.equal(found[number], whole[number]) for number in lost)


@needs_cuda
def test_shards_at_odd_addresses_are_coded_too() -> None:
    data, parity = random_shards(3, 1001), random_shards(2, 1001)
    check(DeviceCodec(3, 2), [one[1:] for one in data], [one[1:] for one in parity])


@needs_cuda
def test_the_work_keeps_its_place_in_the_stream_and_the_host_does_not_wait() -> None:
    stream = torch.cuda.Stream()
    codec, data, parity = DeviceCodec(2, 2), random_shards(2, 1 << 20), random_shards(2, 1 << 20)
    check(codec, data, parity)  # compiled, and its buffers are there
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        data[0].fill_(9)
        codec.encode(data, parity)
        assert not stream.query(), "the call came back after the work before it was done"
        after = [one.clone() for one in parity]
    stream.synchronize()
    check(codec, data, parity)
    assert all(torch.equal(one, other) for one, other in zip(after, parity, strict=True))
