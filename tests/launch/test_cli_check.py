"""`resilient verify` and `diff`: damage is found and named; what differs is found, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resilient.launch.cli.comparing import Tolerance, _add, _Sum
from tests.launch.conftest import Resilient
from tests.launch.snapshots import STEPS, flip, image, record


def test_a_whole_snapshot_is_well(durable: Path, resilient: Resilient, script: Resilient) -> None:
    ended = script("verify", durable)
    assert (ended.code, ended.err) == (0, "")
    assert "step 4: well" in ended.out
    every = resilient("verify", durable, "--all", "--json")
    assert every.code == 0
    assert [one["step"] for one in every.json["checkpoints"]] == list(STEPS)
    sizes = {path.stat().st_size for path in durable.rglob("*-of-00002.safetensors")}
    assert sizes
    assert all(one["bytes"] >= 2 * min(sizes) for one in every.json["checkpoints"])


def test_a_flipped_byte_is_found_with_its_tensor_rank_and_file(durable: Path, resilient: Resilient) -> None:
    shown = resilient("inspect", durable, "--pieces", "--select", "model.large.weight", "--json").json
    piece = next(one for one in shown["tensors"][0]["stored"] if one["file"] == 1)
    flip(image(durable, 4, 1), piece["offset"] + 500_000)
    ended = resilient("verify", durable, "--json")
    assert ended.code == 1
    (found,) = ended.json["checkpoints"][0]["findings"]
    assert found["file"] == "step_00000004/rank_00001-of-00002.safetensors"
    assert found["tensors"] == ["model.large.weight"]
    assert "rank 1" in found["problem"]
    told = resilient("verify", durable)
    assert "DAMAGED" in told.out
    assert "    model.large.weight" in told.out.splitlines()
    assert resilient("verify", durable, "--step", "3").code == 0


@pytest.mark.parametrize("harm", ["missing", "short", "digests", "record", "lives"])
def test_every_other_harm_is_found_too_and_the_rest_is_still_verified(
    harm: str, durable: Path, resilient: Resilient
) -> None:
    victim = image(durable, 4, 0)
    flip(image(durable, 4, 1))
    if harm == "missing":
        victim.unlink()
    elif harm == "short":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif harm == "digests":
        flip(victim.with_suffix(".digests"))
    elif harm == "record":
        flip(record(durable, 4, 0), 200)
    else:
        other = record(durable, 4, 0)
        other.write_text(_with_another_life(other.read_text()))
    ended = resilient("verify", durable, "--json")
    assert ended.code == 1
    files = {str(found["file"]).rsplit("/", 1)[-1] for found in ended.json["checkpoints"][0]["findings"]}
    names = {"record": "rank_00000-of-00002.json", "digests": "rank_00000-of-00002.digests", "lives": "step_00000004"}
    assert files == {names.get(harm, victim.name), "rank_00001-of-00002.safetensors"}


def _with_another_life(text: str) -> str:
    from resilient.checkpoint.digest import digest

    rest = text.split("\n", 1)[1]
    life = json.loads(text)["life"]
    rest = rest.replace(life, "0" * len(life), 1)
    return f'{{"digest":"{digest(rest.encode())}",\n{rest}'


def test_a_snapshot_does_not_differ_from_its_copy(durable: Path, local: Path, resilient: Resilient) -> None:
    ended = resilient("diff", durable, local)
    assert (ended.code, ended.out) == (0, "the same: 34 tensors\n")


def test_two_steps_differ_in_what_was_trained(durable: Path, resilient: Resilient) -> None:
    ended = resilient("diff", durable, durable, "--step", "3", "--step-b", "4", "--select", "large.*", "--json")
    assert ended.code == 1
    found = {one["name"]: one for one in ended.json["differences"]}
    moments = {f"state.model.large.{name}.{key}" for name in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq")}
    assert {"model.large.weight", "model.large.bias"} | moments <= set(found)  # the state goes with its parameter
    assert not [name for name in found if "large" not in name]
    first, second = (_whole(durable, step, "model.large.weight") for step in (3, 4))
    assert found["model.large.weight"]["elements"] == int((first != second).sum())
    apart = (first.double() - second.double()).abs().max()
    assert found["model.large.weight"]["max_difference"] == pytest.approx(float(apart))
    steps = ("--step", "3", "--step-b", "4", "--select", "large.*")
    wide = resilient("diff", durable, durable, *steps, "--atol", float(apart), "--json").json["differences"]
    assert "model.large.weight" not in {one["name"] for one in wide}


def _whole(run: Path, step: int, name: str) -> torch.Tensor:
    """Joined from the ranks' images by a reader of safetensors alone: FSDP2 cuts rows."""
    from safetensors.torch import load_file

    return torch.cat([load_file(image(run, step, rank))[name] for rank in (0, 1)])


def test_formats_are_compared_by_name_whatever_they_are(durable: Path, tmp_path: Path, resilient: Resilient) -> None:
    weight = _whole(durable, 4, "model.large.weight")
    changed = weight.clone()
    changed[7, 3] += 1
    others = {"last.weight": torch.zeros(2, 2), "extra": torch.zeros(1), "large.bias": torch.zeros(1200).bfloat16()}
    save_file({"large.weight": changed, **others}, tmp_path / "model.safetensors")
    ended = resilient("diff", durable, tmp_path / "model.safetensors", "--json")
    assert ended.code == 1
    found = {one["name"]: one for one in ended.json["differences"]}
    assert found["model.large.weight"]["elements"] == 1
    assert found["model.large.weight"]["max_difference"] == pytest.approx(1)
    assert (found["model.last.weight"]["what"], found["model.last.weight"]["detail"]) == (
        "shape",
        "[3, 1200] and [2, 2]",
    )
    assert (found["model.large.bias"]["what"], found["model.large.bias"]["detail"]) == ("dtype", "float32 and bfloat16")
    assert found["model.extra"]["what"] == "only in B"
    assert found["model.first.weight"]["what"] == "only in A"
    assert found["state.model.large.weight.exp_avg"]["what"] == "only in A"


def test_no_damaged_byte_is_compared(durable: Path, local: Path, resilient: Resilient) -> None:
    flip(image(durable, 4, 0))
    flip(image(durable, 4, 0), 3 << 20)
    ended = resilient("diff", durable, local)
    assert (ended.code, ended.out) == (1, "")
    assert "are not as they were sealed" in ended.err


@pytest.mark.parametrize(
    ("one", "other", "elements", "most"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0, 0.0),
        ([1.0, float("nan")], [1.0, 2.0], 1, float("inf")),
        ([float("inf")], [float("inf")], 0, 0.0),
        ([float("inf"), 0.0], [float("-inf"), -0.0], 1, float("inf")),
        ([1e-300, 2.0], [1e-300, 2.5], 1, 0.5),
    ],
)
def test_numbers_that_are_none_are_compared_as_they_should_be(
    one: list[float], other: list[float], elements: int, most: float
) -> None:
    found = _Sum()
    _add(found, torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), Tolerance())
    assert (found.elements, found.most) == (elements, most)


def test_large_integers_are_compared_exactly() -> None:
    found = _Sum()
    _add(found, torch.tensor([2**60]), torch.tensor([2**60 + 1]), Tolerance())
    assert found.elements == 1
    assert found.most >= 0
