"""The symmetric memory that the fused calls of a group share, and its epoch.

One memory for all operations and shapes: it grows when a call needs more, at the same call on all ranks. Calls are
numbered; the number is what signals are compared with, so nothing is reset between calls. Calls of one group are made
in the same order on all ranks, from one thread, on one stream.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.errors import ResilientError, UsageError
from resilient.kernels.fused.shapes import Call
from resilient.kernels.symmetric import FAILURE_WORD, FREE_WORD, SymmetricMemory, open_symmetric, raise_failure
from resilient.kernels.symmetric.memory import STATUS_WORD

DEFAULT_TIMEOUT_S = 30.0
# Polls of a signal in a second, as far as known: a kernel counts, because it has no clock that the interpreter has.
_TRIES_PER_S = {"cpu": 3_000, "cuda": 1_000_000}
_MOST_TRIES = (1 << 31) - 1
_LAST_EPOCH = (1 << 31) - 1


class Workspace:
    """See the module. Made by `workspace`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.timeout_s = DEFAULT_TIMEOUT_S
        self.epoch = 0
        self._group, self._device = weakref.ref(group), device  # what is kept for a group does not keep the group
        self._memory: SymmetricMemory | None = None
        self._opened = 0
        self._failed: ResilientError | None = None
        # Where a GPU leaves its status after each launch, so that nobody has to wait to see it.
        self._left = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")

    @property
    def memory(self) -> SymmetricMemory:
        """Of the last call. Raises UsageError when there was none."""
        if self._memory is None:
            raise UsageError("no fused call has been made in this group")
        return self._memory

    @property
    def tries(self) -> int:
        return min(_MOST_TRIES, max(1, int(self.timeout_s * _TRIES_PER_S[self._device.type])))

    def begin(self, call: Call) -> SymmetricMemory:
        """The memory for the next call, whose number is then `epoch`.

        Blocks when memory has to be made, until all ranks are there. Raises what made an earlier call of this group
        fail, and what `open_symmetric` raises.
        """
        if self._failed is not None:
            raise type(self._failed)(*self._failed.args)
        self._raise_if_failed("an earlier fused call")
        memory = self._memory
        if memory is None or call.buffer_bytes > memory.buffer_bytes or call.signal_words > memory.signal_words:
            memory = self._grow(call)
        self.epoch = _next(self.epoch)
        memory.begin_call(self.epoch)
        return memory

    def finish(self, call: Call) -> None:
        """Raise what went wrong in a launch that is over. On CUDA, where it is not, `check` or a later `begin` does."""
        if self._device.type == "cpu":
            self._raise_if_failed(str(call))
            self.memory.end_call(self.epoch)
        else:
            self._left.copy_(self._status(self.memory), non_blocking=True)

    def check(self) -> None:
        """Wait for what was launched, and raise what went wrong."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._raise_if_failed("a fused call")

    def close(self) -> None:
        """Let go of the memory; the next call makes another."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    @staticmethod
    def _status(memory: SymmetricMemory) -> Tensor:
        return memory.get_signals(memory.rank)[STATUS_WORD : STATUS_WORD + 1]

    def _raise_if_failed(self, what: str) -> None:
        if self._memory is None:
            return
        word = int(self._left if self._device.type == "cuda" else self._status(self._memory))
        if not word:
            return
        try:
            raise_failure(word, what, self.timeout_s)
        except ResilientError as error:
            self._failed = error
            raise

    def _grow(self, call: Call) -> SymmetricMemory:
        old, group = self._memory, self._group()
        assert group is not None  # who calls has it
        if old is not None:
            self._announce(old, call)
        buffer_bytes = max(call.buffer_bytes, old.buffer_bytes if old else 0)
        signal_words = max(call.signal_words, old.signal_words if old else 0)
        self._opened += 1
        memory = open_symmetric(
            group,
            self._device,
            name=f"fused/{self._device.type}/{self._opened}",  # each name once in a group
            buffer_bytes=buffer_bytes,
            signal_words=signal_words,
            timeout_s=self.timeout_s,
            waiting=lambda: self._raise_if_elsewhere(old, call),
        )
        if old is not None:
            old.close()
        self._memory = memory
        return memory

    def _announce(self, old: SymmetricMemory, call: Call) -> None:
        """Enter the next call in the memory that is too small: a rank for which it is not makes another call."""
        for other in range(old.size):
            pad = old.get_signals(other)
            pad[FREE_WORD + old.size + old.rank] = call.fingerprint
            pad[FREE_WORD + old.rank] = _next(self.epoch)

    def _raise_if_elsewhere(self, old: SymmetricMemory | None, call: Call) -> None:
        """Raise when another rank has found out, in the old memory, that calls differ; or that one is gone."""
        word = 0 if old is None else int(old.get_signals(old.rank)[FAILURE_WORD])
        if word:
            raise_failure(word, str(call), self.timeout_s)


def _next(epoch: int) -> int:
    return epoch + 1 if epoch < _LAST_EPOCH else 1


_workspaces: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Workspace]]" = weakref.WeakKeyDictionary()


def workspace(group: dist.ProcessGroup, device: torch.device) -> Workspace:
    """The workspace of a group on a device; made when first asked for, without memory. Closed when the group ends."""
    devices = _workspaces.setdefault(group, {})
    device = _exactly(device)
    if device not in devices:
        devices[device] = Workspace(group, device)
        weakref.finalize(group, devices[device].close).atexit = False  # at exit the memory looks after itself
    return devices[device]


def workspaces(group: dist.ProcessGroup, device: torch.device | None) -> list[Workspace]:
    """Those that a group has: on a device, or on all."""
    devices = _workspaces.get(group, {})
    return list(devices.values()) if device is None else [devices[one] for one in devices if one == _exactly(device)]


def _exactly(device: torch.device) -> torch.device:
    """As tensors name it: there is one CPU, and "cuda" is the current device."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device
