"""What the ranks of these tests do: bodies for `tests.multiprocess.ranks.run`, in processes of their own."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from resilient.errors import CollectiveFailed, CollectiveMismatch, CollectiveTimeout, UsageError
from resilient.kernels import dispatch
from resilient.kernels.dispatch import optional
from resilient.kernels.dispatch.cache import Cache, folder
from resilient.kernels.dispatch.costs import Costs, Line
from resilient.kernels.dispatch.decide import PLAIN, Choice, Method
from resilient.kernels.dispatch.dispatcher import Dispatcher, dispatcher_of
from resilient.kernels.dispatch.machine import key_of
from resilient.kernels.fused.workspace import workspace
from resilient.kernels.overlap.call import OPERATIONS, Call


def told(calls: list[Callable[[], object]]) -> list[str]:
    """The errors that each call raises, as all ranks have to."""
    texts = []
    for call in calls:
        try:
            call()
        except (UsageError, CollectiveMismatch) as error:
            texts.append(f"{type(error).__name__}: {error}")
        else:
            texts.append("nothing was said")
    return texts


def wrong_calls() -> list[str]:
    one, other = torch.ones(4, 6), torch.ones(6, 8)
    texts = told(
        [
            lambda: dispatch.all_gather_matmul(one, torch.ones(5, 8)),
            lambda: dispatch.all_gather_matmul(one.view(2, 2, 6), other),
            lambda: dispatch.matmul_reduce_scatter(torch.ones(5, 6), other),
            lambda: dispatch.matmul_all_reduce(one, other.double()),
            lambda: dispatch.matmul_all_reduce(one.int(), other.int()),
            lambda: dispatch.matmul_all_reduce(torch.ones(6, 4).t(), other),
            lambda: dispatch.matmul_all_reduce(one, other, bias=torch.ones(4)),
            lambda: dispatch.matmul_all_reduce(one, other, activation="tanh"),
            lambda: dispatch.matmul_all_reduce(one, other, method="quick"),  # type: ignore[arg-type]
            lambda: dispatch.matmul_all_reduce(one, other, method="chunked", chunks=0),
            lambda: dispatch.matmul_all_reduce(one[:0], other),
            lambda: dispatch.replicated_matmul(one, torch.ones(5, 8)),
        ]
    )
    # Nothing was left behind: the group still works.
    product = dispatch.matmul_all_reduce(one, other)
    assert torch.equal(product, torch.full((4, 8), 6.0 * dist.get_world_size()))
    return texts


def differing_calls() -> list[str]:
    """Ranks that disagree, or of which one is wrong."""
    rank = dist.get_rank()
    rows = torch.ones(8 if rank == 0 else 16, 6)
    weight = torch.ones(6, 8)
    texts = told(
        [
            lambda: dispatch.matmul_all_reduce(rows, weight),
            lambda: dispatch.all_gather_matmul(rows, weight, method="chunked"),
            lambda: (dispatch.matmul_all_reduce if rank else dispatch.matmul_reduce_scatter)(torch.ones(8, 6), weight),
            lambda: dispatch.matmul_all_reduce(torch.ones(4, 6), weight.double() if rank == 1 else weight),
        ]
    )
    dispatch.matmul_all_reduce(torch.ones(6, 6), weight)
    return texts


def settling(folder: str, calls: int) -> list[str]:
    """A shape that can be cut, called until there is a verdict; what is said of it."""
    os.environ["RESILIENT_CACHE_DIR"] = folder
    rows, weight = torch.ones(512, 64), torch.ones(64, 32)
    assert dispatch.explain("all_gather_matmul", rows, weight) is None
    said = []
    for _ in range(calls):
        product = dispatch.all_gather_matmul(rows, weight)
        assert bool((product == 64).all())
        explained = dispatch.explain("all_gather_matmul", rows, weight)
        assert explained is not None
        said.append(f"{explained.choice} {explained.settled}")
    return [*said, str(dispatch.explain("all_gather_matmul", rows, weight))]


def in_other_modes() -> None:
    """Autocast, inference mode, and activations that are computed again in the backward."""
    group = dist.group.WORLD
    assert group is not None
    rows = torch.ones(4, 6, requires_grad=True)
    weight = torch.ones(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.matmul_all_reduce(rows, weight).dtype == torch.bfloat16
    with torch.inference_mode():
        assert bool((dispatch.matmul_all_reduce(rows, weight) == 6 * group.size()).all())

    def layer(rows: Tensor) -> Tensor:
        return dispatch.matmul_reduce_scatter(rows, weight, activation="relu")

    output = checkpoint(layer, rows, use_reentrant=False)
    assert isinstance(output, Tensor)
    output.sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad == 8).all())


def small() -> list[Any]:
    """A shape that cannot be cut: what is said of it, after its first call and how many costs were measured."""
    rows, weight = torch.ones(64, 8), torch.ones(8, 8)
    dispatch.matmul_all_reduce(rows, weight)
    explained = dispatch.explain("matmul_all_reduce", rows, weight)
    assert explained is not None
    group = dist.group.WORLD
    assert group is not None
    return [str(explained), explained.settled, len(dispatcher_of(group)._costs)]


def python_calls(method: Method | None) -> int:
    """How many functions of Python a call of a small shape enters, once its way is known."""
    rows, weight, group = torch.ones(16, 8), torch.ones(8, 8), dist.group.WORLD
    for _ in range(2):
        dispatch.matmul_all_reduce(rows, weight, group, method=method)
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "kernels" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    dispatch.matmul_all_reduce(rows, weight, group, method=method)
    sys.setprofile(None)
    return len(entered)


def a_peer_goes(operation: str, backward: bool) -> list[Any]:
    """The last rank's process ends, and leaves its group as it is; what the others get, and after how long."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(timeout=timedelta(seconds=20))
    assert group is not None
    function: Any = getattr(dispatch, operation)
    rows = torch.ones(1024 * world, 64, requires_grad=True)
    weight = torch.ones(64, 64, requires_grad=True)

    def call() -> Tensor:
        return function(rows, weight, group, method="chunked", chunks=4)  # type: ignore[no-any-return]

    call().sum().backward()
    dist.barrier()
    product = call() if backward else None
    if rank == world - 1:
        return ["ended", "", 0.0]  # and so does its process, at once
    began = time.monotonic()
    try:
        for _ in range(3):
            if product is None:
                call()
            else:
                product.sum().backward()
                product = call()
    except RuntimeError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing was said", "", 0.0]


