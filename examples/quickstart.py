"""The smallest protected job: run it, press Ctrl-C or kill it, run it again, and it goes on where it was.

python examples/quickstart.py /tmp/quickstart
"""

import sys

import torch

import resilient

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

checkpointer = resilient.protect(model, optimizer, sys.argv[1])

start = checkpointer.last_restore.step if checkpointer.last_restore else 0
for step in range(start + 1, 2001):
    x = torch.randn(32, 64)
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
