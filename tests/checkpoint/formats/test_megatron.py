"""Checkpoints of Megatron-LM: what megatron-core itself wrote, in both layouts, is read as one and the same model.

`tests/golden/megatron` has each job's iteration twice: in the legacy layout, where we join the slices, and as
`torch_dist`, where megatron-core has joined them. `tests/golden/make_megatron.py` made them.
"""

import argparse
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, LayoutMismatch, NotACheckpoint, UsageError

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
JOBS = ("tp2_pp2_bf16_swiglu", "tp2_fp32_gelu", "ep2_bf16")
LEGACY_NAMES = {  # as megatron-core maps them when it writes torch_dist
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All golden checkpoints, unpacked. Not to be changed."""
    folder = tmp_path_factory.mktemp("megatron")
    for job in JOBS:
        with tarfile.open(GOLDEN / f"{job}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A golden legacy checkpoint that may be changed."""
    with tarfile.open(GOLDEN / "tp2_pp2_bf16_swiglu.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "tp2_pp2_bf16_swiglu"


def opened(folder: Path, **more: Any) -> Source:
    return open_source(Reference(url=str(folder), **more))


def value(source: Source, name: str) -> torch.Tensor:
    tensor = source.catalog.tensors[name]
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)


def in_dist(dist: Source, name: str) -> torch.Tensor:
    """A tensor of the legacy layout, in that of torch_dist, where names may be others and experts are stacked."""
    tried = name
    for old, new in LEGACY_NAMES.items():
        tried = tried if name in dist.catalog.tensors else tried.replace(old, new)
    expert = re.fullmatch(r"(.*\.experts\.)local_experts\.(\d+)\.(linear_fc\d\.\w+)(.*)", name)
    if expert is None:
        return value(dist, tried)
    stacked = value(dist, f"{expert[1]}experts.{expert[3]}{expert[4]}")
    return stacked if expert[4] == ".step" else stacked[int(expert[2])]


@pytest.mark.parametrize("name", JOBS)
def test_both_layouts_of_an_iteration_have_the_same_values(golden: Path, name: str) -> None:
    with opened(golden / name) as ranks, opened(golden / f"{name}_dist") as dist:
        assert {ranks.catalog.format, dist.catalog.format} == {"megatron"}
        for tensor in ranks.catalog.tensors:
            assert torch.equal(value(ranks, tensor), in_dist(dist, tensor)), tensor
        sizes = [
            sum(tensor.numel for tensor in one.catalog.tensors.values() if tensor.state != "step")
            for one in (ranks, dist)
        ]
        assert sizes[0] == sizes[1] > 1000, "neither has what the other has not"


@pytest.mark.parametrize("name", JOBS)
def test_the_state_of_the_optimizer_has_the_names_of_its_parameters(golden: Path, name: str) -> None:
    with opened(golden / name) as source:
        half = name != "tp2_fp32_gelu"
        states = source.catalog.all_states()
        assert set(states) == {tensor.name for tensor in source.catalog.of_kind("parameter")}
        for parameter, found in states.items():
            assert set(found) == {"exp_avg", "exp_avg_sq", "step", *(["fp32"] if half else [])}
            assert found["exp_avg"].shape == source.catalog.tensors[parameter].shape
            if half:
                assert torch.equal(value(source, found["fp32"].name).bfloat16(), value(source, parameter))
        bare = {
            name for group in source.catalog.groups["optimizer"] if not group["wd_mult"] for name in group["params"]
        }
        assert bare == {
            name for name in states if name.endswith(".bias") or len(source.catalog.tensors[name].shape) == 1
        }


def test_layers_of_later_stages_are_numbered_on(golden: Path) -> None:
    with opened(golden / "tp2_pp2_bf16_swiglu") as source:
        layers = {
            match[1] for name in source.catalog.tensors if (match := re.match(r"model\.decoder\.layers\.(\d+)", name))
        }
        assert layers == {"0", "1"}
        assert source.catalog.world_size == 4
        assert source.catalog.tensors["model.output_layer.weight"].shape == (24, 8)


def test_gated_units_are_joined_half_by_half(golden: Path) -> None:
    folder = golden / "tp2_pp2_bf16_swiglu" / "iter_0000010"
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    slices = [
        torch.load(folder / f"mp_rank_0{rank}_000" / "model_optim_rng.pt", weights_only=False)["model"][name]
        for rank in range(2)
    ]
    (gate, up), (more_gate, more_up) = (one.chunk(2) for one in slices)
    with opened(golden / "tp2_pp2_bf16_swiglu") as source:
        assert torch.equal(value(source, f"model.{name}"), torch.cat([gate, more_gate, up, more_up]))


@pytest.mark.parametrize("layout", ["", "_dist"])
def test_what_is_no_tensor_is_there_too(golden: Path, layout: str) -> None:
    with opened(golden / f"tp2_fp32_gelu{layout}") as source:
        objects = source.objects()
        assert (source.catalog.step, objects["iteration"]) == (10, 10)
        assert objects["args"]["tensor_model_parallel_size"] == 2
        assert objects["args"]["params_dtype"] is torch.float32
        assert not any("model" in str(key) for key in objects)
    with opened(golden / "tp2_fp32_gelu") as ranks:
        assert isinstance(ranks.objects(1)["rng_state"][0]["torch_rng_state"], torch.Tensor)
        assert ranks.objects(7).keys() == ranks.objects(0).keys()


@pytest.mark.parametrize("layout", ["", "_dist"])
def test_an_iteration_is_opened_by_its_own_folder_and_by_number(golden: Path, layout: str) -> None:
    folder = golden / f"tp2_fp32_gelu{layout}"
    with opened(folder, step=10) as by_number, opened(folder / "iter_0000010") as by_folder:
        assert by_number.catalog.tensors.keys() == by_folder.catalog.tensors.keys()
    with pytest.raises(FileNotFoundError, match="has no iteration 11; it has 10"):
        opened(folder, step=11)


def test_the_vocabulary_loses_its_padding_where_the_specification_says_so(golden: Path) -> None:
    spec = """
        preset = "megatron-swiglu"
        [[cut]]
        pattern = ["embedding.word_embeddings.weight", "output_layer.weight"]
        sharded = { dim = 0, over = "tp" }
        padded = { dim = 0, size = 21 }
    """
    with opened(golden / "tp2_pp2_bf16_swiglu") as source, opened(golden / "tp2_pp2_bf16_swiglu", spec=spec) as cut:
        for name in ("model.output_layer.weight", "optimizer.state.model.output_layer.weight.exp_avg"):
            assert torch.equal(value(cut, name), value(source, name)[:21])
        assert any("padded to 24" in note for note in source.catalog.notes)


@pytest.mark.parametrize("layout", ["", "_dist"])
def test_verify_finds_a_flipped_byte(golden: Path, tmp_path: Path, layout: str) -> None:
    with tarfile.open(GOLDEN / "tp2_fp32_gelu.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / f"tp2_fp32_gelu{layout}"
    with opened(folder) as source:
        assert list(source.verify(lambda _: None)) == []
        tensor = source.catalog.tensors["model.output_layer.weight"]
        name = source.catalog.files[int(tensor.pieces.rows[0, 0])].name
        path = next(folder.rglob(name.rsplit("/", 1)[-1])) if layout else folder / "iter_0000010" / name
        wanted = value(source, "model.output_layer.weight").numpy().tobytes()[:64]
    data = bytearray(path.read_bytes())
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)
    with opened(folder) as source:
        assert [finding.file for finding in source.verify(lambda _: None)] == [name]


Tree = dict[str, Any]


def changed(job: Path, change: Callable[[Tree], object], ranks: str = "mp_rank_*") -> None:
    """Files of ranks, loaded, changed and saved."""
    for path in sorted(job.glob(f"iter_0000010/{ranks}/model_optim_rng.pt")):
        tree = torch.load(path, weights_only=False)
        change(tree)
        torch.save(tree, path)


def test_an_optimizer_that_does_not_fit_is_left_out_and_told_of(job: Path) -> None:
    def change(tree: Tree) -> None:
        tree["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()

    changed(job, change, "mp_rank_01_001")
    with opened(job) as source:
        assert source.catalog.of_kind("optimizer") == []
        assert "mp_rank_01_001/model_optim_rng.pt: the optimizer's state is not read" in source.catalog.notes[0]
        assert len(source.catalog.of_kind("parameter")) == 21


def test_state_of_another_shape_is_not_taken_for_a_parameter(job: Path) -> None:
    def change(tree: Tree) -> None:
        states = tree["optimizer"]["optimizer"]["state"]
        states[0], states[1] = states[1], states[0]

    changed(job, change)
    with opened(job) as source:
        assert source.catalog.of_kind("optimizer") == []
        assert "should belong to" in source.catalog.notes[0]


def test_the_state_of_the_distributed_optimizer_is_told_to_be_left_out(job: Path) -> None:
    changed(job, lambda tree: tree.pop("optimizer"))
    (job / "iter_0000010" / "mp_rank_00_000" / "distrib_optim.pt").write_bytes(b"")
    with opened(job) as source:
        assert any("distrib_optim.pt" in note for note in source.catalog.notes)


def test_a_tied_head_is_the_embedding(job: Path) -> None:
    changed(job, lambda tree: setattr(tree["args"], "untie_embeddings_and_output_weights", False))
    with opened(job) as source:
        assert source.catalog.aliases == {"model.output_layer.weight": "model.embedding.word_embeddings.weight"}
        assert "model.output_layer.weight" not in source.catalog.tensors
        assert not [name for name in source.catalog.tensors if "output_layer" in name]


def written(folder: Path, models: dict[str, dict[str, Any]], **args: Any) -> Path:
    """A small legacy checkpoint of our making: by folder of the rank what it has besides arguments."""
    for name, tree in models.items():
        path = folder / "iter_0000003" / name / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"args": argparse.Namespace(**args), "iteration": 3, **tree}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("3\n")
    return folder


def layer(number: int) -> torch.Tensor:
    return torch.full((2,), float(number))


def test_interleaved_stages_have_their_layers_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Stage s has parts 0 and 1 of the model; the layers of all first parts come before those of the second ones."""
    models = {
        f"mp_rank_00_00{stage}": {
            f"model{part}": {f"decoder.layers.{n}.norm.weight": layer(4 * part + 2 * stage + n) for n in range(2)}
            for part in range(2)
        }
        for stage in range(2)
    }
    with opened(written(tmp_path, models, pipeline_model_parallel_size=2)) as source:
        for number in range(8):
            assert torch.equal(value(source, f"model.decoder.layers.{number}.norm.weight"), layer(number))


def test_states_of_modules_that_are_nested_are_read_by_their_full_names(tmp_path: Path) -> None:
    model = {"language_model": {"encoder": {"layers.0.mlp.dense_h_to_4h.weight": torch.ones(2, 2)}}}
    with opened(written(tmp_path, {"mp_rank_00": {"model": model}})) as source:
        assert list(source.catalog.tensors) == ["model.language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"]


def rank_missing(job: Path) -> None:
    (job / "iter_0000010" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()


def other_iteration(job: Path) -> None:
    changed(job, lambda tree: tree.update(iteration=11), "mp_rank_01_000")


def cut_short(job: Path) -> None:
    path = job / "iter_0000010" / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-3000])


def no_args(job: Path) -> None:
    changed(job, lambda tree: tree.pop("args"))


def no_model(job: Path) -> None:
    changed(job, lambda tree: tree.pop("model"))


def old_version(job: Path) -> None:
    changed(job, lambda tree: tree.update(checkpoint_version=1.0))


def other_shape(job: Path) -> None:
    name = "decoder.layers.0.input_layernorm.weight"
    changed(job, lambda tree: tree["model"].update({name: torch.ones(9).bfloat16()}), "mp_rank_01_000")


def other_dtype(job: Path) -> None:
    name = "decoder.layers.0.input_layernorm.weight"
    changed(job, lambda tree: tree["model"].update({name: torch.ones(8)}), "mp_rank_01_000")


def wrong_latest(job: Path) -> None:
    (job / "latest_checkpointed_iteration.txt").write_text("20")


def nothing_left(job: Path) -> None:
    for path in job.rglob("*.pt"):
        path.rename(path.with_suffix(".gone"))


class Runs:
    """Pickled, it is a call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def runs_code(job: Path) -> None:
    changed(job, lambda tree: tree.update(rng_state=Runs(str(job / "ran"))), "mp_rank_00_000")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            rank_missing,
            DamagedImage,
            "tensor-parallel rank 1, stage 1, expert-parallel rank 0 is missing; .* 2 x 2 x 1",
        ),
        (other_iteration, DamagedImage, "of different iterations .*mp_rank_01_000/model_optim_rng.pt: 11"),
        (cut_short, DamagedImage, "mp_rank_01_000/model_optim_rng.pt"),
        (no_args, NotACheckpoint, "has no arguments of the job"),
        (no_model, NotACheckpoint, "has no model"),
        (old_version, NotACheckpoint, "checkpoint version 1.0"),
        (other_shape, LayoutMismatch, r"layers.0.input_layernorm.weight: .* \(8,\) .* \(9,\)"),
        (other_dtype, DamagedImage, "input_layernorm.weight in bfloat16 and in float32"),
        (wrong_latest, NotACheckpoint, "names iteration '20', which is not there; name one of 10"),
        (nothing_left, NotACheckpoint, "neither mp_rank_. folders nor .metadata"),
        (runs_code, NotACheckpoint, "open"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    job: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(job)
    with pytest.raises(error, match=message):
        opened(job)
    assert not (job / "ran").exists(), "its code ran"


def dist_file_missing(folder: Path) -> None:
    (folder / "__2_0.distcp").unlink()


def dist_file_cut_short(folder: Path) -> None:
    path = folder / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def dist_metadata_cut_short(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-100])


