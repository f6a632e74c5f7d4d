"""The figures of a run as a table, in Markdown and JSON."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from tests.benchmarks.cases import MEMORY, Case, Limit
from tests.benchmarks.machine import Baseline, Machine
from tests.benchmarks.measures import Contender, Sample, Unit

TIMES, UNKNOWN = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that one contender did in one case."""

    contender: Contender
    samples: Sequence[Sample]
    failure: str = ""
    """Why there are fewer samples than rounds: the program is missing, or did not do the work."""

    @property
    def name(self) -> str:
        """Whose it is."""
        return self.contender.name

    @property
    def figure(self) -> float | None:
        """The median of all; none if the work was not done each time."""
        return None if self.failure else statistics.median(sample.figure for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    id: str
    work: str
    against: str
    unit: Unit
    ours: float | None
    theirs: float | None
    bar: float | None
    aim: float | None
    ours_failed: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Larger is better for us; none if there are not two figures."""
        return None if self.ours is None or self.theirs is None else self.unit.ratio(self.ours, self.theirs)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.bar is None:
            return ""
        if self.ours_failed:
            return "rbdfs failed"
        if self.ratio is None:
            return "not measured"
        if self.ratio < self.bar:
            return f"missed, by {(1 - self.ratio / self.bar):.0%}"
        return "aim reached" if self.aim is None or self.ratio >= self.aim else "bar reached"


@dataclass(frozen=True, slots=True)
class Results:
    """Of a whole run, or of as much of it as was done."""

    machine: Machine
    rounds: int
    size: int
    rbdfs_arguments: Sequence[str]
    outcomes: Sequence[tuple[Case, Mapping[Contender, Outcome]]]
    baseline: Baseline | None = None

    @property
    def rows(self) -> Sequence[Row]:
        """We against the peer that the bar names."""
        return [
            *(
                _row(case, outcomes[case.ours], case.peer if isinstance(case.peer, Limit) else outcomes[case.peer])
                for case, outcomes in self.outcomes
            ),
            *self._memory(),
        ]

    @property
    def context(self) -> Sequence[Row]:
        """We against the others."""
        return [
            _row(case, outcomes[case.ours], outcomes[other], is_context=True)
            for case, outcomes in self.outcomes
            for other in case.context
        ]

    @property
    def before(self) -> Sequence[Row]:
        """We against the rbdfs of `--baseline`."""
        return [
            _row(case, outcomes[case.ours], outcomes[case.before], is_context=True)
            for case, outcomes in self.outcomes
            if case.before
        ]

    def _memory(self) -> Iterator[Row]:
        """The case that had the most memory."""
        peaks = [
            (sample.peak_rss_bytes, case.id)
            for case, outcomes in self.outcomes
            for sample in outcomes[case.ours].samples
            if sample.peak_rss_bytes is not None
        ]
        if peaks:
            peak, case_id = max(peaks)
            against = f"{MEMORY.against}, in {case_id}"
            yield Row(MEMORY.id, MEMORY.work, against, MEMORY.unit, peak / 1e6, MEMORY.limit, MEMORY.bar, MEMORY.aim)


def _row(case: Case, ours: Outcome, theirs: Outcome | Limit, *, is_context: bool = False) -> Row:
    outcomes = [each for each in (ours, theirs) if isinstance(each, Outcome)]
    notes = [f"{outcome.name}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    bar, aim = (None, None) if is_context else (case.bar, case.aim)
    return Row(
        case.id,
        case.work,
        theirs.name,
        case.unit,
        ours.figure,
        theirs.figure,
        bar,
        aim,
        bool(ours.failure),
        "; ".join(notes),
    )


def as_json(results: Results) -> str:
    """All samples, and the rows that were made of them."""
    return json.dumps(
        {
            "machine": asdict(results.machine),
            "rounds": results.rounds,
            "size": results.size,
            "rbdfs_arguments": list(results.rbdfs_arguments),
            "baseline": results.baseline.description if results.baseline else None,
            "rows": [_plain_row(row) for row in results.rows],
            "context": [_plain_row(row) for row in results.context],
            "before": [_plain_row(row) for row in results.before],
            "measurements": [
                {
                    "case": case.id,
                    "contender": outcome.name,
                    "command": outcome.contender.command,
                    "failure": outcome.failure,
                    "samples": [asdict(sample) for sample in outcome.samples],
                }
                for case, outcomes in results.outcomes
                for outcome in outcomes.values()
            ],
        },
        indent=1,
    )


def _plain_row(row: Row) -> dict[str, object]:
    return asdict(row) | {"unit": row.unit.value, "ratio": row.ratio, "verdict": row.verdict}


def as_markdown(results: Results) -> str:
    """For people. Tables, and the machine below them."""
    return "\n".join(_markdown(results))


def _markdown(results: Results) -> Iterator[str]:
    machine = results.machine
    yield "# rbdfs and its peers"
    yield ""
    rounds = "1 round" if results.rounds == 1 else f"{results.rounds} rounds"
    yield (
        f"Medians of {rounds} on {machine.date}: {machine.cores} cores of {machine.cpu}, {machine.memory_gib} GiB, "
        f"Linux {machine.kernel}, load {machine.load} before the run; one OSD on the same machine with the images in "
        f"its memory, {results.size / 2**30:g} GiB of random bytes. In each round all contenders of a row ran one "
        "after the other. A ratio above 1 means that rbdfs is better: faster, or at less cost."
    )
    yield ""
    yield from _table(
        ["work", "against", "rbdfs", "peer", "ratio", "at least", "aim", ""],
        [
            [
                row.work,
                row.against,
                *_figures(row),
                "" if row.bar is None else times(row.bar),
                "" if row.aim is None else times(row.aim),
                row.verdict,
            ]
            for row in results.rows
        ],
    )
    before = f"Before: {results.baseline.description}" if results.baseline else ""
    for title, rows in (("Others, without a bar", results.context), (before, results.before)):
        if rows:
            yield ""
            yield f"{title}:"
            yield ""
            yield from _table(
                ["work", "against", "rbdfs", "peer", "ratio"],
                [[row.work, row.against, *_figures(row)] for row in rows],
            )
    all_rows = (*results.rows, *results.context, *results.before)
    if notes := dict.fromkeys(f"- {row.id}: {row.note}" for row in all_rows if row.note):
        yield ""
        yield "Without a figure:"
        yield ""
        yield from notes
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield f"Commit {machine.commit}; {versions}."
    if results.rbdfs_arguments:
        yield f"rbdfs was mounted with `{' '.join(results.rbdfs_arguments)}`."
    yield ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)


def _figures(row: Row) -> tuple[str, str, str]:
    ratio = UNKNOWN if row.ratio is None else f"**{times(row.ratio)}**"
    return _figure(row.ours, row.unit), _figure(row.theirs, row.unit), ratio


def _figure(value: float | None, unit: Unit) -> str:
    return UNKNOWN if value is None else f"{_three_digits(value)} {unit.value}"


def times(ratio: float) -> str:
    """A ratio, for people."""
    return f"{_three_digits(ratio)}{TIMES}"


def _three_digits(value: float) -> str:
    """Three digits that count, and never fewer than the whole number has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
