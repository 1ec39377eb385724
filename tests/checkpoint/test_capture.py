"""Capture into buffers without an agent: what a save leaves in the image, and what makes it fail."""

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from resilient.checkpoint.capture import Buffer, Capture, Job
from resilient.checkpoint.image import parse_header
from resilient.checkpoint.leaves import walk
from resilient.checkpoint.objects import encode
from resilient.checkpoint.plan import Plan, make_plan
from resilient.errors import ResilientError, TornCapture


@dataclass
class PlainBuffer:
    """A buffer in this process."""

    id: int
    capacity: int
    view: memoryview
    address: int


@dataclass
class PlainBuffers:
    """Buffers without an agent; `gate` holds a capture back before it gets one."""

    gate: threading.Event = field(default_factory=threading.Event)
    sealed: dict[int, memoryview] = field(default_factory=dict)
    aborted: dict[int, str] = field(default_factory=dict)
    filled_to: list[int] = field(default_factory=list)
    taken: list[tuple[mmap.mmap, PlainBuffer]] = field(default_factory=list)

    def take(self, plan: Plan, capacity: int, timeout_s: float, given_up: Callable[[], bool]) -> Buffer:
        assert self.gate.wait(timeout_s)
        memory = mmap.mmap(-1, capacity)
        buffer = PlainBuffer(0, capacity, memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        self.taken.append((memory, buffer))
        return buffer

    def begin(self, buffer: Buffer, step: int) -> None: ...

    def filled(self, buffer: Buffer, step: int, upto: int) -> None:
        self.filled_to.append(upto)

    def seal(self, buffer: Buffer, step: int, image_bytes: int, levels: tuple[str, ...]) -> None:
        self.sealed[step] = buffer.view[:image_bytes]

    def abort(self, buffer: Buffer | None, step: int, reason: str) -> None:
        self.aborted[step] = reason


@dataclass
class Bench:
    """A capture with its buffers and what it reported."""

    buffers: PlainBuffers
    capture: Capture
    captured: list[int]
    failed: dict[int, ResilientError]

    def job(self, plan: Plan, step: int = 1, look: bool = True) -> Job:
        plan.copy_early()
        return Job(
            step=step,
            due=("memory",),
            plan=plan,
            look=plan.look() if look else None,
            samples=plan.fingerprints.take(),
            objects=lambda: encode({"epoch": 3, "t": torch.arange(3, dtype=torch.float64)}, "state"),
            metadata={"format": "resilient"},
        )

    def finish(self) -> None:
        self.buffers.gate.set()
        self.capture.fence()
        assert self.capture.wait_idle(30)


@pytest.fixture
def bench() -> Iterator[Bench]:
    buffers, captured, failed = PlainBuffers(), list[int](), dict[int, ResilientError]()
    capture = Capture(buffers, threads=1, fence_timeout_s=30, on_captured=captured.append, on_failed=failed.__setitem__)
    capture.start()
    yield Bench(buffers, capture, captured, failed)
    buffers.gate.set()
    capture.close()


def stored(image: memoryview, key: str) -> bytes:
    entries, begins = parse_header(image, len(image), "image")
    entry = entries[key]
    return bytes(image[begins + entry.offset : begins + entry.offset + entry.nbytes])


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def model_of_many_kinds() -> nn.Module:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.randn(257, 129)))
    model.register_parameter("small", nn.Parameter(torch.randn(33).to(torch.bfloat16)))
    model.register_parameter("turned", nn.Parameter(torch.randn(40, 50).t()))
    model.register_parameter("scalar", nn.Parameter(torch.tensor(2.5)))
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 4)))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("wave", torch.randn(5, dtype=torch.complex128))
    model.register_buffer("low", torch.randn(9).to(torch.float8_e4m3fn))
    return model


def test_an_image_holds_every_tensor_bit_for_bit(bench: Bench) -> None:
    model = model_of_many_kinds()
    plan = make_plan(walk({"model": model}), rank=0)
    bench.capture.submit(bench.job(plan))
    bench.finish()
    image = bench.buffers.sealed[1]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert stored(image, f"model.{name}") == raw(tensor), name


def test_the_image_is_a_valid_safetensors_file(bench: Bench) -> None:
    import safetensors.torch

    model = model_of_many_kinds()
    plan = make_plan(walk({"model": model}), rank=0)
    bench.capture.submit(bench.job(plan))
    bench.finish()
    loaded = safetensors.torch.load(bytes(bench.buffers.sealed[1]))
    assert torch.equal(loaded["model.weight"], model.get_parameter("weight"))
    assert torch.equal(loaded["model.turned"], model.get_parameter("turned"))
    image = bench.buffers.sealed[1]
    assert parse_header(image, len(image), "image")[1] % 4096 == 0


