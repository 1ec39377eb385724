"""Every way of saving that is compared, behind one small seam; ours is one of them (`bench/ours.py`).

Peers are set up as their documentation advises and are given what favours them: the state dict is made once and its
live tensors are reused, process-based ones are started and staging buffers are filled by a first save that is not
counted, old checkpoints are deleted by another thread. Their packages are imported where they are used, so that one
that is not installed fails alone.
"""

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.limits import TensorCopy
from bench.state import Training

KEPT = 2


class Method(ABC):
    """Saves one training's state again and again. All calls come from the training thread."""

    is_async = False

    def __init__(self, training: Training, folder: Path, *, fsynced: bool) -> None:
        """`fsynced`: a peer that leaves its files to the page cache has them fsynced by a thread after each save."""
        self.training = training
        self.folder = folder
        self.fsynced = fsynced
        self._thread = ThreadPoolExecutor(1)
        self._after: list[Future[float]] = []

    @abstractmethod
    def save(self, step: int) -> Future[float]:
        """Save; may return early. The future gives the `time.perf_counter()` at which the checkpoint was safe."""

    def updating(self) -> AbstractContextManager[object]:
        """Surrounds the optimizer's step: waits, where a method must, until parameters may change."""
        return nullcontext()

    def finish(self) -> None:
        """Block until all that was saved is safe, and let go of processes and threads."""
        for future in self._after:
            future.result()
        self._thread.shutdown()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _settled(self, step: int, written: Future[Any] | None, fsync: bool) -> Future[float]:
        """Wait for `written` in the thread, fsync if wished, and delete what is no longer kept."""

        def settle() -> float:
            if written is not None:
                written.result()
            if fsync:
                fsync_all(self._path(step))
            safe = time.perf_counter()
            if dist.get_rank() == 0:
                shutil.rmtree(self._path(step - KEPT), ignore_errors=True)
            return safe

        self._after.append(self._thread.submit(settle))
        return self._after[-1]


def fsync_all(folder: Path) -> None:
    """fsync every file below a folder, and its folders."""
    for root, _, names in os.walk(folder):
        for path in [*(Path(root) / name for name in names), Path(root)]:
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _at_once() -> Future[float]:
    future: Future[float] = Future()
    future.set_result(time.perf_counter())
    return future


class Nothing(Method):
    """No checkpoint at all: the bare steps."""

    def save(self, step: int) -> Future[float]:
        return _at_once()


class Memcpy(Method):
    """One copy of every tensor into kept memory, on the training thread: the limit of anything that copies first."""

    def __init__(self, training: Training, folder: Path, *, fsynced: bool) -> None:
        super().__init__(training, folder, fsynced=fsynced)
        self._copy = TensorCopy([tensor for part in training.tensors.values() for tensor in part.values()])

    def save(self, step: int) -> Future[float]:
        self._copy()
        return _at_once()


class TorchSave(Method):
    """torch.save by rank 0, as data-parallel jobs do."""

    def save(self, step: int) -> Future[float]:
        if dist.get_rank() == 0:
            self._path(step).mkdir()
            torch.save(self.training.tensors, self._path(step) / "state.pt")
        return self._settled(step, None, self.fsynced)


class TorchSaveSynced(Method):
    """torch.save and fsync before it returns: what a checkpoint costs that is on the disk when the call is over."""

    def save(self, step: int) -> Future[float]:
        if dist.get_rank() == 0:
            self._path(step).mkdir()
            torch.save(self.training.tensors, self._path(step) / "state.pt")
            fsync_all(self._path(step))
        return self._settled(step, None, False)


class Safetensors(Method):
    """safetensors' save_file by rank 0."""

    def save(self, step: int) -> Future[float]:
        from safetensors.torch import save_file

        if dist.get_rank() == 0:
            parts = self.training.tensors
            flat = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
            self._path(step).mkdir()
            save_file(flat, self._path(step) / "state.safetensors")
        return self._settled(step, None, self.fsynced)


class DcpSave(Method):
    """torch.distributed.checkpoint.save; it fsyncs its data by itself."""

    def save(self, step: int) -> Future[float]:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.training.tensors, checkpoint_id=self._path(step))
        return self._settled(step, None, False)


class DcpAsync(Method):
    """torch.distributed.checkpoint.async_save, in the three ways that it offers on a CPU."""

    is_async = True

    def __init__(self, training: Training, folder: Path, *, fsynced: bool, process: bool, stager: str | None) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(training, folder, fsynced=fsynced)
        self._process = process
        self._stager = None
        if stager is not None:
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=stager == "shared memory",
                use_async_staging=stager == "async",
                use_non_blocking_copy=False,
            )
            self._stager = DefaultStager(options)
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any] | None = None

    def save(self, step: int) -> Future[float]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

        if self._uploaded is not None:
            self._uploaded.result()  # one at a time: its buffers are reused, and so is its process group
        kind = AsyncCheckpointerType.PROCESS if self._process else AsyncCheckpointerType.THREAD
        saved = dcp.async_save(
            self.training.tensors,
            checkpoint_id=self._path(step),
            async_checkpointer_type=kind,
            async_stager=self._stager,
            process_group=self._group(),
        )
        if isinstance(saved, AsyncSaveResponse):
            self._staged, self._uploaded = saved.staging_completion, saved.upload_completion
        else:
            self._uploaded = saved
        return self._settled(step, self._uploaded, False)

    def _group(self) -> Any:
        """A group of its own: the background thread's collectives must not mix with those of the training."""
        if self._process:
            return None
        if not hasattr(self, "_own_group"):
            self._own_group = dist.new_group(backend="gloo")
        return self._own_group

    def updating(self) -> AbstractContextManager[object]:
        if self._staged is not None:
            self._staged.result()
            self._staged = None
        return nullcontext()

    def finish(self) -> None:
        super().finish()
        if self._stager is not None:
            self._stager.close()


class TorchCheckpointing(Method):
    """torch_checkpointing's manager, asynchronous, with staging ahead; direct I/O off, because it fails on ext4."""

    is_async = True

    def __init__(self, training: Training, folder: Path, *, fsynced: bool) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(training, folder, fsynced=fsynced)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._manager.prewarm_staging(training.tensors)

    def save(self, step: int) -> Future[float]:
        written = self._manager.save(str(self._path(step)), self.training.tensors)
        return self._settled(step, written, self.fsynced)

    def updating(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def finish(self) -> None:
        super().finish()
        self._manager.close()


def _dcp_thread(training: Training, folder: Path, *, fsynced: bool) -> Method:
    return DcpAsync(training, folder, fsynced=fsynced, process=False, stager=None)


def _dcp_staging(training: Training, folder: Path, *, fsynced: bool) -> Method:
    return DcpAsync(training, folder, fsynced=fsynced, process=False, stager="async")


def _dcp_process(training: Training, folder: Path, *, fsynced: bool) -> Method:
    return DcpAsync(training, folder, fsynced=fsynced, process=True, stager="shared memory")


PEERS: dict[str, Callable[..., Method]] = {
    "torch.save": TorchSave,
    "torch.save + fsync": TorchSaveSynced,
    "safetensors save_file": Safetensors,
    "dcp.save": DcpSave,
    "dcp.async_save, thread": _dcp_thread,
    "dcp.async_save, async staging": _dcp_staging,
    "dcp.async_save, process": _dcp_process,
    "torch_checkpointing": TorchCheckpointing,
}
ASYNC_PEERS = (
    "dcp.async_save, thread",
    "dcp.async_save, async staging",
    "dcp.async_save, process",
    "torch_checkpointing",
)
