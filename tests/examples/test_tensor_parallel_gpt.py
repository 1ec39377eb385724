"""The example for tensor parallelism: the losses of a model that is not cut, also when the number of ranks changes."""

import argparse
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from examples.tensor_parallel_gpt import train
from tests.multiprocess import ranks


def losses(url: Path, steps: int) -> list[float]:
    """The body of a rank."""
    arguments = argparse.Namespace(size="demo", batch=2, url=str(url), every=3, steps=steps)
    return train(arguments, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))


@pytest.mark.usefixtures("runtime_dir")
def test_two_ranks_train_to_the_losses_of_one_which_can_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    alone = ranks.run(losses, 1, tmp_path / "alone", 9)[0]
    cut = ranks.run(losses, 2, tmp_path / "cut", 6)
    later = ranks.run(losses, 1, tmp_path / "cut", 9)[0]
    assert len(later) == 3
    assert cut[0] == cut[1]
    assert [*cut[0], *later] == pytest.approx(alone, rel=1e-5)
    assert alone[8] < alone[0] - 1
