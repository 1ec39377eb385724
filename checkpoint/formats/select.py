"""Which tensors of a checkpoint patterns mean."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from resilient.checkpoint.catalog.catalog import Catalog, Tensor
from resilient.errors import UsageError


def select(catalog: Catalog, patterns: Sequence[str]) -> Catalog:
    """The part of a catalog that shell patterns (`*`, `?`, `[...]`) match; all of it without patterns.

    A pattern is compared with the whole of a tensor's name and of its FQN; `*` matches dots, too. The state of an
    optimizer goes with its parameter, and has its own name besides. Raises UsageError for a pattern that matches
    nothing.
    """
    if not patterns:
        return catalog
    unused, names = dict.fromkeys(patterns), []
    for tensor in catalog.tensors.values():
        known = list(_names(catalog, tensor))
        hits = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in known)]
        if hits:
            names.append(tensor.name)
        for pattern in hits:
            unused.pop(pattern, None)
    if unused:
        some = ", ".join(list(catalog.tensors)[:3])
        raise UsageError(f"no tensor matches the pattern {next(iter(unused))!r}; names are like {some}")
    return _with_groups_of(catalog.only(names), catalog)


def _with_groups_of(part: Catalog, whole: Catalog) -> Catalog:
    """Parameters that are not selected leave their groups; the groups stay, so that their numbers do."""

    def stays(name: str) -> bool:
        first = whole.aliases.get(name, name)
        return first in part.tensors or first not in whole.tensors

    groups = {
        item: [{**group, "params": [name for name in group["params"] if stays(name)]} for group in groups]
        for item, groups in part.groups.items()
    }
    return replace(part, groups=groups)


def _names(catalog: Catalog, tensor: Tensor) -> Iterator[str]:
    yield tensor.name
    if tensor.kind != "optimizer":
        yield tensor.fqn
        return
    yield tensor.parameter
    parameter = catalog.tensors.get(tensor.parameter)
    if parameter is not None:
        yield parameter.fqn
