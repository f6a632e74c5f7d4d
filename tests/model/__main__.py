"""Random histories for as long as one likes, on a cluster of their own: `python -m tests.model --minutes 60`."""

import argparse
import sys
import time

from tests.cluster import running_ceph
from tests.model.run import run_for
from tests.model.world import world
from tests.truth import ALL_MODES


def main() -> int:
    """The exit status: 1 if something went wrong."""
    parser = argparse.ArgumentParser(prog="tests.model", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="how long [15]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first ten histories [the time]")
    names = [",".join(mode) for mode in ALL_MODES]
    parser.add_argument("--modes", nargs="+", choices=names, default=names, metavar="MODE", help=f"of {names} [all]")
    parser.add_argument("--no-shrink", action="store_true", help="show at once what goes wrong, in a long history")
    options = parser.parse_args()
    modes = [mode for mode in ALL_MODES if ",".join(mode) in options.modes]
    with running_ceph() as ceph:
        try:
            with world(ceph, modes) as made:
                print(f"from seed {options.seed} on", flush=True)
                try:
                    run_for(made, options.seed, options.minutes, shrink=not options.no_shrink)
                finally:
                    print(made.summary(), flush=True)
        except AssertionError as error:
            print(error)
            return 1
    print("nothing was wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
