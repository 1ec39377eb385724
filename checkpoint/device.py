"""The accelerator's side of a capture: pinned image, copies on a stream of their own, a fence between streams.

The copy stream waits for the current stream at the moment of `save`, so it sees the finished step; the training
stream waits for the copies just before the optimizer changes anything. The host thread blocks in neither. On a job
without an accelerator none of this is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 32


class DeviceCopies:
    """Copies from one accelerator device into images. Made once per plan.

    `sources` are flat contiguous tensors on `device` with their offsets in the data.
    """

    def __init__(self, device: torch.device, sources: Sequence[tuple[Tensor, int]], keys: Sequence[str]) -> None:
        self._device = device
        self._sources = list(sources)
        self._keys = list(keys)
        self._stream = torch.cuda.Stream(device, priority=0)
        self._views = [_spread(source) for source, _ in self._sources]
        self._samples = [torch.empty_like(view) for view in self._views]
        self._started = torch.cuda.Event()
        self._done = torch.cuda.Event()

    def mark(self) -> None:
        """Note, on the training thread and its current stream, the state that is to be copied; sample it."""
        torch._foreach_copy_(self._samples, self._views, non_blocking=True)
        self._started.record(torch.cuda.current_stream(self._device))

    def start(self, data: memoryview) -> None:
        """Queue the copies into an image's data. Called by the capture thread; returns before they have run."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._stream.wait_event(self._started)
            for source, offset in self._sources:
                target = torch.frombuffer(data[offset : offset + source.nbytes], dtype=torch.uint8)
                target.view(source.dtype).copy_(source, non_blocking=True)
            self._done.record(self._stream)

    def fence(self) -> None:
        """Make the training thread's current stream wait for the copies. Does not block the host."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def finish(self) -> None:
        """Wait, on the capture thread, until the bytes are in the image."""
        self._done.synchronize()

    def changed(self, data: memoryview) -> list[str]:
        """Names of the tensors whose copy differs from the samples that were taken at the save."""
        bad = []
        for key, (source, offset), sample in zip(self._keys, self._sources, self._samples, strict=True):
            copied = torch.frombuffer(data[offset : offset + source.nbytes], dtype=torch.uint8).view(source.dtype)
            if not torch.equal(_spread(copied).view(torch.uint8), sample.cpu().view(torch.uint8)):
                bad.append(key)
        return bad


def _spread(flat: Tensor) -> Tensor:
    """Some elements of a flat tensor, spread over all of it, as a view."""
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]


def pin(address: int, nbytes: int) -> None:
    """Page-lock memory that is mapped already, so that copies from a device to it run by themselves."""
    runtime: Any = torch.cuda.cudart()
    status = runtime.cudaHostRegister(address, nbytes, 0)
    if int(status) not in (0, 712):  # 712: registered before
        raise RuntimeError(f"cudaHostRegister of {nbytes} bytes failed with status {int(status)}")


def unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)
