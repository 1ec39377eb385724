"""A conversion that is killed, or interrupted, at any moment: nothing half-written counts, and it goes on afterwards.

The child stops after each step that it has done, so it is killed exactly there; its workers are at work meanwhile.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.folder import JOURNAL, PARTIAL
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from resilient.errors import NotACheckpoint

CHILD = Path(__file__).with_name("conversion_child.py")
SHARDS = 4
STEPS = 1 + SHARDS + 1  # the start, each shard, the index


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {f"model.w{n}": torch.randn(512, 500, generator=torch.Generator().manual_seed(n)) for n in range(SHARDS)}


@pytest.fixture(scope="module")
def source(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("conversion") / "source.safetensors"
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, path)
    return Reference(url=str(path), format="safetensors")


@contextmanager
def running(source: Reference, target: Path) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, str(CHILD), source.url, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def steps(child: subprocess.Popen[str], count: int) -> list[int]:
    """Let it do so many steps; gives the ids of its workers."""
    assert child.stdin is not None
    assert child.stdout is not None
    workers: list[int] = []
    for step in range(count):
        if step:
            child.stdin.write("\n")
            child.stdin.flush()
        words = child.stdout.readline().split()
        workers = list(map(int, words[1:])) or workers
    return workers


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def whole_shards(target: Path, tensors: dict[str, torch.Tensor]) -> int:
    """How many files have their name; all of them must be whole and right."""
    found = sorted(target.glob("*.safetensors"))
    for path in found:
        for name, value in load_file(path).items():
            assert torch.equal(value, tensors[f"model.{name}"]), path
    return len(found)


def convert_again(source: Reference, target: Path) -> int:
    """Finish it; gives how many files were there already."""
    report = convert(source, str(target), to="safetensors", options=SinkOptions(shard_bytes=1 << 20), workers=1)
    return report.skipped


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_after_a_kill_at_any_moment_nothing_half_written_counts_and_it_goes_on(
    source: Reference,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    count: int,
    eventually: Callable[..., None],
) -> None:
    target = tmp_path / "out"
    with running(source, target) as child:
        workers = steps(child, count)
        child.send_signal(signal.SIGKILL)
        child.wait()
    eventually(lambda: not any(map(is_alive, workers)), "the workers of a killed conversion end")
    whole = whole_shards(target, tensors)
    assert (target / JOURNAL).exists()
    with pytest.raises(NotACheckpoint, match="interrupted conversion"):
        open_source(Reference(url=str(target), format="safetensors"))

    assert convert_again(source, target) == whole
    assert whole_shards(target, tensors) == SHARDS
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".safetensors") == [
        "model.safetensors.index.json"
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_a_large_file_that_was_filled_in_part_is_not_there(
    tmp_path: Path, count: int, eventually: Callable[..., None]
) -> None:
    value = torch.arange(18 << 20, dtype=torch.int32)  # several ranges
    save_file({"w": value}, tmp_path / "source.safetensors")
    source = Reference(url=str(tmp_path / "source.safetensors"), format="safetensors")
    target = tmp_path / "out"
    with running(source, target) as child:
        workers = steps(child, count)
        child.send_signal(signal.SIGKILL)
        child.wait()
    eventually(lambda: not any(map(is_alive, workers)), "the workers of a killed conversion end")
    assert not (target / "model.safetensors").exists()
    assert convert_again(source, target) == 0
    assert torch.equal(load_file(target / "model.safetensors")["w"], value)
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]


def test_some_files_survive_a_kill(source: Reference, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "out"
    with running(source, target) as child:
        steps(child, STEPS - 1)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert whole_shards(target, tensors) == SHARDS == convert_again(source, target)


@pytest.mark.parametrize("count", [1, 4, STEPS])
def test_an_interrupt_leaves_no_process_and_no_unfinished_file(
    source: Reference, tensors: dict[str, torch.Tensor], tmp_path: Path, count: int, eventually: Callable[..., None]
) -> None:
    target = tmp_path / "out"
    with running(source, target) as child:
        workers = steps(child, count)
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == -signal.SIGINT
        assert child.stderr is not None
        assert "KeyboardInterrupt" in child.stderr.read()
    eventually(lambda: not any(map(is_alive, workers)), "the workers of an interrupted conversion end")
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
    if target.exists():
        assert whole_shards(target, tensors)
    convert_again(source, target)
    assert whole_shards(target, tensors) == SHARDS
