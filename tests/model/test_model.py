"""Random histories of a cluster, seen through a mount in every mode, are what a model in memory says."""

from collections.abc import Iterator

import pytest

from tests.cluster import Ceph
from tests.model.run import run
from tests.model.world import World, world
from tests.truth import ALL_MODES

SEED = 20_261_125
EXAMPLES = 15


@pytest.fixture(scope="module")
def every_mode(ceph: Ceph) -> Iterator[World]:
    """A mount in every mode."""
    with world(ceph, ALL_MODES) as made:
        yield made


# Ceph's own binding does so, up to 18.2 at least, and Python 3.12 and later warn of it.
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")
def test_an_open_sees_all_that_was_done_before_it_and_an_older_file_nothing_that_never_was(every_mode: World) -> None:
    run(every_mode, SEED, EXAMPLES)
    assert all(every_mode.by_mode[mode]["opens"] for mode in ALL_MODES)
