"""The Triton kernel of the device's codec in Triton's interpreter, which needs no device: the host's bytes."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = """
import torch
from resilient.ec import gpu, gpu_kernel
from resilient.ec.codec import Codec
from resilient.ec.matrix import parity_matrix
for k, m in ((1, 1), (3, 1), (5, 4), (3, 6)):
    for nbytes in (0, 3, 4, 2047, 2048, 2053):
        data = list(torch.randint(0, 256, (k, nbytes), dtype=torch.uint8))
        ours, theirs = (list(torch.full((m, nbytes), 7, dtype=torch.uint8)) for _ in range(2))
        gpu.combine_by(gpu_kernel, parity_matrix(k, m), data, ours)
        Codec(k, m).encode(data, theirs)
        assert all(map(torch.equal, ours, theirs)), (k, m, nbytes)
        gpu.DeviceCodec(k, m, plain=True).encode(data, plain := [torch.empty_like(one) for one in theirs])
        assert all(map(torch.equal, ours, plain)), (k, m, nbytes)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this processor")
def test_the_kernel_gives_the_bytes_of_the_host_and_of_plain_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
