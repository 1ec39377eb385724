"""Tensors of every dtype and layout in everything that may hold one: the bits come back, into old tensors and new."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.checkpoint.jobs import Job, bits, checkpointing
from tests.checkpoint.test_state_models import layouts, of_any_bits, storable

pytestmark = pytest.mark.usefixtures("runtime_dir")
SHARING = ("expanded", "windows")  # elements that share memory have got their own afterwards


def tensors() -> dict[str, Tensor]:
    """Full, scalar, empty and turned ones of every dtype, and all the layouts."""
    found: dict[str, Tensor] = {}
    for dtype in storable():
        for shape, name in (((7, 3), ""), ((), "_scalar"), ((0, 2), "_empty")):
            found[f"{dtype}{name}".replace("torch.", "of_")] = of_any_bits(dtype, *shape)
        found[f"{dtype}_turned".replace("torch.", "of_")] = of_any_bits(dtype, 7, 3).t()
    return found | layouts()


class Holding:
    """An object of one's own with tensors deep inside its state, one of them twice."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self.held, (1, self.held)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["deep"][1][1]


class Extra(nn.Module):
    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = held

    def get_extra_state(self) -> Any:
        return {"held": self.held}

    def set_extra_state(self, state: Any) -> None:
        self.held = state["held"]


class Keeping(Optimizer):
    """Its first step gives the parameters all of these tensors as their state."""

    def __init__(self, parameters: Any, held: dict[str, Tensor]) -> None:
        super().__init__(parameters, {"tensor": held["turned"]})
        self.held = held

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].update(self.held)


def state_of(seed: int, *, stepped: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    held = tensors()
    model = nn.Linear(2, 2)
    optimizer = Keeping(model.parameters(), held)
    if stepped:
        optimizer.step()
    state = {"model": model, "optimizer": optimizer, "mapping": {"in": dict(held)}, "object": Holding(held)}
    single = {f"single_{name}": tensor.clone() for name, tensor in held.items()}
    return state | single | {"extra": Extra(held)}


def held_by(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    optimizer = state["optimizer"]
    return {
        "optimizer": dict(optimizer.state[state["model"].weight]),
        "group": {"tensor": optimizer.param_groups[0]["tensor"]},
        "mapping": state["mapping"]["in"],
        "object": state["object"].held,
        "extra": state["extra"].held,
        "single": {name: value for name, value in state.items() if name.startswith("single_")},
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("stepped", [True, False], ids=["into tensors that are there", "into new ones"])
def test_every_holder_gives_back_the_bits_of_every_dtype_and_layout(stepped: bool, tmp_path: Path) -> None:
    saved, fresh = state_of(1, stepped=True), state_of(2, stepped=stepped)
    with checkpointing(tmp_path, Job(saved, lambda: None)) as checkpointer:
        checkpointer.save(1).durable("durable").result(60)
    with checkpointing(tmp_path, Job(fresh, lambda: None)) as checkpointer:
        assert checkpointer.restore() == 1
    for holder, expected in held_by(saved).items():
        got = held_by(fresh)[holder]
        assert got.keys() == expected.keys(), holder
        for name, tensor in expected.items():
            where = f"{name} of the {holder}"
            assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), where
            assert bits(got[name]) == bits(tensor), where
            if holder in ("optimizer", "single") and name not in SHARING and tensor.numel():
                assert got[name].stride() == tensor.stride(), where
