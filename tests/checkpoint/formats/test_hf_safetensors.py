"""Safetensors of others are read, what we write others read, and hostile files are refused by name.

The others are the safetensors library and transformers, as installed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resilient.checkpoint.dtypes import safetensors_dtype, torch_dtype
from resilient.checkpoint.formats.convert import Report, convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.hf_extra import STORED_AS
from resilient.checkpoint.formats.hf_header import DTYPES
from resilient.checkpoint.formats.hf_safetensors import open_source, recognise
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, NewerFormat, NotACheckpoint, UsageError
from tests.checkpoint.formats.made import made_source, open_made, raw_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def opened(path: Path) -> Source:
    return open_source(Folder(str(path)), Reference(url=str(path)))


def tensor_of(source: Source, name: str) -> torch.Tensor:
    tensor = source.catalog.tensors[name]
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    flat = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)) if data else torch.empty(0)
    return flat.reshape(tensor.shape)


def to_safetensors(reference: Reference, target: Path, **options: Any) -> Report:
    sink = SinkOptions(**options)
    return convert(reference, str(target), to="safetensors", options=sink, open_source=open_made, workers=1)


def a_file(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", *, claim: int | None = None) -> Path:
    """A file whose header is what is given; `claim`: how long it says that it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claim is None else claim).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# Reading


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    tensors = {
        "layers.0.weight": torch.randn(4, 6),
        "layers.0.half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "mask": torch.tensor([[True, False]]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with opened(tmp_path) as source:
        assert source.catalog.step is None
        assert set(source.catalog.tensors) == {f"model.{name}" for name in tensors}
        for name, value in tensors.items():
            same = tensor_of(source, f"model.{name}")
            assert source.catalog.tensors[f"model.{name}"].dtype == str(value.dtype).removeprefix("torch.")
            assert torch.equal(same, value)
        assert source.objects() == {}
        assert list(source.verify(lambda _: None)) == []


def test_every_dtype_of_the_format_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {}
    for dtype in set(DTYPES.values()):
        data = torch.arange(16, dtype=torch.uint8) % (2 if dtype == "bool" else 16)
        tensors[dtype] = data.view(torch_dtype(dtype))
    save_file(tensors, tmp_path / "all.safetensors")
    with opened(tmp_path / "all.safetensors") as source:
        for dtype, value in tensors.items():
            found = source.catalog.tensors[f"model.{dtype}"]
            assert (found.dtype, found.shape) == (dtype, tuple(value.shape))
            assert raw_bytes(tensor_of(source, f"model.{dtype}")) == raw_bytes(value)


def test_the_dtypes_are_those_of_our_images() -> None:
    for code, dtype in DTYPES.items():
        if dtype != "float4_e2m1fn_x2":  # an image stores it as bytes, here it has its own code
            assert safetensors_dtype(torch_dtype(dtype)) == (code, None)
    for dtype, (stored, added) in STORED_AS.items():
        assert safetensors_dtype(torch_dtype(dtype)) == (safetensors_dtype(torch_dtype(stored))[0], added)


def test_shards_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    with opened(tmp_path) as source:
        assert list(source.catalog.tensors) == ["model.a", "model.b"]
        assert torch.equal(tensor_of(source, "model.b"), torch.zeros(3))


def test_a_folder_is_recognised_by_its_names(tmp_path: Path) -> None:
    assert not recognise(Folder(str(tmp_path)))
    (tmp_path / "below").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "below" / "x.safetensors")
    assert not recognise(Folder(str(tmp_path)))
    assert recognise(Folder(str(tmp_path / "below")))
    assert recognise(Folder(str(tmp_path / "below" / "x.safetensors")))


