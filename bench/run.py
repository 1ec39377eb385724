"""Run the benchmarks: python bench/run.py [names...] [--quick]

Each prints a table of ratios with the targets beside what was measured, and leaves NAME.json (all samples, in seconds)
and NAME.png in --out. Without names all are run. A benchmark's module says what it measures and how.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that nothing of this checkout hides an installed package

NAMES = (
    "call_and_stall",
    "every_step",
    "levels",
    "planning",
    "reshape",
    "verify",
    "memory",
    "transport",
    "codec",
    "flow_placement",
    "overlap",
    "net",
    "catalog",
    "conversion",
    "parity",
    "parity_steps",
    "parity_memory",
    "restart",
    "preemption",
    "deepspeed_hook",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="one round with few saves")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, help="how often everything is measured, interleaved (default 3)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only methods whose name has TEXT")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="where the results go")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure (default: in --out)")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return chosen


def main() -> int:
    """Exit status 0 when every target that was measured is reached, 1 otherwise."""
    from rich.console import Console

    from bench import plot, report
    from bench.processes import Place
    from bench.settings import Settings

    chosen = arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    scratch = chosen.scratch or chosen.out / f"scratch-{os.getpid()}"
    quick = chosen.quick or chosen.smoke
    settings = Settings(
        place=Place(scratch=scratch.resolve() / "bench", logs=chosen.out.resolve() / "logs"),
        rounds=chosen.rounds or (1 if quick else 3),
        quick=quick,
        smoke=chosen.smoke,
        say=lambda text: console.print(
            f"{time.strftime('%H:%M:%S')} {text}", style="dim", markup=False, highlight=False
        ),
        only=chosen.only,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    missed = 0
    try:
        for name in chosen.names or NAMES:
            for found in importlib.import_module(f"bench.{name}").run(settings):
                report.write_json(found, chosen.out / f"{found.name}.json")
                plot.draw(found, chosen.out / f"{found.name}.png")
                report.show(found, console)
                missed += sum(target.reached is False for target in found.targets)
    finally:
        settings.place.remove()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
