"""One conversion with two workers, for the tests that kill it on the way; run as a program.

python conversion_child.py SOURCE TARGET     a line each time bytes are done; goes on when a line comes in

A line: bytes done, then the ids of the workers. The last one is "complete".
"""

import multiprocessing
import sys

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.source import Reference


def tell(*words: object) -> None:
    """Print a line, and wait for one."""
    print(*words, flush=True)
    if not sys.stdin.readline():
        raise SystemExit(1)


def main(source: str, target: str) -> None:
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, *(process.pid for process in multiprocessing.active_children()))

    convert(
        Reference(url=source, format="safetensors"),  # which needs no torch: quick to start
        target,
        to="safetensors",
        options=SinkOptions(shard_bytes=1 << 20),
        workers=2,
        total=lambda nbytes: tell(0),
        progress=progress,
    )
    tell("complete")


if __name__ == "__main__":
    main(*sys.argv[1:])
