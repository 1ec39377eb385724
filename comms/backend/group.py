"""The backend "resilient": large tensors in main memory go over lanes, everything else over gloo, or NCCL on a GPU.

Where lanes do not pay (one host, one path, no topology) the group is gloo's own, and costs what gloo does. Otherwise it
is a `ProcessGroup` written in Python, which is the only kind of backend that torch lets Python write. torch calls its
methods by names that differ between versions; those of 2.9 to 2.13 are all here.
"""

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from resilient.comms.backend.opening import open_group
from resilient.comms.backend.options import Options
from resilient.comms.backend.striped import Striped
from resilient.comms.backend.worker import Work
from resilient.comms.collectives import fold
from resilient.comms.collectives.fold import Reduction
from resilient.errors import UsageError

NAME = "resilient"
_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_REDUCTIONS: dict[Any, Reduction] = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "product",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
}
_NAMES = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")


def register() -> None:
    """Make "resilient" known to `init_process_group` and `new_group`. Again is nothing."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, create, devices=["cpu"])


def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A group of ranks, as torch asks for it. Raises UsageError on all ranks alike where a topology cannot be used."""
    options = Options.from_environment()
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
    if size == 1:
        return gloo
    opened = open_group(store, rank, size, options, timeout.total_seconds())
    if rank == 0:
        _log.info("collectives over %s: %s", opened.decision.action, opened.decision.reason)
    if opened.striped is None:
        return gloo
    return ResilientProcessGroup(gloo, opened.striped, options.stripe_from, _nccl(store, rank, size, timeout))