def rows_that_vary() -> list[str]:
    """Two shapes that differ in rows only, the second after the verdict on the first."""
    weight = torch.ones(64, 32)
    for rows in (600, 640):
        for _ in range(80):
            dispatch.matmul_all_reduce(torch.ones(rows, 64), weight)
            explained = dispatch.explain("matmul_all_reduce", torch.ones(rows, 64), weight)
            assert explained is not None
            if explained.settled:
                break
    return [f"{call.rows}: {said.choice}, {said.reason}" for call, said in dispatch.explanations().items()]


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def call_of(rows: int, inner: int = 512) -> Call:
    return Call(
        operation="matmul_all_reduce", rows=rows, inner=inner, columns=512, dtype="float32", device="cpu",
        world=dist.get_world_size(),
    )  # fmt: skip


def settled(dispatcher: Dispatcher, call: Call, group: Any, way: Callable[[Choice], Any], least: int = 1) -> str:
    """Call until there is a verdict, `least` times or more; what it is."""
    for number in range(100):
        dispatcher.run(call, group, way)
        explained = dispatcher.explain(call)
        assert explained is not None
        if explained.settled and number + 1 >= least:
            return str(explained.choice)
    raise AssertionError(f"no verdict on {call}")


def renewing() -> list[str]:
    """Ways whose times change for good: which one is taken before, and after."""
    dispatcher = Dispatcher(Cache(folder()), renew_after=20)
    taken = []
    for plain_s, others_s in ((0.01, 0.002), (0.002, 0.01)):
        way = partial(lambda choice, plain_s, others_s: spin(plain_s if choice == PLAIN else others_s),
                      plain_s=plain_s, others_s=others_s)  # fmt: skip
        taken.append(settled(dispatcher, call_of(512), dist.group.WORLD, way, 22))
    return taken


