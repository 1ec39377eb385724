"""ZeRO's layouts at any shape and world, and checkpoints that are damaged, mixed or hostile."""

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.spec import parse_spec
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats import deepspeed
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.deepspeed_names import tags_of
from resilient.checkpoint.formats.deepspeed_parallel import Cuts
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, LayoutMismatch, NotACheckpoint, UsageError
from tests.checkpoint.formats.deepspeed_made import Groups, momentum, pickled_as_deepspeeds, write_zero_2, write_zero_3

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)
WRITERS = {2: write_zero_2, 3: write_zero_3}
FIRST = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
SECOND = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(st.lists(SHAPES, min_size=1, max_size=5), min_size=1, max_size=3), world=st.integers(1, 5))
@pytest.mark.parametrize("stage", [2, 3])
def test_every_element_comes_back_at_any_shape_and_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, stage: int, shapes: list[list[tuple[int, ...]]], world: int
) -> None:
    folder = tmp_path_factory.mktemp("zero")
    groups = _groups(shapes)
    WRITERS[stage](folder / "global_step5", groups, world)
    with open_source(Reference(url=str(folder))) as source:
        assert source.catalog.step == 5
        for group in groups:
            for name, master in group.items():
                state = f"optimizer.state.model.{name}"
                assert torch.equal(_whole(source, f"{state}.fp32"), master)
                assert torch.equal(_whole(source, f"{state}.momentum"), momentum(master))
                assert _whole(source, f"{state}.step").item() == 5
                expected = master if stage == 3 else master.bfloat16()
                assert torch.equal(_whole(source, f"model.{name}"), expected)
        names = [[f"model.{name}" for name in group] for group in groups]
        assert [group["params"] for group in source.catalog.groups["optimizer"]] == names
    shutil.rmtree(folder)


def test_partitions_without_recorded_fragments_are_found_by_counting(tmp_path: Path) -> None:
    groups = _groups([[(5, 3), (7,), ()], [(4, 4)]])
    write_zero_2(tmp_path, groups, 3)
    for rank in range(3):
        path = tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        states = _load(path)
        del states["optimizer_state_dict"]["param_slice_mappings"]
        torch.save(states, path)
    with open_source(Reference(url=str(tmp_path))) as source:
        for group in groups:
            for name, master in group.items():
                assert torch.equal(_whole(source, f"optimizer.state.model.{name}.fp32"), master)


def test_opening_and_reading_a_part_reads_hardly_more_than_the_part(tmp_path: Path) -> None:
    groups: Groups = [{"large": torch.randn(64, 4096), "other": torch.randn(300)}]
    write_zero_3(tmp_path, groups, 4)
    folder = CountingFolder(str(tmp_path))
    with deepspeed.open_source(folder, Reference(url=str(tmp_path))) as source:
        opened = folder.read_bytes
        tensor = source.catalog.tensors["model.large"]
        data = bytearray(8 * 4096 * 4)
        fetch(source, tensor, memoryview(data), (3, 0), (8, 4096))
        assert torch.equal(torch.frombuffer(data, dtype=torch.float32).view(8, 4096), groups[0]["large"][3:11])
        assert folder.read_bytes - opened <= 1.05 * len(data)
        assert opened < 64 << 10


@pytest.mark.parametrize(
    ("gone", "told"),
    [(SECOND, "optimizer states of 1 of 2 ranks"), ("mp_rank_00_model_states.pt", "mp_rank_00.* are missing")],
)
def test_a_missing_file_is_named(small: Path, gone: str, told: str) -> None:
    os.unlink(small / gone)
    with pytest.raises(DamagedImage, match=told):
        open_source(Reference(url=str(small)))