def test_buffers_and_objects_are_as_they_were_at_the_save(bench: Bench) -> None:
    model = nn.BatchNorm1d(4)
    plan = make_plan(walk({"model": model}), rank=0)
    before = raw(model.get_buffer("running_mean"))
    bench.capture.submit(bench.job(plan))
    model(torch.randn(8, 4))  # changes the running statistics before the copies begin
    assert raw(model.get_buffer("running_mean")) != before
    bench.finish()
    assert stored(bench.buffers.sealed[1], "model.running_mean") == before


@pytest.mark.parametrize("look", [True, False])
def test_a_tensor_changed_under_the_copy_fails_the_snapshot_by_name(bench: Bench, look: bool) -> None:
    model = nn.Linear(64, 64)
    plan = make_plan(walk({"model": model}), rank=0)
    bench.capture.submit(bench.job(plan, look=look))
    model.weight.data.mul_(2)  # as a fused optimizer would: leaves _version as it is
    bench.finish()
    error = bench.failed[1]
    assert isinstance(error, TornCapture)
    assert error.tensors == ("model.weight",)
    assert "model.weight" in bench.buffers.aborted[1]
    assert not bench.buffers.sealed


def test_whoever_keeps_the_handle_of_a_failed_save_does_not_keep_the_buffer_mapped(bench: Bench) -> None:
    model = nn.Linear(64, 64)
    bench.capture.submit(bench.job(make_plan(walk({"model": model}), rank=0)))
    model.weight.data.mul_(2)
    bench.finish()
    assert bench.failed[1].__traceback__ is not None, "where it came from is worth keeping"
    memory, buffer = bench.buffers.taken[0]
    buffer.view.release()
    memory.close()  # raises BufferError while there is another view of it


def test_a_sparse_write_is_found_by_its_version(bench: Bench) -> None:
    model = nn.Linear(512, 512)
    plan = make_plan(walk({"model": model}), rank=0)
    bench.capture.submit(bench.job(plan))
    with torch.no_grad():
        model.weight[17, 333] += 1
    bench.finish()
    assert isinstance(bench.failed[1], TornCapture)


def test_a_parameter_given_other_memory_before_the_save_is_followed(bench: Bench) -> None:
    model = nn.Linear(64, 64)
    plan = make_plan(walk({"model": model}), rank=0)
    model.weight.data = torch.full((64, 64), 3.0)
    for step, look in ((1, True), (2, False)):
        job = bench.job(plan, step, look)
        if look and job.look is not None:
            plan.moved(job.look)
            job.samples = plan.fingerprints.take()
        bench.capture.submit(job)
        bench.finish()
        assert stored(bench.buffers.sealed[step], "model.weight") == raw(model.weight)


def test_training_goes_on_when_no_buffer_comes(bench: Bench) -> None:
    slow = Capture(
        bench.buffers,
        threads=1,
        fence_timeout_s=0.05,
        on_captured=bench.captured.append,
        on_failed=bench.failed.__setitem__,
    )
    slow.start()
    model = nn.Linear(4, 4)
    slow.submit(bench.job(make_plan(walk({"model": model}), rank=0)))
    slow.fence()  # returns although the gate is closed
    bench.buffers.gate.set()
    assert slow.wait_idle(10)
    slow.close()
    assert 1 in bench.failed
    assert not bench.captured


class Broken(PlainBuffers):
    """Its first image cannot be begun, and not be given up either."""

    def begin(self, buffer: Buffer, step: int) -> None:
        if step == 1:
            raise TypeError("begin")

    def abort(self, buffer: Buffer | None, step: int, reason: str) -> None:
        raise TypeError("abort")


def test_a_mistake_in_giving_up_one_image_does_not_end_the_capture_of_later_ones() -> None:
    buffers, captured, failed = Broken(), list[int](), dict[int, ResilientError]()
    capture = Capture(buffers, threads=1, fence_timeout_s=30, on_captured=captured.append, on_failed=failed.__setitem__)
    capture.start()
    bench = Bench(buffers, capture, captured, failed)
    plan = make_plan(walk({"model": nn.Linear(8, 8)}), rank=0)
    for step in (1, 2):
        capture.submit(bench.job(plan, step))
        bench.finish()
    capture.close()
    assert "begin" in str(failed.pop(1))
    assert (captured, failed) == ([2], {})
