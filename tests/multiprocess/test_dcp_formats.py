"""Checkpoints that torch's DCP wrote from several ranks are read; what we write DCP loads into other worlds."""

from pathlib import Path

import pytest

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from tests.multiprocess import dcp_jobs, distributed_jobs, reshape_jobs
from tests.multiprocess.ranks import run

pytestmark = pytest.mark.usefixtures("runtime_dir")

SAVED = {
    "DDP": (reshape_jobs.ddp, 2, False),
    "FSDP2": (reshape_jobs.fsdp, 2, True),
    "FSDP2 of replicas": (reshape_jobs.hsdp, 4, False),
    "FSDP2 with tensor parallelism": (reshape_jobs.tensor_parallel, 4, True),
    "FSDP2, uneven": (distributed_jobs.fsdp_uneven, 2, False),
}
LOADED = {
    "FSDP2 of 2 in DDP of 2": (reshape_jobs.fsdp, 2, reshape_jobs.ddp, 2),
    "DDP of 2 in FSDP2 of 4": (reshape_jobs.ddp, 2, reshape_jobs.fsdp, 4),
    "FSDP2 of 2 in replicas of 4": (reshape_jobs.fsdp, 2, reshape_jobs.hsdp, 4),
    "FSDP2 of 2 in one process": (reshape_jobs.fsdp, 2, reshape_jobs.plain, 1),
}


@pytest.mark.parametrize("what", SAVED)
def test_every_tensor_that_ranks_saved_with_dcp_is_read(tmp_path: Path, what: str) -> None:
    make, world_size, flattened = SAVED[what]
    folder = tmp_path / "saved"
    want = run(dcp_jobs.save, world_size, make, str(folder), flattened)[0]
    with open_source(Reference(url=str(folder), format="dcp")) as source:
        tensors = source.catalog.tensors
        assert tensors.keys() == want.keys()
        for name, tensor in want.items():
            data = bytearray(tensors[name].nbytes)
            fetch(source, tensors[name], memoryview(data))
            assert data == tensor, name
        assert list(source.verify(lambda nbytes: None)) == []
        named = [name for group in source.catalog.groups["optimizer"] for name in group["params"]]
        assert {one.parameter for one in source.catalog.of_kind("optimizer")} == set(named) <= tensors.keys()


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("what", LOADED)
def test_what_we_write_dcp_loads_into_another_world_and_training_goes_on_with_the_same_losses(
    tmp_path: Path, what: str, flattened: bool
) -> None:
    make, world_size, other, other_size = LOADED[what]
    want, losses = run(dcp_jobs.save_and_train_on, world_size, make, str(tmp_path / "saved"), flattened)[0]
    convert(Reference(url=str(tmp_path / "saved"), format="dcp"), str(tmp_path / "ours"), to="dcp", workers=1)
    found, later = run(dcp_jobs.load, other_size, other, str(tmp_path / "ours"), flattened)[0]
    assert found == want
    assert later == losses
