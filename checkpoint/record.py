"""The record of one image: what it is, whose it is, and the digests of its blocks.

A record is published last, so its presence says that the image is there (law 3). Its text is plain JSON whose first
member is the digest of all the text that follows, so that a record edited by hand is found:

    {"digest":"<32 hex>",
    "format":"resilient","version":1,"run_id":"..","life":"..","step":100,"rank":3,"world_size":8,"plan_digest":"..",
    "image":{"name":"..","bytes":N,"block_bytes":4194304,"algorithm":"xxh3_128","data_start":4096,
    "fine":"<32 hex>","blocks":["..",..],"encoding":null},
    "software":{..},"pieces":[..]}

`pieces` is text made once per plan (`checkpoint/plan.py`) and put in as it is; `docs/format.md` describes each member.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resilient.checkpoint.digest import ALGORITHM, BLOCK_BYTES, block_count, digest
from resilient.errors import DamagedImage, NewerFormat, NotACheckpoint

FORMAT = "resilient"
VERSION = 1
_HEAD = '{"digest":"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image's record. `blocks` are digests of the raw image, whatever its encoding on a level.

    `life` tells one life of the job from the next: it changes whenever the ranks start anew, so that a step which two
    lives wrote, a part each, is not taken for one snapshot.
    `encoding` is None for raw bytes, or {"name": "zstd", ...} as `levels/frames.py` describes.
    `data_start`: where the data of the image begins (None in records of before it was noted: its header says it).
    `fine`: on a disk, the digest of the file with the digests of the image's blocks of 64 KiB (`names.digests_name`).
    `pieces_text` is the JSON text of the list of pieces, `pieces()` what it says.
    """

    run_id: str
    life: str = ""
    step: int
    rank: int
    world_size: int
    plan_digest: str
    image_name: str
    image_bytes: int
    blocks: tuple[str, ...]
    pieces_text: str = "[]"
    encoding: dict[str, Any] | None = None
    software: dict[str, str] = field(default_factory=dict)
    data_start: int | None = None
    fine: str | None = None
    parsed: list[dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.blocks) != block_count(self.image_bytes):
            raise DamagedImage(
                f"the record of {self.image_name} has {len(self.blocks)} block digests for {self.image_bytes} bytes; "
                f"{block_count(self.image_bytes)} were expected"
            )
        if not 0 <= self.rank < self.world_size:
            raise DamagedImage(f"the record of {self.image_name} says rank {self.rank} of {self.world_size}")

    def pieces(self) -> list[dict[str, Any]]:
        """The list of pieces, which is not to be changed; parsed once, if this record was read from text."""
        found: list[dict[str, Any]] = json.loads(self.pieces_text) if self.parsed is None else self.parsed
        return found

    def text(self) -> str:
        """The record as it is stored."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "life": self.life,
            "step": self.step,
            "rank": self.rank,
            "world_size": self.world_size,
            "plan_digest": self.plan_digest,
            "image": {
                "name": self.image_name,
                "bytes": self.image_bytes,
                "block_bytes": BLOCK_BYTES,
                "algorithm": ALGORITHM,
                "data_start": self.data_start,  # before what is long: see `parse_head`
                "fine": self.fine,
                "blocks": list(self.blocks),
                "encoding": self.encoding,
            },
            "software": self.software,
        }
        rest = json.dumps(head, separators=(",", ":"))[1:-1] + ',"pieces":' + self.pieces_text + "}\n"
        return f'{_HEAD}{digest(rest.encode())}",\n{rest}'


HEAD_BYTES = 4096


class Head(NamedTuple):
    """What a record says before its lists."""

    run_id: str
    life: str
    plan_digest: str
    step: int
    rank: int
    world_size: int
    image_bytes: int
    data_start: int


def parse_head(text: bytes) -> Head | None:
    """What the beginning of a record says, `HEAD_BYTES` of it at least; None where that does not tell.

    Nothing of it is verified, so it serves only to see whether a record may be another's twin.
    """
    head, found, _ = text.partition(b'"blocks":[')
    try:
        raw = json.loads(head + b'"blocks":[]}}')
        image = raw["image"]
        numbers = raw["step"], raw["rank"], raw["world_size"], image["bytes"], image["data_start"]
        texts = raw["run_id"], raw["life"], raw["plan_digest"]
    except (ValueError, KeyError, TypeError):
        return None
    if not found or not all(type(one) is int for one in numbers) or not all(isinstance(one, str) for one in texts):
        return None
    return Head(*texts, *numbers)


def parse_record(text: str | bytes, where: str) -> Record:
    """The record in `text`; `where` names it in errors.

    Raises NotACheckpoint for anything that is no record of ours, NewerFormat for a later version, DamagedImage for a
    record whose text was changed, or that lacks a member.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise DamagedImage(f"{where} is not text: {error}") from error
    raw = _members(text, where)
    claimed, _, rest = text.removeprefix(_HEAD).partition('",\n')
    if digest(rest.encode()) != claimed:
        raise DamagedImage(f"{where} was changed after it was written: its digest does not match; use another snapshot")
    try:
        return _record(raw, rest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedImage(
            f"{where} lacks a member, or has one of another type ({error}); use another snapshot"
        ) from error


def _record(raw: dict[str, Any], rest: str) -> Record:
    image = raw["image"]
    return Record(
        run_id=raw["run_id"],
        life=raw["life"],
        step=raw["step"],
        rank=raw["rank"],
        world_size=raw["world_size"],
        plan_digest=raw["plan_digest"],
        image_name=image["name"],
        image_bytes=image["bytes"],
        blocks=tuple(image["blocks"]),
        encoding=image["encoding"],
        data_start=image.get("data_start"),
        fine=image.get("fine"),
        software=raw["software"],
        pieces_text=rest[rest.index('"pieces":') + len('"pieces":') : -2],
        parsed=raw["pieces"],
    )


def _members(text: str, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise DamagedImage(f"{where} is not whole JSON ({error}); use another snapshot") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise NotACheckpoint(f"{where} is not a record of a resilient checkpoint")
    if raw.get("version") != VERSION:
        raise NewerFormat(
            f"{where} has format version {raw.get('version')}; this library reads version {VERSION}: upgrade it"
        )
    return raw