def test_files_that_do_not_belong_to_the_model_are_noted(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    with opened(tmp_path) as source:
        assert list(source.catalog.tensors) == ["model.a"]
        assert source.catalog.notes == ["consolidated.safetensors was not read: it does not begin with `model`"]


def test_a_slice_reads_its_bytes_only(tmp_path: Path) -> None:
    value = torch.randn(512, 64)
    save_file({"a": value}, tmp_path / "model.safetensors")
    with opened(tmp_path) as source:
        data = bytearray(8 * 64 * 4)
        fetch(source, source.catalog.tensors["model.a"], memoryview(data), (16, 0), (8, 64))
        assert data == raw_bytes(value[16:24])


# Hostile files


def refused(path: Path, match: str) -> None:
    with pytest.raises(DamagedImage, match=match):
        opened(path)


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(0, 4)}, b"123", "its tensors end at"),
        ({"a": entry(0, 4)}, b"12345", "its tensors end at"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "tensor 'b' overlaps another"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "tensor 'b' leaves a hole of 1 bytes"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "tensor 'b' overlaps another"),
        ({"a": entry(4, 0, [4])}, b"1234", "has -4 bytes"),
        ({"a": entry(-4, 0, [4])}, b"1234", "no numbers that a tensor could have"),
        ({"a": entry(0, 4, [-4])}, b"1234", "no numbers that a tensor could have"),
        ({"a": entry(0, 4, [4.0])}, b"1234", "no numbers that a tensor could have"),
        ({"a": entry(0, 1, [True])}, b"1", "no numbers that a tensor could have"),
        ({"a": entry(0, 4, [1 << 62, 1 << 62])}, b"1234", "tensor 'a' of U8.* has 4 bytes"),
        ({"a": entry(0, 4, [1] * 70)}, b"1234", "no numbers that a tensor could have"),
        ({"a": entry(0, 4, [2], "F32")}, b"1234", "tensor 'a' of F32"),
        ({"a": entry(0, 4, dtype="F24")}, b"1234", "has the dtype 'F24', which is not known"),
        ({"a": entry(0, 4, [7], "F4")}, b"1234", "ends within a byte"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "what it says of 'a'"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 5]}}, b"1234", "what it says of 'a'"),
        ({"a": [1]}, b"1234", "what it says of 'a'"),
        ({"__metadata__": {"format": 1}}, b"", "metadata .* are not texts by name"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{}}', b"12", "'a' is there twice"),
        (b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"12", "what it says of"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"12", "NaN is no number"),
        (b"[" * 100_000, b"", "no JSON"),
        (b"[1, 2]", b"", "is no JSON object"),
        (b"\xff\xfe", b"", "no JSON"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: Mapping[str, Any] | bytes, data: bytes, match: str
) -> None:
    refused(a_file(tmp_path / "bad.safetensors", header, data), match)


def test_a_header_longer_than_its_file_or_than_allowed_is_refused(tmp_path: Path) -> None:
    refused(a_file(tmp_path / "a.safetensors", {}, claim=1000), "its header claims 1000 of 10 bytes")
    refused(a_file(tmp_path / "b.safetensors", {}, claim=1 << 63), "its header claims")
    sparse = a_file(tmp_path / "c.safetensors", {}, claim=200_000_000)
    os.truncate(sparse, 300_000_000)
    refused(sparse, "a header of 200000000 bytes; at most 100000000")
    (tmp_path / "d.safetensors").write_bytes(b"1234")
    refused(tmp_path / "d.safetensors", "it has 4 bytes")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    os.truncate(path, path.stat().st_size - 1)
    refused(path, "its tensors end at")


def an_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../x.safetensors"}, r"'\.\./x\.safetensors', which is no file beside it"),
        ({"a": "/etc/x.safetensors"}, "which is no file beside it"),
        ({"a": "x.bin"}, "which is no file beside it"),
        ({"a": 3}, "which is no file beside it"),
        ({"a": "y.safetensors"}, "y.safetensors, which is not there"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "x.safetensors has no tensor 'b'"),
        ({}, "has no weight_map"),
        ([1], "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, match: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    an_index(folder, weight_map)
    refused(folder, match)


def test_an_index_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'
    )
    refused(tmp_path, "'a' is there twice")


def test_of_a_name_in_two_shards_the_index_says_which_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    refused(tmp_path, "is in another file, too, and no index says which counts")
    an_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with opened(tmp_path) as source:
        assert torch.equal(tensor_of(source, "model.a"), torch.zeros(2))