def _nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """torch drops the other device's backend when a backend is written in Python, so it is made here."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)


if TYPE_CHECKING:

    class _Base:
        """What is used of it. The stubs of torch know other forms of the methods than those that torch calls."""

        def __init__(self, rank: int, size: int) -> None: ...
        def _register_backend(self, device: torch.device, kind: Any, backend: Any) -> None: ...
        def _set_default_backend(self, kind: Any) -> None: ...
        def _get_backend(self, device: torch.device) -> Any: ...

else:
    _Base = dist.ProcessGroup


class ResilientProcessGroup(_Base):
    """Tensors of at least `stripe_from` bytes go over lanes; 0: all, barriers as well.

    Works over lanes are finished in the order in which they began.
    """

    def __init__(self, gloo: Any, striped: Striped, stripe_from: int, nccl: Any = None) -> None:
        super().__init__(striped.rank, striped.size)  # the only constructor whose object C++ can call
        self._gloo, self._striped, self._from, self._nccl = gloo, striped, stripe_from, nccl
        # What is not overridden here is done by the backend that is registered, and it carries the group's name.
        self._register_backend(_CPU, dist.ProcessGroup.BackendType.CUSTOM, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
        if nccl is not None:
            self._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)

    @property
    def striped(self) -> Striped:
        """The lanes' own interface: reports, abort."""
        return self._striped

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        opts = opts if opts is not None else AllreduceOptions()
        tensor = tensors[0]
        if tensor.nbytes < self._from or not self._takes(tensor):
            return self._of(tensor).allreduce(tensors, opts)
        reduction = _reduction(opts.reduceOp, tensor)
        if reduction is None:
            return self._gloo.allreduce(tensors, opts)
        return self._striped.all_reduce(tensor, reduction)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        opts = opts if opts is not None else AllreduceCoalescedOptions()
        if sum(tensor.nbytes for tensor in tensors) < self._from or not self._takes(*tensors):
            return self._of(tensors[0]).allreduce_coalesced(tensors, opts)
        one = AllreduceOptions()
        one.reduceOp = opts.reduceOp
        return _All([self.allreduce([tensor], one) for tensor in tensors], tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        opts = opts if opts is not None else BroadcastOptions()
        tensor = tensors[0]
        if tensor.nbytes < self._from or not self._takes(tensor):
            return self._of(tensor).broadcast(tensors, opts)
        return self._striped.broadcast(tensor, opts.rootRank)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        if output.nbytes < self._from or not self._takes(output, input):
            return self._of(output)._allgather_base(output, input, opts)
        return self._striped.all_gather(output, input)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _All([self.all_gather_single(output, input, opts) for output, input in pairs], outputs)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        (parts,), (tensor,) = outputs, inputs
        alike = all(part.shape == tensor.shape and part.dtype == tensor.dtype for part in parts)
        if not alike or tensor.nbytes * self._striped.size < self._from or not self._takes(tensor, *parts):
            return self._of(tensor).allgather(outputs, inputs, opts)
        whole = torch.empty((len(parts), *tensor.shape), dtype=tensor.dtype)
        return _Then(self._striped.all_gather(whole, tensor), parts, whole)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        opts = opts if opts is not None else ReduceScatterOptions()
        if input.nbytes < self._from or not self._takes(output, input):
            return self._of(input)._reduce_scatter_base(output, input, opts)
        reduction = _reduction(opts.reduceOp, input)
        if reduction is None:
            return self._gloo._reduce_scatter_base(output, input, opts)
        return self._striped.reduce_scatter(output, input, reduction)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _All([self.reduce_scatter_single(output, input, opts) for output, input in pairs], outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        opts = opts if opts is not None else ReduceScatterOptions()
        (output,), (parts,) = outputs, inputs
        alike = all(part.shape == output.shape and part.dtype == output.dtype for part in parts)
        nbytes = output.nbytes * self._striped.size
        if not alike or nbytes < self._from or not self._takes(output, *parts):
            return self._of(output).reduce_scatter(outputs, inputs, opts)
        return self.reduce_scatter_single(output, torch.stack([part.detach() for part in parts]), opts)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Any:
        opts = opts if opts is not None else AllToAllOptions()
        # With splits, ranks cannot see one another's sizes, so all of them take the same way: lanes.
        small = not output_splits and not input_splits and input.nbytes < self._from
        if small or not self._takes(output, input):
            return self._of(output).alltoall_base(output, input, output_splits, input_splits, opts)
        return self._striped.all_to_all(output, input, output_splits, input_splits)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        opts = opts if opts is not None else AllToAllOptions()
        if not self._takes(*outputs, *inputs) or len({tensor.dtype for tensor in (*outputs, *inputs)}) > 1:
            return self._of(outputs[0]).alltoall(outputs, inputs, opts)
        # As with splits: others may send other sizes, so all of them take the same way.
        sent, received = [one.numel() for one in inputs], [one.numel() for one in outputs]
        whole = torch.empty(sum(received), dtype=outputs[0].dtype)
        source = torch.cat([one.detach().reshape(-1) for one in inputs])
        return _Then(self._striped.all_to_all(whole, source, received, sent), outputs, whole)

    def send(self, tensors: list[Tensor], target: int, tag: int) -> Any:
        (tensor,) = tensors
        if tensor.nbytes < self._from or not self._takes(tensor):
            return self._of(tensor).send(tensors, target, tag)
        return self._striped.send(tensor, target, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        (tensor,) = tensors
        if tensor.nbytes < self._from or not self._takes(tensor):
            return self._of(tensor).recv(tensors, source, tag)
        return self._striped.receive(tensor, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Any:
        (tensor,) = tensors
        if tensor.nbytes >= self._from and self._takes(tensor):
            raise UsageError(
                f"a message of {tensor.nbytes} bytes from any rank cannot be received: name the source, or set "
                "RESILIENT_STRIPE_FROM to more than that on all ranks"
            )
        return self._of(tensor).recv_anysource(tensors, tag)

    def barrier(self, opts: Any = None) -> Any:
        if self._from:
            return self._gloo.barrier() if opts is None else self._gloo.barrier(opts)
        return self._striped.all_reduce(torch.zeros(1))

    def abort(self) -> None:
        """Every rank's collectives over lanes fail at once, with the same error."""
        self._striped.abort("abort() was called")
        self._gloo.abort()
        if self._nccl is not None:
            self._nccl.abort()

    def shutdown(self) -> None:
        """By `destroy_process_group`."""
        self._striped.close()
        self._gloo.shutdown()
        if self._nccl is not None:
            self._nccl.shutdown()

    def _takes(self, *tensors: Tensor) -> bool:
        """Whether lanes can carry tensors of this kind."""
        return all(tensor.device == _CPU and tensor.layout == torch.strided for tensor in tensors)

    def _of(self, tensor: Tensor) -> Any:
        return self._gloo if tensor.device == _CPU else self._get_backend(tensor.device)


# torch 2.9 to 2.12 call these by other names.
for _new, _old in {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}.items():
    setattr(ResilientProcessGroup, _old, getattr(ResilientProcessGroup, _new))


def _reduction(op: Any, tensor: Tensor) -> Reduction | None:
    """None: gloo has it, lanes have not. Raises UsageError where neither can."""
    reduction: Reduction | None = next((name for known, name in _REDUCTIONS.items() if op == known), None)
    if reduction is not None and fold.supported(reduction, tensor.dtype):
        return reduction
    if reduction is None and not tensor.dtype.is_floating_point and tensor.dtype in fold.INTEGERS:
        return None  # of bits
    name = next((name for name in _NAMES if op == getattr(dist.ReduceOp, name)), "this operation")
    raise UsageError(
        f"{name} of {tensor.dtype} cannot be reduced on the CPU; possible are SUM, PRODUCT, MIN and MAX of "
        f"{', '.join(str(one).removeprefix('torch.') for one in (*fold.FLOATS, *fold.INTEGERS))}, AVG of "
        "floating-point numbers, and BAND, BOR and BXOR of integers"
    )


class _All(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[Any], tensors: list[Tensor]) -> None:
        super().__init__()
        self._works, self._tensors = works, tensors

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout) if timeout else work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> Any:
        parts = torch.futures.collect_all([work.get_future() for work in self._works])
        return parts.then(lambda done: [part.value() for part in done.value()] and self._tensors)


class _Then(dist.Work):
    """A work whose result is then copied to where it was wanted."""

    def __init__(self, work: Work, tensors: list[Tensor], whole: Tensor) -> None:
        super().__init__()
        self._work, self._tensors = work, tensors
        self._future = work.get_future().then(lambda done: done.value() and self._copied(whole))

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._work.wait(timeout)
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        return self._future.done()

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> Any:
        return self._future

    def _copied(self, whole: Tensor) -> list[Tensor]:
        parts = whole.view(-1).split([tensor.numel() for tensor in self._tensors])
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.detach().copy_(part.view(tensor.shape))
        return self._tensors
