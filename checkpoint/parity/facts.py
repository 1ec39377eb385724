"""What the nodes of a group tell one another of a snapshot, as values and as JSON. Pure.

    sealed    an image: its size and the digests of its blocks, and the rest of its record but for the pieces
    pieces    the list of pieces of a record: long, and the same at every step, so it is sent only to who lacks it
    done      a row: the digests of all its parity blocks; it holds for the agents that took part, and for no others
    failed    a snapshot that will not become whole, and why

Facts of one agent about one snapshot never change, so they may come twice, late and in any order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.digest import digest
from resilient.checkpoint.record import Record

DIGEST_CHARS = 32

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """One sealed image. `blocks` are the digests of its blocks, end to end; `head` is opaque to the group.

    `pieces` is the digest of the text of its record's pieces.
    """

    rank: int
    nbytes: int
    blocks: str
    pieces: str
    head: Json

    def digest_of(self, block: int) -> str:
        return self.blocks[block * DIGEST_CHARS : (block + 1) * DIGEST_CHARS]

    @property
    def seal(self) -> str:
        """What tells this image from any other of the same name."""
        return seal_of(self.nbytes, self.blocks)

    def to_json(self) -> Json:
        return {
            "rank": self.rank,
            "bytes": self.nbytes,
            "blocks": self.blocks,
            "pieces": self.pieces,
            "head": self.head,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Sealed":
        """Raises KeyError, TypeError or ValueError."""
        return cls(
            rank=int(raw["rank"]),
            nbytes=int(raw["bytes"]),
            blocks=str(raw["blocks"]),
            pieces=str(raw["pieces"]),
            head=dict(raw["head"]),
        )


def seal_of(nbytes: int, blocks: str) -> str:
    """See `Sealed.seal`."""
    return digest(f"{nbytes} {blocks}".encode())


def sealed_of(record: Record) -> Sealed:
    """What is told of an image whose record is known."""
    return Sealed(
        rank=record.rank,
        nbytes=record.image_bytes,
        blocks="".join(record.blocks),
        pieces=digest(record.pieces_text.encode()),
        head={
            "run_id": record.run_id,
            "life": record.life,
            "step": record.step,
            "world_size": record.world_size,
            "plan_digest": record.plan_digest,
            "image_name": record.image_name,
            "encoding": record.encoding,
            "software": record.software,
            "data_start": record.data_start,
        },
    )


def record_of(sealed: Sealed, pieces_text: str) -> Record:
    """The record again. Raises DamagedImage for digests that do not fit the size, KeyError for a head that is none."""
    head = sealed.head
    count = len(sealed.blocks) // DIGEST_CHARS
    return Record(
        run_id=head["run_id"],
        life=head["life"],
        step=head["step"],
        rank=sealed.rank,
        world_size=head["world_size"],
        plan_digest=head["plan_digest"],
        image_name=head["image_name"],
        image_bytes=sealed.nbytes,
        blocks=tuple(sealed.digest_of(block) for block in range(count)),
        pieces_text=pieces_text,
        encoding=head["encoding"],
        software=head["software"],
        data_start=head["data_start"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A row whose parity is kept: `digests[j]` are those of the blocks of parity j, end to end.

    `agents` are the ids of the members' agents, in order: of those whose images were encoded.
    """

    row: int
    agents: tuple[str, ...]
    digests: tuple[str, ...]

    def digest_of(self, j: int, number: int) -> str:
        return self.digests[j][number * DIGEST_CHARS : (number + 1) * DIGEST_CHARS]

    def to_json(self) -> Json:
        return {"row": self.row, "agents": list(self.agents), "digests": list(self.digests)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Done":
        """Raises KeyError, TypeError or ValueError."""
        return cls(
            row=int(raw["row"]),
            agents=tuple(map(str, raw["agents"])),
            digests=tuple(map(str, raw["digests"])),
        )
