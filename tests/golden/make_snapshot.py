"""Writes the golden snapshot of the present format version: `python tests/golden/make_snapshot.py FOLDER`.

Run it once when the format's version changes, never to make a failing test pass: the point of a golden file is that
it was written by the library of its day.
"""

import sys

import torch
from torch import nn

import resilient


def job(seed: int) -> tuple[dict[str, object], nn.Module]:
    """A small state of many kinds, with values that depend on `seed` alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, dtype=torch.float32))
    model.register_buffer("small", torch.arange(7, dtype=torch.bfloat16))
    model.register_buffer("wave", torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (1 + seed))
    for _ in range(seed):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    notes: dict[str, object] = {"seen": [1, 2, (3, None)], "seed": seed} if seed == 3 else {}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "notes": notes}, model


if __name__ == "__main__":
    with resilient.Checkpointer(sys.argv[1], job(3)[0], resilient.Policy(durable_every=1)) as checkpointer:
        checkpointer.save(3).durable("durable").result(60)
