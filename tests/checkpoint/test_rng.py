"""After a restore every stream of random numbers goes on bit by bit as if nothing had happened."""

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from resilient.checkpoint.objects import decode, encode
from resilient.checkpoint.rng import capture_rng, restore_rng
from resilient.errors import DamagedImage


@pytest.fixture(autouse=True)
def own_streams() -> Iterator[None]:
    state = capture_rng()
    yield
    restore_rng(state)


def draw() -> list[object]:
    """Some of everything; random.gauss and numpy's normal keep half of a pair for the next call."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(70),
        float(np.random.standard_normal()),
        np.random.permutation(5).tolist(),
        torch.rand(3).tolist(),
        torch.randperm(5).tolist(),
        torch.nn.functional.dropout(torch.ones(64), 0.5).tolist(),
    ]


def through_the_codec(state: dict[str, Any]) -> Any:
    encoded = encode(state, "rng")
    return decode(encoded.text, {path: tensor.clone() for path, tensor in encoded.tensors.items()}, "rng")


def test_all_streams_go_on_from_where_they_were_captured() -> None:
    random.seed(1)
    random.gauss(0, 1)  # leaves a gauss_next behind
    np.random.seed(2)
    np.random.standard_normal()
    torch.manual_seed(3)
    state = through_the_codec(capture_rng())
    expected = [draw(), draw()]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draw() != expected[0]
    assert restore_rng(state) == []
    assert [draw(), draw()] == expected


def test_a_captured_state_does_not_change_when_the_streams_go_on() -> None:
    state = capture_rng()
    before = encode(state, "rng").text
    copies = {path: tensor.clone() for path, tensor in encode(state, "rng").tensors.items()}
    draw()
    after = encode(state, "rng")
    assert after.text == before
    assert all(torch.equal(tensor, copies[path]) for path, tensor in after.tensors.items())


def test_a_state_can_be_restored_more_than_once() -> None:
    state = through_the_codec(capture_rng())
    expected = draw()
    for _ in range(2):
        restore_rng(state)
        assert draw() == expected


def test_the_state_is_compact() -> None:
    encoded = encode(capture_rng(), "rng")
    assert len(encoded.text) < 1000
    assert {path: tensor.dtype for path, tensor in encoded.tensors.items()} == {
        "rng/python/words": torch.uint32,
        "rng/numpy/state/key": torch.uint32,
        "rng/torch": torch.uint8,
    }


def test_a_torch_state_at_an_odd_address_is_restored() -> None:
    state = capture_rng()
    expected = torch.rand(2)
    shifted = torch.empty(len(state["torch"]) + 1, dtype=torch.uint8)[1:]
    shifted.copy_(state["torch"])
    restore_rng({**state, "torch": shifted})
    assert torch.equal(torch.rand(2), expected)


def test_capturing_does_not_start_a_device() -> None:
    started = {"cuda": torch.cuda.is_initialized(), "xpu": torch.xpu.is_initialized()}
    state = capture_rng()
    assert {"cuda": torch.cuda.is_initialized(), "xpu": torch.xpu.is_initialized()} == started
    assert {kind: kind in state for kind in started} == started


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_streams_of_a_device_go_on_from_where_they_were_captured() -> None:
    torch.rand(3, device="cuda")
    state = through_the_codec(capture_rng())
    expected = torch.rand(3, device="cuda").tolist()
    torch.cuda.manual_seed_all(9)
    assert restore_rng(state) == []
    assert torch.rand(3, device="cuda").tolist() == expected


def test_states_of_devices_that_are_not_here_are_told_not_raised() -> None:
    present, started = torch.cuda.device_count(), torch.cuda.is_initialized()
    states = [torch.zeros(16, dtype=torch.uint8)] * (present + 2)
    notes = restore_rng({**capture_rng(), "cuda": states})
    assert [f"cuda:{present + index}" in note for index, note in enumerate(notes)] == [True, True]
    assert torch.cuda.is_initialized() == started


def test_a_generator_that_was_not_saved_is_told_and_the_others_restored() -> None:
    state = capture_rng()
    expected = torch.rand(2)
    del state["numpy"]
    (note,) = restore_rng(state)
    assert "numpy" in note
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("python", {}),
        ("python", {"version": 3, "words": np.zeros(3, np.uint32), "gauss_next": None}),
        ("python", {"version": 3, "words": None, "gauss_next": None}),
        ("python", 7),
        ("numpy", {"bit_generator": "PCG64"}),
        ("numpy", []),
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", None),
    ],
)
def test_a_malformed_state_is_refused_with_the_name_of_its_generator(name: str, value: object) -> None:
    with pytest.raises(DamagedImage, match=f"random state of {name}"):
        restore_rng({**capture_rng(), name: value})


def test_capturing_takes_a_tenth_of_a_millisecond() -> None:
    best = 1.0
    for _ in range(50):
        begin = time.thread_time()
        capture_rng()
        best = min(best, time.thread_time() - begin)
    assert best < 200e-6  # twice what it may take: other programs share the processor's caches with this test
