"""What costs depend on (the key under which they are kept), and whether a device's work is being recorded."""

import functools
import platform
from pathlib import Path

import torch
import torch.distributed as dist

from resilient.kernels.overlap.call import Call
from resilient.kernels.overlap.exchange import Group


def key_of(call: Call, group: Group) -> dict[str, str | int]:
    """Of this rank's machine; `call` gives the device, the dtype and the world."""
    return {
        "device": _device(call.device),
        "threads": torch.get_num_threads() if call.device == "cpu" else 0,
        "torch": torch.__version__,
        "world": call.world,
        "backend": dist.get_backend(group),
        "dtype": call.dtype,
    }


def capturing(kind: str) -> bool:
    """Whether what is launched now on such a device goes into a CUDA graph, and is not carried out."""
    return kind == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _device(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind}: {_processor()}"


def _processor() -> str:
    """As Linux calls it; its architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
