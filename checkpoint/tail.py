"""The end of an image: the objects of a state, their tensors one by one and then their text."""

import json

import torch

from resilient.checkpoint.dtypes import dtype_name, safetensors_dtype
from resilient.checkpoint.image import OBJECTS_KEY, Entry, entries_text
from resilient.checkpoint.objects import Encoded


class Tail:
    """Where the encoded objects go, after the `begins` bytes of planned tensors, and what the header says of them."""

    def __init__(self, objects: Encoded, begins: int) -> None:
        # Wide elements first, so that all lie aligned.
        self._tensors = sorted(objects.tensors.items(), key=lambda pair: -pair[1].element_size())
        self._text = _text(objects)
        self._entries: list[Entry] = []
        offset = begins
        for key, tensor in self._tensors:
            code, trailing = safetensors_dtype(tensor.dtype)
            shape = (*tensor.shape, *(trailing or ()))
            self._entries.append(Entry(f"{OBJECTS_KEY}/{key}", code, shape, offset, tensor.nbytes))
            offset += tensor.nbytes
        self._entries.append(Entry(OBJECTS_KEY, "U8", (len(self._text),), offset, len(self._text)))
        self.end = offset + len(self._text)
        self.nbytes = self.end - begins
        self.header_text = entries_text(self._entries)

    def write(self, data: memoryview) -> None:
        """Fill their part of an image's data."""
        for entry, (_, tensor) in zip(self._entries[:-1], self._tensors, strict=True):
            if entry.nbytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                data[entry.offset : entry.offset + entry.nbytes] = flat.numpy().data
        data[self._entries[-1].offset : self.end] = self._text


def _text(objects: Encoded) -> bytes:
    """The encoded objects, with what safetensors cannot say of their tensors: true dtype and shape."""
    tensors = {key: [dtype_name(tensor.dtype), list(tensor.shape)] for key, tensor in objects.tensors.items()}
    return json.dumps({"tensors": tensors, "value": objects.text}).encode()
