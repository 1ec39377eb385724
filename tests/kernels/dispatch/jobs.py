"""What the ranks of these tests do: bodies for `tests.multiprocess.ranks.run`, in processes of their own."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resilient.errors import CollectiveMismatch, UsageError
from resilient.kernels import dispatch
from resilient.kernels.dispatch.cache import Cache, folder
from resilient.kernels.dispatch.decide import PLAIN, Choice
from resilient.kernels.dispatch.dispatcher import Dispatcher, dispatcher_of
from resilient.kernels.overlap.call import Call


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


def renewing() -> list[str]:
    """Ways whose times change for good: which one is taken before, and after."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = Dispatcher(Cache(folder()), renew_after=20)
    call = Call(
        operation="matmul_all_reduce", rows=512, inner=512, columns=512, dtype="float32", device="cpu",
        world=group.size(),
    )  # fmt: skip

    def take(choice: Choice, plain_s: float, others_s: float) -> None:
        end = time.perf_counter() + (plain_s if choice == PLAIN else others_s)
        while time.perf_counter() < end:
            pass

    taken = []
    for plain_s, others_s in ((0.01, 0.002), (0.002, 0.01)):
        way = partial(take, plain_s=plain_s, others_s=others_s)
        for number in range(100):
            dispatcher.run(call, group, way)
            explained = dispatcher.explain(call)
            assert explained is not None
            if explained.settled and number > 20:
                taken.append(str(explained.choice))
                break
    return taken