def dist_metadata_runs_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(str(folder / "ran"))))


def dist_common_runs_code(folder: Path) -> None:
    torch.save({"iteration": Runs(str(folder / "ran"))}, folder / "common.pt")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (dist_file_missing, DamagedImage, "__2_0.distcp is not there"),
        (dist_file_cut_short, DamagedImage, "__2_0.distcp has .* the file was cut short"),
        (dist_metadata_cut_short, DamagedImage, ".metadata"),
        (dist_metadata_runs_code, NotACheckpoint, "open"),
        (dist_common_runs_code, NotACheckpoint, "open"),
    ],
)
def test_a_torch_dist_that_cannot_be_read_is_refused_by_name(
    job: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    folder = job.with_name(f"{job.name}_dist") / "iter_0000010"
    damage(folder)
    with pytest.raises(error, match=message):
        opened(folder.parent)
    assert not (folder / "ran").exists(), "its code ran"


def test_a_specification_without_the_axis_is_refused(job: Path) -> None:
    with pytest.raises(UsageError, match="no axis 'tp'"):
        opened(job, spec='otherwise = "replicated"')


def test_experts_that_are_numbered_at_the_end_of_their_names_count_on_too(tmp_path: Path) -> None:
    models = {
        f"mp_rank_00_00{rank}": {
            "model": {f"decoder.layers.0.mlp.experts.linear_fc1.weight{n}": layer(2 * rank + n) for n in range(2)}
        }
        for rank in range(2)
    }
    with opened(written(tmp_path, models, expert_model_parallel_size=2)) as source:
        for number in range(4):
            name = f"model.decoder.layers.0.mlp.experts.linear_fc1.weight{number}"
            assert torch.equal(value(source, name), layer(number))
