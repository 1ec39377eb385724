"""What a DeepSpeed engine has beside its tensors: counters, the loss scaler. Items of a state, restored in place.

The names are those that a checkpoint of DeepSpeed's own gives them (`formats/deepspeed_objects.py`).
"""

from collections.abc import Mapping
from typing import Any

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# Where a loss scale is kept: ZeRO's optimizers have an object for it, those of stage 0 a value; and what changes in it.
_SCALERS = ("loss_scaler", "loss_scale_config")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineCounters:
    """The engine's counters, and of the checkpoint that is being taken the name that the program gave it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.tag: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self._engine, name) for name in _COUNTERS}, "tag": self.tag}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            if name in state:
                setattr(self._engine, name, state[name])
        self.tag = state.get("tag")


class LossScaler:
    """What changes in a loss scaler of DeepSpeed's, whichever of its classes it is."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    @classmethod
    def of(cls, engine: Any) -> "LossScaler | None":
        """None for an engine that scales no loss."""
        held = (getattr(engine.optimizer, name, None) for name in _SCALERS)
        return next((cls(one) for one in held if one is not None), None)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self._scaler, name) for name in _SCALE if hasattr(self._scaler, name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _SCALE:
            if name in state and hasattr(self._scaler, name):
                setattr(self._scaler, name, state[name])
