"""Readers of every kind while images change and faults are injected: `python -m tests.soak --minutes 30`."""

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.soak.faults import SCHEDULE
from tests.soak.soak import Options, run


def main() -> int:
    """The exit status: 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long [30]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of contents, changes and faults [the time]")
    parser.add_argument("--scale", type=int, default=64, metavar="MIB", help="size of most images [64]")
    parser.add_argument("--quiet", type=float, default=20, metavar="SECONDS", help="between two faults [20]")
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="where to keep what the mount has logged")
    parser.add_argument(
        "--faults", nargs="+", type=int, choices=range(len(SCHEDULE)), help="only these of the schedule"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {options.seed}", flush=True)
    schedule = tuple(SCHEDULE[number] for number in options.faults) if options.faults else SCHEDULE
    failures = run(Options(options.minutes, options.seed, options.scale, schedule, options.quiet, options.log_file))
    print("nothing was wrong" if not failures else "\n".join(["", "What was wrong:", *failures]))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