def test_a_shard_that_is_missing_is_seen_without_an_index(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({f"w{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    refused(tmp_path, "model-00002-of-00003.safetensors is not there")


def test_several_models_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(NotACheckpoint, match="indices of several models"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ({"version": 2}, NewerFormat, "version 2; this library reads 1"),
        ({"aliases": {"b": 3}}, DamagedImage, "3 is no text"),
        ({"aliases": [1]}, DamagedImage, "cannot be read"),
        ({"buffers": [{}]}, DamagedImage, "is no text"),
        ({"dtypes": {"a": "complex128"}}, DamagedImage, "tensor 'a' cannot be complex128, stored as uint8"),
        ({"dtypes": {"a": "float32"}}, DamagedImage, "tensor 'a' cannot be float32"),
        ({"states": {"a": ["x"]}}, DamagedImage, "cannot be read"),
        ({"groups": {"optimizer": [{}]}}, DamagedImage, "cannot be read"),
        ({"step": "many"}, DamagedImage, "cannot be read"),
    ],
)
def test_metadata_of_ours_that_lie_are_refused(
    tmp_path: Path, extra: dict[str, Any], error: type[Exception], match: str
) -> None:
    metadata = {"resilient": json.dumps(extra)}
    path = a_file(tmp_path / "x.safetensors", {"__metadata__": metadata, "a": entry(0, 4)}, b"1234")
    with pytest.raises(error, match=match):
        opened(path)


# Writing


def test_a_plain_model_becomes_the_very_bytes_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "z.weight": torch.randn(5, 3),
        "a.weight": torch.randn(7).bfloat16(),
        "a.bias": torch.randn(2),
        "ü": torch.arange(3),
        "flags": torch.tensor([True]),
        "packed": torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "eighth": torch.zeros(3).to(torch.float8_e5m2),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
    }
    reference = made_source(tmp_path / "source", {f"model.{k}": v for k, v in tensors.items()}, step=None)
    to_safetensors(reference, tmp_path / "out")
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_what_the_format_cannot_say_comes_back(tmp_path: Path) -> None:
    tensors = {
        "model.embed.weight": torch.randn(4, 2),
        "model.running": torch.randn(3),
        "model.wave": torch.randn(3, 2, dtype=torch.complex128),
        "model.short_wave": torch.randn(3).to(torch.complex64).to(torch.complex32),
    }
    reference = made_source(
        tmp_path / "source",
        tensors,
        buffers={"model.running"},
        aliases={"model.head.weight": "model.embed.weight"},
        step=12,
    )
    to_safetensors(reference, tmp_path / "out")
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == [
        "embed.weight",
        "running",
        "short_wave",
        "wave",
    ]
    with opened(tmp_path / "out") as source:
        catalog = source.catalog
        assert catalog.step == 12
        assert catalog.aliases == {"model.head.weight": "model.embed.weight"}
        assert [tensor.name for tensor in catalog.of_kind("buffer")] == ["model.running"]
        for name, value in tensors.items():
            assert catalog.tensors[name].shape == tuple(value.shape)
            assert raw_bytes(tensor_of(source, name)) == raw_bytes(value)


def test_shards_are_cut_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    import huggingface_hub

    tensors = {f"w{n}": torch.randn(rows, 4) for n, rows in enumerate((3, 9, 2, 40, 1, 5, 5))}
    reference = made_source(tmp_path / "source", {f"model.{k}": v for k, v in tensors.items()}, step=None)
    to_safetensors(reference, tmp_path / "out", shard_bytes=200)
    split = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=200)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"] == split.metadata | {"total_parameters": sum(one.numel() for one in tensors.values())}
    for file, names in split.filename_to_tensors.items():
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert sorted(shard.keys()) == sorted(names)
            assert all(torch.equal(shard.get_tensor(name), tensors[name]) for name in names)
    with opened(tmp_path / "out") as source:
        assert sorted(source.catalog.tensors) == sorted(f"model.{name}" for name in tensors)


