"""What the ranks of these tests do: bodies for `tests.multiprocess.ranks.run`, in processes of their own."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from resilient.errors import UsageError
from resilient.kernels.layers import (
    AttentionProjections,
    ColumnParallelLinear,
    OverlappedColwise,
    OverlappedNorm,
    OverlappedRowwise,
    ParallelMLP,
    RowParallelLinear,
    gather_sequence,
    scatter_sequence,
)

WIDTH, HIDDEN, TIME, BATCH = 16, 32, 8, 2


class Net(nn.Module):
    """A norm and a feed-forward layer with a residual, as in a transformer."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = input + self.down(torch.nn.functional.gelu(self.up(self.norm(input))))
        return output


def plain(norm: type[nn.Module] = nn.LayerNorm) -> Net:
    torch.manual_seed(0)
    return Net(norm).double()


def cut(mesh: DeviceMesh, sequence: bool, norm: type[nn.Module] = nn.LayerNorm, dim: int = 1) -> Net:
    net = plain(norm)
    styles: Any = {
        "up": OverlappedColwise(sequence_parallel=sequence, sequence_dim=dim),
        "down": OverlappedRowwise(sequence_parallel=sequence, sequence_dim=dim),
    }
    if sequence:
        styles["norm"] = OverlappedNorm()
    parallelize_module(net, mesh, styles)
    return net


def batch(step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(BATCH * 2, TIME, WIDTH, generator=generator, dtype=torch.float64)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def mesh_of(size: int | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", (size or dist.get_world_size(),), mesh_dim_names=("tp",))


def as_the_plain_one(sequence: bool, dim: int = 1, norm: type[nn.Module] = nn.LayerNorm) -> None:
    """Outputs, input gradients and parameter gradients."""
    mesh = mesh_of()
    net, ours = plain(norm), cut(mesh, sequence, norm, dim)
    one, other = batch(0).requires_grad_(), batch(0).requires_grad_()
    wanted = net(one)
    taken = scatter_sequence(other, mesh, dim) if sequence else other
    product = gather_sequence(ours(taken), mesh, dim) if sequence else ours(taken)
    close(product, wanted)
    for output in (wanted, product):
        output.sin().sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    close(other.grad, one.grad)
    for (name, parameter), theirs in zip(ours.named_parameters(), net.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert theirs.grad is not None
        close(whole(parameter.grad), theirs.grad)


def placements() -> dict[str, str]:
    """What checkpoints see."""
    net = cut(mesh_of(), True)
    state: dict[str, Any] = get_model_state_dict(net)
    assert list(state) == list(plain().state_dict())
    for name, value in plain().state_dict().items():
        assert state[name].shape == value.shape
        close(state[name].full_tensor(), value)
    return {name: str(value.placements[0]) for name, value in state.items()}


def compiled(sequence: bool) -> None:
    mesh = mesh_of()
    eager, ours = cut(mesh, sequence), cut(mesh, sequence)
    made = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for step in range(2):
        input = batch(step)
        if sequence:
            input = scatter_sequence(input, mesh)
        one, other = eager(input), made(input)
        close(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        close(whole(mine.grad), whole(theirs.grad))


def trained(net: nn.Module, groups: int, place: int, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    """With data parallelism over `groups`, of which this is number `place`: the losses of this one's share."""
    losses = []
    for step in range(steps):
        share = batch(step % 2).chunk(groups)[place]
        loss = net(share).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(whole(loss.detach())))
    return losses


def inside_others(how: str) -> list[float]:
    """Two ranks of tensor parallelism in each of two of data parallelism: the losses, averaged over the data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net: nn.Module = cut(mesh["tp"], False)
    if how == "ddp":
        net = DistributedDataParallel(net, device_mesh=mesh["dp"])
    else:
        fully_shard(net, mesh=mesh["dp"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = trained(net, 2, mesh["dp"].get_local_rank(), optimizer)
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=mesh["dp"].get_group())
    reference = plain()
    wanted = trained(reference, 1, 0, torch.optim.SGD(reference.parameters(), lr=0.1))
    close(total / 2, torch.tensor(wanted, dtype=torch.float64))
    return wanted


def blocks() -> None:
    """The same modules over all ranks and over one: that is what plain ones are."""
    mesh, alone = mesh_of(), DeviceMesh("cpu", [dist.get_rank()], mesh_dim_names=("tp",))
    for gated in (False, True):
        torch.manual_seed(1)
        ours = ParallelMLP(WIDTH, HIDDEN, mesh, gated=gated, activation="silu").double()
        torch.manual_seed(1)
        theirs = ParallelMLP(WIDTH, HIDDEN, alone, gated=gated, activation="silu").double()
        close(ours(batch(0)), theirs(batch(0)))
    for sequence in (False, True):
        torch.manual_seed(2)
        attention = AttentionProjections(WIDTH, 8, mesh, key_value_heads=4, sequence_parallel=sequence).double()
        torch.manual_seed(2)
        other = AttentionProjections(WIDTH, 8, alone, key_value_heads=4).double()
        input = scatter_sequence(batch(0), mesh) if sequence else batch(0)
        merged = attention.merge(_attended(*attention.project(input)))
        merged = gather_sequence(merged, mesh) if sequence else merged
        close(merged, other.merge(_attended(*other.project(batch(0)))))


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2)


def wrong_layers() -> list[str]:
    """What they say."""
    mesh = mesh_of()
    column = ColumnParallelLinear(4, 2 * mesh.size(), mesh, bias=False)
    row = RowParallelLinear(mesh.size(), 4, mesh, sequence_parallel=True)
    calls: list[Any] = [
        lambda: ColumnParallelLinear(4, 2 * mesh.size() + 1, mesh),
        lambda: RowParallelLinear(2 * mesh.size() + 1, 4, mesh),
        lambda: OverlappedColwise()._apply(nn.LayerNorm(3), mesh),
        lambda: OverlappedColwise()._apply(column, mesh),
        lambda: OverlappedNorm()._apply(nn.Linear(3, 3), mesh),
        lambda: AttentionProjections(12, 3, mesh),
        lambda: row(torch.ones(1, mesh.size() + 1, 1)),
        lambda: column(torch.ones(2, 5)),
        lambda: scatter_sequence(torch.ones(1, mesh.size() + 1, 1), mesh),
        lambda: ColumnParallelLinear(4, 4, init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("a", "b"))),
    ]
    told = []
    for call in calls:
        try:
            call()
        except UsageError as error:
            told.append(str(error))
        else:
            told.append("nothing was said")
    return told


PLACED = {"sharded 0": Shard(0), "sharded 1": Shard(1), "replicated": Replicate()}
