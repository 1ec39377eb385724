"""One commit of a FileStore, for the tests that kill it or let it fail on the way; run as a program.

python commit_child.py ROOT NAME BYTES [exclusive]     prints "done", or the name and number of the error
"""

import mmap
import sys

from resilient.checkpoint.levels.files import FileStore
from resilient.errors import LevelFailed


def new_bytes(count: int) -> memoryview:
    """What a commit writes: page-aligned, as a mapped image is."""
    memory = mmap.mmap(-1, count)
    memory[:] = b"N" * count
    return memoryview(memory)


def main(root: str, name: str, count: str, *options: str) -> None:
    data = new_bytes(int(count))
    chunks = [data[start : start + (8 << 20)] for start in range(0, len(data), 8 << 20)]
    try:
        FileStore(root).write(name, chunks, exclusive="exclusive" in options)
    except LevelFailed as error:
        print("LevelFailed", error.errno, error)
    else:
        print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
