"""Objects in files of `torch.save`, read into memory with the tensors in them; not for anything large."""

from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, File
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece, row_major
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.formats.state_catalog import Leaves, loaded, read_leaf
from resilient.checkpoint.formats.stored import Opaque, StoredTensor
from resilient.checkpoint.formats.torch_zip import Archive, open_archive
from resilient.checkpoint.pieces import Piece

_NAMESPACES = frozenset({"argparse.Namespace", "types.SimpleNamespace"})


class OneFile(Source):
    """A file as a source of bytes alone, number 0. Whoever opened the folder closes it."""

    def __init__(self, folder: Folder, name: str) -> None:
        catalog = Catalog(format="bytes", files=[File(name, folder.size(name))])
        super().__init__(Reference(url=folder.url), folder, catalog)

    def objects(self, rank: int = 0) -> dict[str, Any]:
        return {}


def stored_leaves(source: Source, file: int = 0) -> Leaves:
    """What there is to know of `StoredTensor`s in a file of a source."""
    return Leaves(
        is_tensor=is_stored,
        is_stored=is_stored,
        pieces=lambda leaf: pieces_of(leaf, file),
        load=lambda leaf: read_leaf(source, leaf, pieces_of(leaf, file)),
        same=lambda leaf: leaf if leaf.numel else None,
    )


def read_tree(archive: Archive, *, trust: bool) -> Any:
    """The tree of an archive, with a `StoredTensor` for each tensor, and namespaces as dicts of their attributes."""
    return _without_opaque(archive.tree(opaque=_NAMESPACES, trust=trust))


def read_value(folder: Folder, name: str, *, begin: int, nbytes: int, trust: bool) -> Any:
    """An object that lies within a file, whole. Raises as `read_torch_file`."""
    tree = read_tree(open_archive(folder, name, begin=begin, nbytes=nbytes), trust=trust)
    return loaded(tree, stored_leaves(OneFile(folder, name)))


def is_stored(value: Any) -> bool:
    return type(value) is StoredTensor


def pieces_of(leaf: StoredTensor, file: int) -> PieceTable:
    """The one piece of a stored tensor."""
    strides = row_major(leaf.shape) if leaf.is_contiguous else leaf.strides
    return PieceTable.of([StoredPiece(piece=Piece.whole(leaf.shape), file=file, offset=leaf.offset, strides=strides)])


def _without_opaque(value: Any) -> Any:
    """The tree has been bounded in depth and size when it was read."""
    if isinstance(value, Opaque):
        state = value.state if isinstance(value.state, dict) else {}
        return {key: _without_opaque(one) for key, one in state.items()}
    if isinstance(value, dict):
        for key, one in dict.items(value):
            value[key] = _without_opaque(one)
        return value
    if type(value) in (list, tuple):
        return type(value)(_without_opaque(one) for one in value)
    return value
