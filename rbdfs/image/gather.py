"""One read whose bytes come from several fetches."""

from functools import partial

from rbdfs.errors import RbdfsError
from rbdfs.image.backend import Buffer, OnRead, ReadResult


class Gather:
    """Calls back once all parts are there, with all their bytes or with an error."""

    def __init__(self, count: int, callback: OnRead) -> None:
        self._missing = count
        self._results: list[ReadResult] = [b""] * count
        self._callback = callback
        self.callbacks: list[OnRead] = [partial(self._add, number) for number in range(count)]
        """One for each part, in the order of the bytes."""

    def _add(self, number: int, result: ReadResult) -> None:
        self._results[number] = result
        self._missing -= 1
        if self._missing:
            return
        data: list[Buffer] = []
        for each in self._results:
            if isinstance(each, RbdfsError):
                self._callback(each)
                return
            data.append(each)
        self._callback(b"".join(data))
