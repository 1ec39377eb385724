"""Every format that is written, from every other: nothing is lost on the way but what the format cannot say.

A bf16 model with fp32 masters, tied weights, frozen parameters, buffers, two groups and a scheduler goes into each
format, and from there into each again. The formats' own tests have what their peers make of it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.checkpoint.catalog.catalog import Catalog
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import SINKS, open_source
from resilient.checkpoint.formats.source import Reference
from tests.checkpoint.formats.made import made_source, open_made, raw_bytes

Values = dict[str, tuple[str, tuple[int, ...], bytes]]
GROUPS: list[dict[str, Any]] = [
    {"params": ["model.embed.weight", "model.up.weight"], "lr": 0.1, "betas": [0.9, 0.95]},
    {"params": ["model.up.bias"], "lr": 0.2, "betas": [0.9, 0.95]},
]
ALIASES = {"model.head.weight": "model.embed.weight"}
MASTERS_ONLY = "deepspeed-universal"  # it has trained parameters as their fp32 masters alone
WITHOUT_STEP = ("dcp", "torch")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed.weight": torch.randn(10, 4).bfloat16(),
        "model.up.weight": torch.randn(4, 6).bfloat16(),
        "model.up.bias": torch.randn(6).bfloat16(),
        "model.frozen": torch.randn(3),
        "model.running": torch.randn(4),
        "model.count": torch.tensor(5),
    }


def states(values: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    trained = [name for group in GROUPS for name in group["params"]]
    return {
        name: {
            "fp32": values[name].float() + 1e-4,
            "exp_avg": torch.randn(values[name].shape),
            "exp_avg_sq": torch.rand(values[name].shape),
            "step": torch.tensor(7.0),
        }
        for name in trained
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    values = weights()
    return made_source(
        tmp_path_factory.mktemp("round") / "made",
        values,
        states=states(values),
        groups={"optimizer": GROUPS},
        buffers={"model.running", "model.count"},
        aliases=ALIASES,
        objects={"scheduler": {"last_epoch": 3}},
        step=7,
    )


def expected(*formats: str) -> Values:
    """What has to be there after a way through these formats."""
    values = weights()
    found: dict[str, torch.Tensor] = {}
    for name, own in states(values).items():
        found |= {f"optimizer.state.{name}.{state}": value for state, value in own.items()}
        if MASTERS_ONLY in formats:
            values[name] = own["fp32"]
    all_of = values | found
    return {
        name: (str(one.dtype).removeprefix("torch."), tuple(one.shape), raw_bytes(one)) for name, one in all_of.items()
    }


def converted(reference: Reference, to: str, folder: Path, **how: Any) -> Reference:
    target = folder / (f"{to}.pt" if to == "torch" else to)
    extra = {"optimizer": "1"} if to == "safetensors" else {}
    convert(reference, str(target), to=to, options=SinkOptions(extra=extra), workers=1, **how)
    return Reference(url=str(target))


def read(reference: Reference) -> tuple[Catalog, Values, dict[str, Any]]:
    with open_source(reference) as source:
        found: Values = {}
        for name, tensor in source.catalog.tensors.items():
            data = bytearray(tensor.nbytes)
            fetch(source, tensor, memoryview(data))
            found[name] = tensor.dtype, tensor.shape, bytes(data)
        return source.catalog, found, source.objects()


@pytest.fixture(scope="module")
def first(made: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """The model in each format."""
    folder = tmp_path_factory.mktemp("first")
    return {to: converted(made, to, folder, open_source=open_made) for to in SINKS}


@pytest.mark.parametrize("to", SINKS)
@pytest.mark.parametrize("through", SINKS)
def test_a_model_goes_through_one_format_into_another_with_all_its_values(
    first: dict[str, Reference], tmp_path: Path, through: str, to: str
) -> None:
    catalog, values, objects = read(converted(first[through], to, tmp_path))
    assert catalog.format == to
    assert values == expected(through, to)
    assert catalog.aliases == ALIASES
    assert catalog.groups == {"optimizer": GROUPS}
    if not {through, to} & set(WITHOUT_STEP):
        assert catalog.step == 7
    if "safetensors" not in (through, to):
        assert "'last_epoch': 3" in str(objects)
