"""The smallest protected job: run it, press Ctrl-C or kill it, run it again, and it goes on where it was.

python examples/quickstart.py /tmp/quickstart
"""

import sys

import torch

import resilient

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with resilient.protect(model, optimizer, sys.argv[1]) as protected:
    print(f"going on after step {protected.step}", flush=True)
    while protected.step < 5000:
        x = torch.randn(256, 64)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()  # the snapshot is taken here, in the background
        optimizer.zero_grad()
        if protected.step % 100 == 0:
            print(f"step {protected.step}: loss {loss.item():.3f}", flush=True)
