"""Runs random histories: some of them, or for so many minutes."""

import time

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import Machine
from tests.model.world import World

STEPS = 60
"""Of one history."""
BATCH = 10
"""Histories that one seed stands for."""


def run(world: World, seed: int, examples: int = BATCH, *, shrink: bool = True) -> None:
    """So many histories. Raises AssertionError with the shortest one that goes wrong."""

    class MachineOfWorld(Machine):
        """Hypothesis makes it without arguments."""

        def __init__(self) -> None:
            super().__init__(world)

    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(MachineOfWorld), settings=settings)


def run_for(world: World, seed: int, minutes: float, *, shrink: bool = True) -> int:
    """Batch after batch; the seed that would be next. Raises AssertionError as `run` does."""
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        run(world, seed, shrink=shrink)
        seed += 1
    return seed
