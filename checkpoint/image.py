"""The image: one rank's owned pieces of one step as a safetensors file.

    8 bytes   length of the header, little endian
    header    JSON, filled with spaces so that the data begins at `data_start`, a multiple of 4096 (direct I/O)
    data      planned tensors, largest elements first, then the objects: their tensors and their JSON text

The planned part of the header is made once per plan; a save appends only the entries of the objects. Format:
https://huggingface.co/docs/safetensors/index#format. Pure functions over bytes; `docs/format.md` is the contract.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resilient.errors import DamagedImage

PAGE_BYTES = 4096
OBJECTS_KEY = "resilient.objects"
PADDING_KEY = "resilient.padding"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an image: name, safetensors dtype, shape as stored, and its bytes within the data."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def text(self) -> str:
        shape = ",".join(map(str, self.shape))
        span = f"[{self.offset},{self.offset + self.nbytes}]"
        return f'{json.dumps(self.key)}:{{"dtype":"{self.dtype}","shape":[{shape}],"data_offsets":{span}}}'


def up_to_page(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def entries_text(entries: Sequence[Entry]) -> str:
    """The part of a header that describes `entries`; parts are joined with commas."""
    return ",".join(entry.text() for entry in entries)


def header(parts: Sequence[str], metadata: dict[str, str], data_start: int) -> bytes:
    """The bytes before the data. Raises ValueError where they do not fit below `data_start`."""
    members = [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}', *(part for part in parts if part)]
    text = ("{" + ",".join(members) + "}").encode()
    length = data_start - 8
    if len(text) > length:
        raise ValueError(f"a header of {len(text)} bytes does not fit below {data_start}")
    return length.to_bytes(8, "little") + text.ljust(length)


def parse_header(head: bytes | memoryview, image_bytes: int, where: str) -> tuple[dict[str, Entry], int]:
    """The entries of an image by name, and where its data starts. `where` names the image in errors.

    `head` are its first bytes, the header at least, unless that claims to be longer than the image.
    """
    length = int.from_bytes(head[:8], "little") if image_bytes >= 8 else -1
    if not 2 <= length <= image_bytes - 8:
        raise DamagedImage(f"{where} is no safetensors file: its header claims {length} of {image_bytes} bytes")
    try:
        raw: dict[str, Any] = json.loads(bytes(head[8 : 8 + length]))
        entries = {key: _entry(key, value) for key, value in raw.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedImage(f"the safetensors header of {where} cannot be read: {error}") from error
    beyond = [entry.key for entry in entries.values() if 8 + length + entry.offset + entry.nbytes > image_bytes]
    if beyond:
        raise DamagedImage(f"{where} ends before its tensor {beyond[0]!r} does")
    return entries, 8 + length


def data_start_of(head: bytes | memoryview) -> int:
    """Where the data of an image begins, from its first 8 bytes."""
    return 8 + int.from_bytes(head[:8], "little")


def _entry(key: str, raw: dict[str, Any]) -> Entry:
    begin, end = raw["data_offsets"]
    return Entry(key, raw["dtype"], tuple(raw["shape"]), begin, end - begin)
