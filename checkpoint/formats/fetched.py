"""A whole tensor of a source as one of torch's: for what is small, or is to be held as a whole anyway."""

import torch

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.source import Source


def fetched(source: Source, tensor: Tensor) -> torch.Tensor:
    """In host memory, contiguous, in the tensor's own dtype and shape. Blocks. Raises what `fetch` raises."""
    made = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    data = made.view(-1).view(torch.uint8).numpy().data
    fetch(source, tensor, memoryview(data))
    return made
