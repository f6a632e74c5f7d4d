"""What a reader of the soak is: a round that is repeated, and whose bytes are compared."""

import random
from abc import ABC, abstractmethod
from typing import ClassVar

from tests.soak.ledger import Ledger
from tests.soak.site import Site


class Reader(ABC):
    """One kind of program that reads."""

    may_see: ClassVar[frozenset[str]] = frozenset({"ETIMEDOUT"})
    """The errors that a fault excuses."""

    def __init__(self, site: Site, ledger: Ledger, seed: int) -> None:
        self.site = site
        self.ledger = ledger
        self.random = random.Random(f"{seed} {self.name}")

    @property
    def name(self) -> str:
        """Of this kind."""
        return type(self).__name__

    @abstractmethod
    def round(self) -> int:
        """How many bytes were read and right. Raises WrongError, FailedError, OSError."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Let go of what is open between rounds."""
