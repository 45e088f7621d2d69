"""Arrays on disk: what does not fit into memory lies in a file, of which a part is read at a time."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

BLOCK = 16 << 20  # bytes that are read or written at once


@dataclass(frozen=True, eq=False)
class Rows:
    """An array (N, …) that lies in an open `file` from `offset` on, in C order; indexing reads the rows asked for."""

    file: IO[bytes]
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes all rows take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Returns the rows of a slice or of an array of indices, as numpy does."""
        import numpy as np

        wanted = np.arange(len(self))[rows]
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        if not found.size:
            return found
        flat = found.reshape(len(wanted), -1).view(np.uint8)
        size = flat.shape[1]
        # Rows that follow each other are read at once.
        starts = np.flatnonzero(np.diff(wanted, prepend=-2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(wanted)], strict=True):
            self._read(flat[start:stop].reshape(-1), self.offset + int(wanted[start]) * size)
        return found

    def _read(self, into: np.ndarray, offset: int) -> None:
        import numpy as np

        done = 0
        while done < len(into):
            block = os.pread(self.file.fileno(), min(BLOCK, len(into) - done), offset + done)
            if not block:
                raise EdgeKitError(
                    f"{self.file.name} ends before its arrays do", "it was cut short while it was read: run this again"
                )
            into[done : done + len(block)] = np.frombuffer(block, np.uint8)
            done += len(block)


class Spool:
    """Arrays in one temporary file without a name, which is gone with its last user, however that ends.

    Raises EdgeKitError where the disk is full.
    """

    def __init__(self) -> None:
        with atomic_files.writing(_folder()):
            self._file = tempfile.TemporaryFile(prefix="edgekit-")  # noqa: SIM115
        self._end = 0

    def put(self, array: np.ndarray) -> Rows:
        """Writes an array of at least one axis to the end, and returns where it lies."""
        import numpy as np

        array = np.ascontiguousarray(array)
        start = self._end
        self.write(array.reshape(-1).view(np.uint8).data)
        return Rows(self._file, start, array.dtype, array.shape)

    def write(self, content: memoryview | bytes) -> None:
        """Writes bytes to the end."""
        with atomic_files.writing(_folder()):
            self._file.write(content)
            self._file.flush()
        self._end += len(content)

    def rows(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Rows:
        """Returns all that was written as one array."""
        return Rows(self._file, 0, dtype, shape)


class Shelf:
    """An array (N, …) that grows by rows: in memory as long as it has at most `most` bytes, and else on disk."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: list[np.ndarray] = []
        self._spool: Spool | None = None
        self._count = 0

    def put(self, rows: np.ndarray) -> None:
        """Adds rows, all of one dtype and shape; they are copied where they stay in memory."""
        self._count += len(rows)
        if self._spool is None:
            self._parts.append(rows.copy())
            if sum(part.nbytes for part in self._parts) > self._most:
                self._spool = Spool()
                for part in self._parts:
                    self._spool.put(part)
                del self._parts[1:]  # the first tells dtype and shape
        else:
            self._spool.put(rows)

    def rows(self) -> np.ndarray | Rows:
        """Returns all rows, of which there is at least one, as what can be indexed."""
        import numpy as np

        first = self._parts[0]
        if self._spool is None:
            return np.concatenate(self._parts)
        return self._spool.rows(first.dtype, (self._count, *first.shape[1:]))


def _folder() -> Any:
    from pathlib import Path

    return Path(tempfile.gettempdir())
