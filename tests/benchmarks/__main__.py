"""`python -m tests.benchmarks`: let rbdfs and its peers do the same work on a cluster of their own."""

import argparse
import hashlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from rbdfs.devcluster.signals import SIGNALS
from rbdfs.errors import RbdfsError
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.machine import CHECKOUT, Baseline, baseline_at, this_machine, write_bytecode
from tests.benchmarks.measures import Contender, Sample, measure
from tests.benchmarks.peers import RBDFS, PeerError, served
from tests.benchmarks.plot import as_svg
from tests.benchmarks.report import Outcome, Results, as_json, as_markdown
from tests.benchmarks.site import MIB, Site, site

UNITS = {"M": MIB, "G": MIB << 10}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks. 0 if rbdfs did its part in all of them; 1 if not, or if there is no cluster."""
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{case.id:20} {case.work}, against {case.peer.name}" for case in CASES))
        return 0
    for each in SIGNALS:
        signal.signal(each, _exit)
    options.output.mkdir(parents=True, exist_ok=True)
    machine, done = this_machine(), list[tuple[Case, Mapping[Contender, Outcome]]]()
    rbdfs_arguments = shlex.split(options.rbdfs_arguments)
    baseline: Baseline | None = options.baseline
    cases = [case.against_baseline(baseline.python) if baseline else case for case in options.only]
    write_bytecode(sys.executable, CHECKOUT)
    if baseline:
        write_bytecode(baseline.python, baseline.checkout)
    try:
        _tell("starting a cluster and writing the images")
        with site(_images(cases), options.size, rbdfs_arguments) as here:
            _compare(here)
            for case in cases:
                done.append((case, _run(case, here, options.rounds)))
                # After each case: a run that is interrupted has its figures so far.
                results = Results(machine, options.rounds, options.size, rbdfs_arguments, done, baseline)
                _write(results, options.output)
    except (RbdfsError, PeerError) as error:
        _tell(str(error))
        return 1
    print((options.output / "benchmarks.md").read_text())
    return int(any(outcomes[case.ours].failure for case, outcomes in done))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", metavar="N", type=_positive, default=5, help="take medians of so many [5]")
    parser.add_argument(
        "--only",
        metavar="ID[,...]",
        type=_cases,
        default=list(CASES),
        help="only these rows of the table; a leading - leaves one out of all (--only=-du) [all]",
    )
    parser.add_argument(
        "--size", metavar="SIZE", type=_size, default="2G", help="of the image of random bytes: 256M, 2G [2G]"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("benchmark-results"),
        help="where benchmarks.md, .json and .svg are written [benchmark-results]",
    )
    parser.add_argument(
        "--rbdfs-arguments", metavar="ARGS", default="", help="for rbdfs mount, to try what other options do [none]"
    )
    parser.add_argument(
        "--baseline",
        metavar="PYTHON",
        type=_baseline,
        help="the interpreter of an earlier rbdfs (its .venv/bin/python), to measure that one along with ours [none]",
    )
    parser.add_argument("--list", action="store_true", help="print the ids of the rows, and run nothing")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a positive number: {text}")
    return int(text)


def _size(text: str) -> int:
    """In bytes; four images of a quarter of it, in whole objects, must be possible."""
    found = re.fullmatch(r"(\d+)([MG])", text)
    size = int(found[1]) * UNITS[found[2]] if found else 0
    if size == 0 or size % (16 * MIB):
        raise argparse.ArgumentTypeError(f"not a size in M or G, and a multiple of 16M: {text}")
    return size


def _baseline(text: str) -> Baseline:
    try:
        return baseline_at(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _cases(text: str) -> Sequence[Case]:
    names = text.split(",")
    known = {case.id for case in CASES}
    if unknown := {name.removeprefix("-") for name in names} - known:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(unknown)}; see --list")
    out = {name.removeprefix("-") for name in names if name.startswith("-")}
    wanted = {name for name in names if not name.startswith("-")} or known
    return [case for case in CASES if case.id in wanted - out]


def _images(cases: Iterable[Case]) -> Sequence[str]:
    """Those that the cases need, each once."""
    return list(dict.fromkeys(name for case in cases for each in case.contenders for name in each.images))


def _compare(here: Site) -> None:
    """Read each image of random bytes once: rbdfs must have the bytes right, and the OSD has them in memory then.

    Raises PeerError for wrong bytes: then no figure would mean anything.
    """
    for image in (image for image in here.images.values() if image.sha256):
        _tell(f"comparing {image.name}")
        with served(RBDFS, here, here.conf, image) as mount, mount.file(image).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != image.sha256:
                raise PeerError(f"{image.name}: rbdfs reads other bytes than were written")


def _run(case: Case, here: Site, rounds: int) -> Mapping[Contender, Outcome]:
    """Let all contenders do the work in turns, every other round in reverse order.

    One that fails is not asked again.
    """
    samples: dict[Contender, list[Sample]] = {contender: [] for contender in case.contenders}
    failures = {contender: f"{contender.missing} is not installed" for contender in samples if contender.missing}
    for number in range(rounds):
        for contender in list(samples) if number % 2 == 0 else reversed(list(samples)):
            if contender in failures:
                continue
            try:
                sample = measure(here, contender)
            except PeerError as error:
                failures[contender] = str(error)
            else:
                samples[contender].append(sample)
                _tell(f"{case.id} {number + 1}/{rounds} {contender.name}: {sample.figure:.4g} {case.unit.value}")
    for contender, failure in failures.items():
        _tell(f"{case.id} {contender.name}: {failure}")
    return {contender: Outcome(contender, taken, failures.get(contender, "")) for contender, taken in samples.items()}


def _write(results: Results, folder: Path) -> None:
    """The table and the picture, as far as they are known."""
    writers: dict[str, Callable[[Results], str]] = {"md": as_markdown, "json": as_json, "svg": as_svg}
    for ending, write in writers.items():
        (folder / f"benchmarks.{ending}").write_text(write(results))


def _exit(number: int, _frame: FrameType | None) -> None:
    """The first signal ends the run, and all that it started; a second does not cut that short."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