def renewing_the_only_way() -> list[str]:
    """A shape of which only the plain way was worth a try, until that takes much longer."""
    group = dist.group.WORLD
    assert group is not None
    call, cache = call_of(512, inner=8), Cache(folder())
    if group.rank() == 0:
        line = Line(latency_s=0.005, bytes_per_s=1e9)
        cache.keep(key_of(call, group), Costs(rates={32: 1e12}, lines=dict.fromkeys(OPERATIONS, line)))
    dispatcher = Dispatcher(cache, renew_after=20)
    before = settled(dispatcher, call, group, lambda _: spin(0.005))
    explained = dispatcher.explain(call)
    assert explained is not None
    assert list(explained.seen_s) == [PLAIN]
    return [before, settled(dispatcher, call, group, lambda choice: spin(0.04 if choice == PLAIN else 0.005), 22)]


def a_fused_way_that_fails(settled_before: bool) -> list[Any]:
    """On one rank, at the first fused call, or at that of another shape than the one it was found quicker for."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = Dispatcher(Cache(folder()), unfused=lambda call, group: None)
    world, taken, fails = group.size(), list[str](), False

    def way(choice: Choice) -> Tensor:
        if choice.method == "fused" and fails and group.rank() == 1:
            raise UsageError("these two share no memory")
        taken.append(str(choice))
        if choice.method == "fused":  # which does not go through the group
            spin(0.001)
            return torch.full((1,), float(world))
        spin(0.01)
        number = torch.ones(1)
        dist.all_reduce(number, group=group)
        return number

    first = settled(dispatcher, call_of(300), group, way) if settled_before else "none"
    taken.clear()
    fails = True
    results = [dispatcher.run(call_of(rows), group, way).item() for rows in (100, 100, 100, 300, 310)]
    assert results == [world] * 5
    said = [dispatcher.explain(call_of(rows)) for rows in (100, 300, 310)]
    assert not any("fused" in map(str, one.seen_s) for one in said if one)
    if group.rank() == 0:
        taken.remove("fused")  # the one that failed on the other rank
    verdicts = [settled(dispatcher, call_of(rows), group, way) for rows in (100, 300, 310)]
    return [first, taken, verdicts, [one.reason for one in dispatcher.explanations().values()]]


def a_fused_call_that_failed_before() -> list[str]:
    """Rank 1 leaves a fused call out; then all try fused kernels for another shape: what they are told each time."""
    os.environ["TRITON_INTERPRET"] = "1"
    group = dist.group.WORLD
    assert group is not None
    rows, weight, said = torch.ones(4, 6), torch.ones(6, 8), "left out"
    dispatch.matmul_all_reduce(rows, weight, method="fused")
    if group.rank() == 0:
        workspace(group, rows.device).timeout_s = 1.0
        try:
            dispatch.matmul_all_reduce(rows, weight, method="fused")
        except CollectiveTimeout as error:
            said = str(error)
    dispatcher = Dispatcher(Cache(folder()), unfused=optional.unsupported)
    try:
        return [said, settled(dispatcher, call_of(300), group, lambda _: None)]
    except CollectiveFailed as error:
        return [said, str(error)]


def one_wrong_replicated_call() -> list[str]:
    """Of which nothing is communicated: what the ranks are told when one of them is wrong, or has other rows."""
    odd = dist.get_rank() == 1
    return told(
        [
            lambda: dispatch.replicated_matmul(torch.ones(4, 6), torch.ones(5 if odd else 6, 8)),
            lambda: dispatch.replicated_matmul(torch.ones(5 if odd else 4, 6), torch.ones(6, 8)),
            lambda: dispatch.replicated_matmul(torch.ones(4, 6), torch.ones(6, 9 if odd else 8)),  # uneven columns
        ]
    )


def compiled(method: Method) -> None:
    """A gather and a scatter in one compiled function: what it gives, and its gradients, beside those without it."""
    os.environ["TRITON_INTERPRET"] = "1"  # for fused kernels, which are there for GPUs
    rank = dist.get_rank()
    shard = (torch.arange(24.0).view(4, 6) % 5 - rank).requires_grad_()
    up, down = ((torch.arange(48.0) % 7 - 3 + rank).view(*shape).requires_grad_() for shape in ((6, 8), (8, 6)))
    inputs = (shard, up, down)

    def block(shard: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = dispatch.all_gather_matmul(shard, up, method=method)
        return dispatch.matmul_reduce_scatter(hidden, down, method=method)

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        output = function(*inputs)
        gradients = torch.autograd.grad((output * output).sum(), inputs)
        return [output.detach(), *gradients]

    for one, other in zip(run(torch.compile(block, backend="aot_eager", fullgraph=True)), run(block), strict=True):
        torch.testing.assert_close(one, other)


def strides() -> list[str]:
    """Weights whose gradient is laid out otherwise than a compiler is told, by operator."""
    group = dist.group.WORLD
    assert group is not None
    wide, name = torch.randn(6, 16), group.group_name
    weights = [wide[:, :8], wide[:, ::2], wide.t()[:8].t(), wide.t()[::2].t(), wide.t()[:6].t(), wide[:, :1], wide[:1]]
    wrong = []
    for weight in [*weights, torch.randn(6, 8), torch.randn(8, 6).t()]:
        inner, columns = weight.shape
        grad, rows = torch.randn(4, columns), torch.randn(4, inner)
        share, whole = torch.randn(2, columns), torch.randn(4, inner)
        calls: dict[str, tuple[Any, ...]] = {
            "all_gather_matmul_backward": (grad, rows, weight, name, "plain", True),
            "matmul_reduce_scatter_backward": (share, whole, weight, name, "plain", True, True),
            "replicated_matmul_backward": (grad, rows, weight, name, "plain", True),
        }
        for operator, arguments in calls.items():
            function = getattr(torch.ops.resilient_kernels, operator)
            real = function(*arguments)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in arguments]
                fake = function(*fakes)
            if [one.stride() for one in real] != [one.stride() for one in fake]:
                wrong.append(f"{operator} of {list(weight.shape)} with {weight.stride()}: {real[1].stride()}")
    return wrong


def captured(place: str) -> list[str]:
    """Which ways a shape with another verdict takes while a GPU's work is captured, and one that is new."""
    group, taken, cache = dist.group.WORLD, list[str](), Cache(Path(place))
    assert group is not None
    call = replace(call_of(300), device="cuda")
    line = Line(latency_s=0.001, bytes_per_s=1e9)
    cache.keep(key_of(call, group), Costs(rates={32: 1e12}, lines=dict.fromkeys(OPERATIONS, line)))
    dispatcher = Dispatcher(cache, unfused=lambda call, group: None)

    def way(choice: Choice) -> Tensor:
        taken.append(str(choice))
        torch.cuda._sleep(1_000_000 if choice == PLAIN else 1_000)
        return torch.ones(8, device="cuda")

    assert settled(dispatcher, call, group, way) == "fused"
    taken.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        dispatcher.run(call, group, way)
        dispatcher.run(replace(call, rows=2000), group, way)
    assert dispatcher.explain(replace(call, rows=2000)) is None
    return taken
