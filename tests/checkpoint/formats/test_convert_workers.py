"""Conversions by several processes: the same bytes, in bounded memory; one that fails or dies ends them all."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resilient.checkpoint.formats.convert import WORKER_BYTES
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, LevelFailed, UsageError
from tests.checkpoint.formats.conversions import files, to_safetensors, written
from tests.checkpoint.formats.made import made_source, open_made


def test_one_large_file_is_written_by_several_processes_and_is_the_same(tmp_path: Path) -> None:
    tensors = {f"model.w{n}": torch.randn(2300, 1000 + n, generator=torch.Generator().manual_seed(n)) for n in range(9)}
    reference = made_source(tmp_path / "source", tensors, seed=3)
    here = to_safetensors(reference, tmp_path / "here")
    there = to_safetensors(reference, tmp_path / "there", workers=2)
    assert (here.workers, there.workers) == (1, 2)
    assert here.nbytes == there.nbytes > 2 * (32 << 20)  # several ranges
    assert files(tmp_path / "here") == files(tmp_path / "there")
    for name, value in tensors.items():
        assert torch.equal(written(tmp_path / "there")[name.removeprefix("model.")], value)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    with pytest.raises(UsageError, match="0 workers"):
        to_safetensors(reference, tmp_path / "out", workers=0)


def test_a_damaged_source_ends_all_workers_and_tells_tensor_and_file(tmp_path: Path) -> None:
    tensors = {f"model.w{n}": torch.ones(1000, 1000) for n in range(4)}
    reference = made_source(tmp_path / "source", tensors, files=1, cuts=0)
    os.truncate(tmp_path / "source" / "0.raw", 11 << 20)
    with pytest.raises(DamagedImage, match=r"cannot write tensor 'model\.w\d' into .*out/model-.*0\.raw ends"):
        to_safetensors(reference, tmp_path / "out", options=SinkOptions(shard_bytes=4 << 20), workers=2)
    assert not [name for name in files(tmp_path) if name.endswith((".partial", "index.json"))]
    assert multiprocessing.active_children() == []


def open_and_die(reference: Reference) -> Source:
    if Path(reference.url, "opened").exists():  # not the first time, in the parent
        os._exit(7)
    Path(reference.url, "opened").touch()
    return open_made(reference)


def open_and_fail(reference: Reference) -> Source:
    if Path(reference.url, "opened").exists():
        raise ZeroDivisionError("nobody expects this")
    Path(reference.url, "opened").touch()
    return open_made(reference)


def open_another(reference: Reference) -> Source:
    if Path(reference.url, "opened").exists():  # not the first time, in the parent
        return open_made(Reference(url=str(Path(reference.url).with_name("newer"))))
    Path(reference.url, "opened").touch()
    return open_made(reference)


def test_a_source_that_gets_newer_on_the_way_is_noticed(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    made_source(tmp_path / "newer", {"model.a": torch.zeros(9)})
    with pytest.raises(UsageError, match="source changed while it was converted: name a step that stays"):
        to_safetensors(reference, tmp_path / "out", open_source=open_another, workers=2)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_ends_the_conversion(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    with pytest.raises(LevelFailed, match=r"a worker ended \(exit code 7\) while it wrote model\.safetensors"):
        to_safetensors(reference, tmp_path / "out", open_source=open_and_die, workers=2)
    assert not (tmp_path / "out").exists()


def test_an_error_that_nobody_expects_comes_with_the_workers_traceback(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"(?s)while it wrote model\.safetensors.*ZeroDivisionError: nobody expects"):
        to_safetensors(reference, tmp_path / "out", open_source=open_and_fail, workers=2)


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.source import Reference
from tests.checkpoint.formats.made import made_source, open_made

def make(folder, rows):
    tensors = {f"model.w{n}": torch.randn(rows, 4096) * 1e38 for n in range(2)}
    tensors["model.w0"][0, 0] = 3.4e38  # beyond bfloat16, whatever was drawn
    tensors["model.same"] = torch.zeros(rows, 4096, dtype=torch.bfloat16)
    made_source(Path(folder), tensors, cuts=2)

def measure(folder):
    reference = Reference(url=folder)
    options = SinkOptions(dtype="bfloat16")
    report = convert(
        reference, f"{folder}.out", to="safetensors", options=options, open_source=open_made, workers=2
    )
    assert report.beyond
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)

if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2])) if len(sys.argv) == 3 else measure(sys.argv[1])
"""


def test_a_worker_takes_no_more_memory_than_is_stated(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(_MEASURE)
    path = os.pathsep.join(filter(None, [*sys.path, str(Path(__file__).parents[3])]))

    def run(*arguments: str) -> str:
        """In a process of its own: a child begins with the peak of its parent."""
        command = [sys.executable, str(script), *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        return done.stdout

    peaks = []
    for rows in ("10", "6000"):  # 1/2 MB and 300 MB
        run(str(tmp_path / rows), rows)
        peaks.append(int(run(str(tmp_path / rows))))
    assert peaks[1] - peaks[0] <= WORKER_BYTES