def test_a_file_of_another_job_in_the_folder_is_refused(small: Path) -> None:
    shutil.copy(small / SECOND, small / SECOND.replace("rank_1", "rank_2"))
    with pytest.raises(DamagedImage, match="rank_2.*two checkpoints are mixed"):
        open_source(Reference(url=str(small)))


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_of_different_steps_are_refused(tmp_path: Path, stage: int) -> None:
    for step in (5, 6):
        WRITERS[stage](tmp_path / str(step), _groups([[(5, 3), (7,)]]), 2, step=step)
    for path in (tmp_path / "5").iterdir():
        if "rank_1" in path.name:
            shutil.copy(tmp_path / "6" / path.name, path)
    with pytest.raises(DamagedImage, match="of different steps|of step 5"):
        open_source(Reference(url=str(tmp_path / "5")))


def test_ranks_of_another_world_are_refused(tmp_path: Path) -> None:
    for world in (2, 3):
        write_zero_2(tmp_path / str(world), _groups([[(5, 3), (7,)]]), world)
    shutil.copy(tmp_path / "3" / SECOND, tmp_path / "2" / SECOND)
    with pytest.raises(DamagedImage, match="one of \\[3\\] partitions, and the files of 2"):
        open_source(Reference(url=str(tmp_path / "2")))


@pytest.mark.parametrize("kept", [0, 20, 700, -1])
def test_a_truncated_file_is_refused(small: Path, kept: int) -> None:
    data = (small / FIRST).read_bytes()
    (small / FIRST).write_bytes(data[:kept])
    with pytest.raises((DamagedImage, NotACheckpoint), match=FIRST):
        open_source(Reference(url=str(small)))


def test_a_pickle_that_runs_code_is_refused_and_runs_none(small: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"optimizer_state_dict": Hostile()}, small / FIRST)
    with pytest.raises(NotACheckpoint, match="mkdir.*--trust-pickle"):
        open_source(Reference(url=str(small)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda states: states["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(3)), "partition of 3"),
        (lambda states: states["param_slice_mappings"][0].popitem(), "a rank is missing, or two checkpoints"),
        (lambda states: states["param_slice_mappings"][0].update(zz=(1, 2)), "the address of zz"),
        (lambda states: states["base_optimizer_state"]["state"][0].update(momentum=torch.zeros(2)), "partition of 2"),
        (lambda states: states.update(single_partition_of_fp32_groups=[]), "0 flat partitions"),
        (lambda states: states.update(base_optimizer_state=7), "'base_optimizer_state' is no dict"),
        (lambda states: states["base_optimizer_state"]["param_groups"][0].clear(), "not as DeepSpeed writes it"),
        (lambda states: states.pop("single_partition_of_fp32_groups"), "is no list but NoneType"),
    ],
)
def test_partitions_that_do_not_add_up_are_refused(small: Path, change: Any, told: str) -> None:
    states = _load(small / FIRST)
    change(states["optimizer_state_dict"])
    _save(states, small / FIRST)
    with pytest.raises(DamagedImage, match=told):
        open_source(Reference(url=str(small)))


def test_shapes_that_are_none_are_refused(small: Path) -> None:
    path = small / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=True)
    states["param_shapes"][0]["p0.0"] = [-5, 3]
    torch.save(states, path)
    with pytest.raises(DamagedImage, match="'p0.0' has the shape \\(-5, 3\\)"):
        open_source(Reference(url=str(small)))


