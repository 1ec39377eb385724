"""Capture and restore with the state on a GPU: `make test-gpu`. Everything here is also true on the CPU, elsewhere.

What only a device can show: pinned images, copies on a stream of their own that see the finished step, a fence
between streams, and a call that does not wait for the device.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import resilient
from resilient.errors import TornCapture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:
        monkeypatch.setenv("RESILIENT_RUNTIME_DIR", folder)
        yield str(Path(folder) / "run")


def training(seed: int, width: int = 512) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, width))
    model.to("cuda")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, width: int = 512) -> None:
    loss = model(torch.randn(64, width, device="cuda")).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().cpu().clone() for tensor in [*model.state_dict().values(), *moments]]


def test_a_restored_job_goes_on_bit_for_bit(url: str) -> None:
    model, optimizer = training(1)
    checkpointer = resilient.Checkpointer(url, {"model": model, "optimizer": optimizer})
    for step in range(1, 5):
        train(model, optimizer)
        handle = checkpointer.save(step)
    handle.durable("memory").result(60)
    for _ in range(3):
        train(model, optimizer)
    undisturbed = fingerprint(model, optimizer)

    other, other_optimizer = training(2)
    checkpointer.close(keep_memory=True)
    again = resilient.Checkpointer(url, {"model": other, "optimizer": other_optimizer})
    assert again.restore() == 4
    for _ in range(3):
        train(other, other_optimizer)
    for ours, theirs in zip(undisturbed, fingerprint(other, other_optimizer), strict=True):
        assert torch.equal(ours, theirs)
    again.close()


def test_the_copy_sees_the_step_that_was_queued_before_it(url: str) -> None:
    model = nn.Linear(4096, 4096, bias=False, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    checkpointer = resilient.Checkpointer(url, {"model": model, "optimizer": optimizer})
    with torch.no_grad():
        busy = torch.randn(8192, 8192, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 8192  # keeps the current stream busy, so the fill below is still queued at the save
        model.weight.fill_(7.0)
    checkpointer.save(1).durable("memory").result(60)
    with torch.no_grad():
        model.weight.zero_()
    assert checkpointer.restore() == 1
    assert torch.all(model.weight == 7.0)
    checkpointer.close()


def test_the_fence_orders_the_update_after_the_copy(url: str) -> None:
    model = nn.Linear(8192, 8192, bias=False, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = resilient.Checkpointer(url, {"model": model, "optimizer": optimizer})
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        checkpointer.fence()
        handle = checkpointer.save(step)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()  # passes the fence by itself
        handle.durable("memory").result(60)
    checkpointer.restore()
    assert torch.all(model.weight == 5.0)
    checkpointer.close()


def test_a_change_without_the_fence_is_found(url: str) -> None:
    model = nn.Linear(8192, 8192, bias=False, device="cuda")
    checkpointer = resilient.Checkpointer(url, {"model": model})
    checkpointer.save(1).durable("memory").result(60)
    handle = checkpointer.save(2)
    model.weight.data.mul_(2)
    with pytest.raises(TornCapture, match="weight"):
        handle.captured.result(60)
    checkpointer.close()


def test_the_call_does_not_wait_for_the_device(url: str) -> None:
    model, optimizer = training(3, width=4096)
    checkpointer = resilient.Checkpointer(url, {"model": model, "optimizer": optimizer})
    for step in range(1, 12):
        train(model, optimizer, width=4096)
        handle = checkpointer.save(step)
    handle.durable("memory").result(60)
    started = time.perf_counter()
    torch.cuda.synchronize()
    copy = [tensor.cpu() for tensor in model.state_dict().values()]
    blocking = time.perf_counter() - started
    assert len(copy) > 0
    assert statistics.median(list(checkpointer.statistics.call_seconds)[3:]) < blocking
    checkpointer.close()