def test_the_optimizers_state_goes_to_its_own_file_and_comes_back(tmp_path: Path) -> None:
    states = {"model.a": {"exp_avg": torch.randn(3), "step": torch.tensor(4.0)}, "model.b": {"exp_avg": torch.randn(2)}}
    groups = {"optimizer": [{"params": ["model.a", "model.b"], "lr": 0.1, "betas": [0.9, 0.95]}]}
    reference = made_source(
        tmp_path / "source", {"model.a": torch.ones(3), "model.b": torch.ones(2)}, states=states, groups=groups
    )
    to_safetensors(reference, tmp_path / "without")
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["model.safetensors"]
    report = to_safetensors(reference, tmp_path / "out", extra={"optimizer": "1"})
    assert report.notes == ()
    with opened(tmp_path / "out") as source:
        assert source.catalog.groups == groups
        found = source.catalog.all_states()
        assert {name: sorted(state) for name, state in found.items()} == {
            "model.a": ["exp_avg", "step"],
            "model.b": ["exp_avg"],
        }
        assert [tensor.name for tensor in source.catalog.of_kind("parameter")] == ["model.a", "model.b"]
        for parameter, values in states.items():
            for state, value in values.items():
                assert torch.equal(tensor_of(source, found[parameter][state].name), value)


def test_the_optimizers_state_does_not_fit_one_file(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(3)})
    with pytest.raises(UsageError, match="a file of its own: give a folder"):
        to_safetensors(reference, tmp_path / "out.safetensors", extra={"optimizer": "1"})


def test_hyperparameters_that_json_cannot_say_are_refused(tmp_path: Path) -> None:
    groups = {"optimizer": [{"params": ["model.a"], "lr": float("inf")}]}
    reference = made_source(
        tmp_path / "source", {"model.a": torch.ones(3)}, states={"model.a": {"m": torch.ones(3)}}, groups=groups
    )
    with pytest.raises(UsageError, match="the optimizer's groups have what JSON cannot say"):
        to_safetensors(reference, tmp_path / "out", extra={"optimizer": "1"})


def test_of_rounded_weights_a_wider_dtype_takes_the_master_weights(tmp_path: Path) -> None:
    master = torch.randn(50)
    reference = made_source(
        tmp_path / "source", {"model.a": master.bfloat16()}, states={"model.a": {"fp32": master}}, step=None
    )
    to_safetensors(reference, tmp_path / "wide", dtype="float32")
    assert torch.equal(load_file(tmp_path / "wide" / "model.safetensors")["a"], master)
    to_safetensors(reference, tmp_path / "same")
    assert torch.equal(load_file(tmp_path / "same" / "model.safetensors")["a"], master.bfloat16())


def test_of_several_models_one_has_to_be_selected(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"generator.a": torch.ones(1), "judge.a": torch.zeros(1)})
    with pytest.raises(
        UsageError, match=r"several models \(generator, judge\): select one, such as --select 'generator"
    ):
        to_safetensors(reference, tmp_path / "out")
    convert(reference, str(tmp_path / "out"), to="safetensors", select=["judge.*"], open_source=open_made, workers=1)
    with opened(tmp_path / "out") as source:
        assert list(source.catalog.tensors) == ["judge.a"]


def test_a_checkpoint_without_parameters_is_refused(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(1)}, buffers={"model.a"})
    with pytest.raises(UsageError, match="there are no parameters to write"):
        to_safetensors(reference, tmp_path / "out")


# transformers


def tiny(tied: bool) -> Any:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [4000, 1 << 30])
def test_transformers_loads_what_is_written(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    import transformers

    model = tiny(tied)
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    aliases = {"model.lm_head.weight": "model.model.embed_tokens.weight"} if tied else {}
    to_safetensors(
        made_source(tmp_path / "source", tensors, aliases=aliases), tmp_path / "out", shard_bytes=shard_bytes
    )
    model.config.save_pretrained(tmp_path / "out")
    loader: Any = transformers.AutoModelForCausalLM
    same, told = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(same(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("most", ["4KB", "5GB"])
def test_what_transformers_writes_is_read(tmp_path: Path, most: str) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path, max_shard_size=most)
    assert (tmp_path / "model.safetensors.index.json").exists() == (most == "4KB")
    with opened(tmp_path) as source:
        parameters = dict(model.named_parameters())
        assert sorted(source.catalog.tensors) == sorted(f"model.{name}" for name in parameters)
        for name, value in parameters.items():
            assert torch.equal(tensor_of(source, f"model.{name}"), value)
