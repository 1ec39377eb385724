"""The device's codec by plain torch operations, on the CPU: the same bytes as the host's. The kernel: tests/gpu."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilient.ec.codec import Codec
from resilient.ec.engine import Tables
from resilient.ec.gpu import DeviceCodec, combine_by
from resilient.ec.matrix import parity_matrix
from resilient.errors import RestoreError, UsageError


def random_shards(count: int, nbytes: int, seed: int = 0) -> list[Tensor]:
    return list(
        torch.randint(0, 256, (count, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    )


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 300), st.data())
def test_it_encodes_and_decodes_what_the_host_does(k: int, m: int, nbytes: int, data: st.DataObject) -> None:
    shards = random_shards(k, nbytes)
    ours, theirs = random_shards(m, nbytes, seed=1), random_shards(m, nbytes, seed=2)
    DeviceCodec(k, m).encode(shards, ours)
    Codec(k, m).encode(shards, theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    whole = shards + ours
    lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m))
    found = {number: torch.full((nbytes,), 3, dtype=torch.uint8) for number in lost}
    DeviceCodec(k, m).decode({n: shard for n, shard in enumerate(whole) if n not in lost}, found)
    assert all(torch.equal(found[number], whole[number]) for number in lost)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_sizes_around_the_edges_of_its_chunks_are_whole(more: int) -> None:
    nbytes = (256 << 10) + more
    shards, ours, theirs = random_shards(3, nbytes), random_shards(2, nbytes, 1), random_shards(2, nbytes, 2)
    DeviceCodec(3, 2, plain=True).encode(shards, ours)
    Codec(3, 2).encode(shards, theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_tensors_of_any_dtype_and_shape_are_bytes() -> None:
    data = [torch.randn(4, 8), torch.randn(16, dtype=torch.float64, requires_grad=True), torch.arange(16)]
    parity = [torch.zeros(128, dtype=torch.bool), torch.zeros(64, dtype=torch.bfloat16)]
    DeviceCodec(3, 2).encode(data, parity)
    lost = torch.zeros(8, 4)
    DeviceCodec(3, 2).decode({1: data[1], 2: data[2], 3: parity[0]}, {0: lost})
    assert torch.equal(lost.flatten().view(torch.int32), data[0].flatten().view(torch.int32))


class HostKernel:
    """What `gpu_kernel` is on a device, by the tables: words of four bytes, coefficients padded to fours."""

    WORD_BYTES, TARGETS = 4, 4

    def launch(self, addresses: Tensor, coefficients: Tensor, rows: int, words: int) -> None:
        columns = coefficients.shape[1]
        assert len(addresses) == columns + rows
        assert len(coefficients) % 4 == 0 <= len(coefficients) - rows < 4
        combine = Tables().prepare(coefficients[:rows].numpy())
        combine(addresses[:columns].tolist(), addresses[columns:].tolist(), 4 * words)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 70))
def test_a_kernel_gets_whole_words_and_what_is_left_is_done_without_it(k: int, m: int, nbytes: int) -> None:
    shards, ours, theirs = random_shards(k, nbytes), random_shards(m, nbytes, 1), random_shards(m, nbytes, 2)
    combine_by(HostKernel(), parity_matrix(k, m), shards, ours)
    Codec(k, m).encode(shards, theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_are_no_shards_is_refused() -> None:
    a, b, c = random_shards(3, 16)
    with pytest.raises(UsageError, match="1 data and 1 parity shards: 2 and 1 are needed"):
        DeviceCodec(2, 1).encode([a], [c])
    with pytest.raises(UsageError, match=r"shards of \[8, 16\] bytes"):
        DeviceCodec(2, 1).encode([a, b[:8]], [c])
    with pytest.raises(UsageError, match="contiguous"):
        DeviceCodec(2, 1).encode([a[::2], b[:8]], [c[:8]])
    with pytest.raises(UsageError, match="'cpu', 'meta'"):
        DeviceCodec(2, 1).encode([a, b.to("meta")], [c])
    with pytest.raises(RestoreError, match="1 of 3 shards are left and 2 are needed"):
        DeviceCodec(2, 1).decode({0: a}, {1: b})