def test_a_flipped_bit_in_a_partition_is_found_and_its_tensors_are_named(small: Path) -> None:
    with zipfile.ZipFile(small / SECOND) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size * ("data/" in entry.filename))
    data = bytearray((small / SECOND).read_bytes())
    at = data.index(largest.filename.encode()) + len(largest.filename)
    data[(at + 63) // 64 * 64 + 1] ^= 4
    (small / SECOND).write_bytes(data)
    with open_source(Reference(url=str(small))) as source:
        (found,) = source.verify(lambda _: None)
    assert found.file == SECOND
    assert found.tensors
    assert "differ from their checksum" in found.problem


def test_a_tag_that_names_a_place_outside_is_refused(tmp_path: Path) -> None:
    for tag in ("global_step5", "global_step6"):
        write_zero_2(tmp_path / tag, _groups([[(5, 3)]]), 1)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(NotACheckpoint, match="elsewhere.*there are: global_step5, global_step6"):
        open_source(Reference(url=str(tmp_path)))
    with open_source(Reference(url=str(tmp_path), step=6)) as source:
        assert source.catalog.files[0].name.startswith("global_step6/")
    with pytest.raises(NotACheckpoint, match="no tag of step 7"):
        open_source(Reference(url=str(tmp_path), format="deepspeed", step=7))


def test_universal_checkpoints_beside_others_are_told_apart() -> None:
    names = ["a/mp_rank_00_model_states.pt", "b/mp_rank_00_model_states.pt", "b/zero/optimizer_state.pt", "c/other.pt"]
    assert tags_of(names, universal=False) == ["a"]
    assert tags_of(names, universal=True) == ["b"]


def test_experts_in_files_of_their_own_are_refused(small: Path) -> None:
    (small / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(NotACheckpoint, match="experts.*ds_to_universal"):
        open_source(Reference(url=str(small)))


# --- optimizers without ZeRO, whose parameters are numbered ---


def test_numbered_state_gets_names_where_only_one_way_fits(tmp_path: Path) -> None:
    model = {"a": torch.randn(3, 2), "frozen": torch.randn(4), "b": torch.randn(2), "c": torch.randn(5, 2)}
    folder = tmp_path / "plain"
    folder.mkdir()
    _write_plain(folder, model, [["b"], ["a", "c"]])
    with open_source(Reference(url=str(folder))) as source:
        for name in ("a", "b", "c"):
            assert torch.equal(_whole(source, f"optimizer.state.model.{name}.momentum"), momentum(model[name]))
        assert source.catalog.groups["optimizer"][0]["params"] == ["model.b"]
        assert source.catalog.groups["optimizer"][1]["params"] == ["model.a", "model.c"]
        assert "optimizer.state.model.frozen.momentum" not in source.catalog.tensors
        assert source.objects()["optimizer"]["state"]["model.a"] == {"step": 3}
    convert(Reference(url=str(folder)), str(tmp_path / "out"), to="deepspeed-universal", workers=1)
    for name in ("zero/a/step.pt", "zero/c/step.pt"):
        assert torch.load(tmp_path / "out/global_step3_universal" / name, weights_only=True).item() == 3


def test_numbered_state_that_fits_in_two_ways_is_left_out_with_a_note(tmp_path: Path) -> None:
    model = {"a": torch.randn(4), "b": torch.randn(4)}
    _write_plain(tmp_path, model, [["b"], ["a"]])
    with open_source(Reference(url=str(tmp_path))) as source:
        assert list(source.catalog.tensors) == ["model.a", "model.b"]
        assert "more than one way" in source.catalog.notes[0]


def test_what_a_module_keeps_that_is_no_tensor_is_among_the_objects(tmp_path: Path) -> None:
    _write_plain(tmp_path, {"a": torch.randn(4), "quantizer._extra_state": {"scale": torch.ones(2), "on": True}}, [])
    with open_source(Reference(url=str(tmp_path))) as source:
        found = source.objects()["model"]["quantizer._extra_state"]
    assert found["on"] is True
    assert torch.equal(found["scale"], torch.ones(2))


# --- how tensor-parallel ranks cut ---


def test_patterns_of_the_job_say_how_slices_are_joined() -> None:
    info = {
        "tp_replicated_parameter_patterns": ["norm"],
        "parameter_to_average_patterns": ["gate"],
        "parameter_with_row_parallelism_patterns": [r"out\."],
        "vocabulary_parameter_patterns": ["embed"],
        "original_vocab_size": 50,
        "parameter_with_2_sub_params_cat_dim_0": ["swiglu"],
        "parameter_with_sub_params": [{"patterns": ["qkv"], "shape": ((8, 4, 4), 6), "partition_dim": 0}],
    }
    cuts = Cuts(None, info, 2, "here")
    assert cuts.of("norm.weight", (4,)).how == "replicated"
    assert cuts.of("gate", (4,)).how == "averaged"
    assert cuts.of("out.weight", (4, 3)).shards[0].dim == 1
    assert cuts.of("out.bias", (4,)).how == "replicated"
    embed = cuts.of("embed.weight", (26, 3)).padded
    assert embed is not None
    assert embed.size == 50
    fused = cuts.of("swiglu.weight", (8, 3)).sub_parameters
    assert fused is not None
    assert fused.widths == (1, 1)
    fused = cuts.of("qkv.weight", (8, 6)).sub_parameters
    assert fused is not None
    assert fused.widths == (8, 4, 4)
    assert cuts.of("up.weight", (4, 3)).shards[0].dim == 0


def test_slices_of_which_nothing_says_how_they_are_cut_ask_for_a_specification() -> None:
    with pytest.raises(UsageError, match="slices of 2 tensor-parallel ranks.*--spec"):
        Cuts(None, None, 2, "here")
    with pytest.raises(UsageError, match="no axis 'tp'"):
        Cuts(parse_spec('otherwise = "replicated"\n[mesh]\naxes = ["dp"]'), None, 2, "here")


def test_pieces_that_the_patterns_do_not_describe_are_refused() -> None:
    def info(source: int) -> dict[str, Any]:
        piece = {"shape": [2, 3], "dest": [0, [3, 1]], "locations": [0]}
        ranks = {
            rank: {"shard_shape": [2, 3], "pieces": [{**piece, "source": [abs(rank - source) * 6, [3, 1]]}]}
            for rank in (0, 1)
        }
        return {"affine_map": {"version": 1, "params": {"^up$": {"logical_shape": [4, 3], "ranks": ranks}}}}

    assert Cuts(None, info(0), 2, "here").of("up", (2, 3)).shards[0].dim == 0
    with pytest.raises(LayoutMismatch, match="up is cut in a way"):
        Cuts(None, info(1), 2, "here").of("up", (2, 3))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_zero_2(tmp_path / "small", _groups([[(5, 3), (7,)], [(9,)]]), 2)
    return tmp_path / "small"


def _groups(shapes: list[list[tuple[int, ...]]]) -> Groups:
    generator = torch.Generator().manual_seed(random.Random(str(shapes)).randrange(1 << 30))
    return [
        {f"p{g}.{n}": torch.randn(shape, generator=generator) for n, shape in enumerate(group)}
        for g, group in enumerate(shapes)
    ]


def _write_plain(folder: Path, model: dict[str, Any], groups: list[list[str]]) -> None:
    names = [name for group in groups for name in group]
    state = {number: {"momentum": momentum(model[name]), "step": 3} for number, name in enumerate(names)}
    saved = [{"lr": 0.1, "params": [names.index(name) for name in group]} for group in groups]
    tree = {"module": model, "buffer_names": [], "optimizer": {"state": state, "param_groups": saved}}
    counters = {"global_steps": 3, "dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.19.8"}
    torch.save({**tree, **counters}, folder / "mp_rank_00_model_states.pt")


def _load(path: Path) -> dict[str, Any]:
    with pickled_as_deepspeeds():
        found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def _save(states: dict[str, Any], path: Path) -> None:
    with pickled_as_deepspeeds():
        torch.save(states, path)


class CountingFolder(Folder):
    """Counts the bytes that are read."""

    read_bytes = 0

    def read(self, name: str, offset: int, into: memoryview) -> None:
        super().read(name, offset, into)
        self.read_bytes += into.nbytes


def _whole(source: Source, name: str) -> torch.Tensor:
    tensor: Tensor = source.catalog.tensors[name]
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).view(tensor.shape)
