"""Feature store: what an image tower once computed, kept by image digest and view.

A folder for each backbone and transform holds two files that only grow: `features.f32` (rows of d float32) and
`index.txt` (a line with d, then a line `digest view checksum` a row). Rows are on the disk before their lines are, and
a row counts when its line is complete; whatever a kill left behind beyond that is overwritten. So extraction can stop
at any moment and never computes an image twice, whatever split, seed or number of shots asks for it.

A store that is not what it wrote (cut, zeroed, edited) is begun anew: it costs time, never a result.
"""

import fcntl
import logging
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Image digest, and the view with what decides it: "0", or "seed:view"."""
LOCK = "lock"
"""File of a store: whoever writes holds it, and its date says when the store was last opened."""
_HEAD = b"coop features of width "
_ONE_WRITE = 1 << 20
"""Bytes, more than the index lines of any batch."""
_AT_ONCE = 1024
"""Rows that are checked at a time."""


class _DamagedError(Exception):
    """The store's files are not what it wrote."""


class FeatureStore:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._index, self._lock = folder / "features.f32", folder / "index.txt", folder / LOCK
        self._lock.touch()
        self._known: dict[Key, tuple[int, int]] = {}
        """Row number and checksum."""
        self._width: int | None = None
        self._inode = 0
        self._read_bytes = 0  # of the index: its whole lines, never a torn one

    @property
    def width(self) -> int | None:
        """d, or None while the store is empty."""
        return self._width

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Positions of the keys without a sound row; the first of equal keys only."""
        try:
            self._refresh()
            self._check([key for key in keys if key in self._known])
        except _DamagedError as fault:
            self._start_anew(fault)
        seen: set[Key] = set()
        positions = []
        for position, key in enumerate(keys):
            if key not in self._known and key not in seen:
                positions.append(position)
                seen.add(key)
        return positions

    def add(self, keys: Sequence[Key], rows: np.ndarray) -> None:
        """Append rows (n, d), float32; keys that another process has added meanwhile stay as they are."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        with self._locked():
            try:
                self._refresh()
                if self._width not in (None, rows.shape[1]):
                    raise _DamagedError(f"rows of width {self._width} instead of {rows.shape[1]}")
            except _DamagedError as fault:
                self._discard(fault)
            self._cut_torn_line()
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            new = sorted(i for key, i in first.items() if key not in self._known)
            with self._rows.open("r+b" if self._rows.exists() else "w+b") as file:
                file.seek(len(self._known) * rows.shape[1] * 4)
                file.write(rows[new].tobytes())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            # In one write: after a kill between two, the rest of a batch would be computed in another batch.
            with self._index.open("ab", buffering=_ONE_WRITE) as file:
                if not self._read_bytes:
                    file.write(_HEAD + f"{rows.shape[1]}\n".encode())
                for i in new:
                    file.write(f"{keys[i][0]} {keys[i][1]} {zlib.crc32(rows[i].tobytes()):08x}\n".encode())
            self._refresh()

    def get(self, keys: Sequence[Key]) -> np.ndarray:
        """The rows (n, d) of known keys; `missing` has checked them."""
        wanted = [self._known[key][0] for key in keys]
        if not wanted:
            return np.zeros((0, self._width or 0), dtype=np.float32)
        return np.asarray(self._mapped()[wanted])

    def _check(self, keys: Sequence[Key]) -> None:
        """Raises _DamagedError unless the rows of these known keys are the ones that were written."""
        if not keys:
            return
        rows = self._mapped()
        for start in range(0, len(keys), _AT_ONCE):
            places = [self._known[key] for key in keys[start : start + _AT_ONCE]]
            for row, (number, checksum) in zip(np.asarray(rows[[n for n, _ in places]]), places, strict=True):
                if zlib.crc32(row.tobytes()) != checksum:
                    raise _DamagedError(f"row {number} does not have its checksum")

    def _mapped(self) -> np.ndarray:
        return np.memmap(self._rows, dtype=np.float32, mode="r", shape=(len(self._known), self._width or 0))

    def _refresh(self) -> None:
        """Read what the index has gained, from whichever process; a torn last line does not count yet.

        Raises _DamagedError for an index or a row file that this class did not write.
        """
        try:
            found = self._index.stat()
        except FileNotFoundError:
            self._forget()
            return
        if found.st_ino != self._inode or found.st_size < self._read_bytes:  # another process began it anew
            self._forget()
            self._inode = found.st_ino
        with self._index.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_line(line)
                self._read_bytes += len(line)
        size = self._rows.stat().st_size if self._rows.exists() else 0
        if size < len(self._known) * (self._width or 0) * 4:
            raise _DamagedError(f"{size} bytes do not hold {len(self._known)} rows of width {self._width}")

    def _read_line(self, line: bytes) -> None:
        try:
            if not self._read_bytes:
                self._width = int(line.removeprefix(_HEAD))
                if self._width < 1 or not line.startswith(_HEAD):
                    raise ValueError
                return
            digest, view, checksum = line.decode("ascii").split()
            self._known[digest, sys.intern(view)] = len(self._known), int(checksum, 16)
        except ValueError:
            raise _DamagedError(f"{self._index} has the line {line[:80]!r}") from None

    def _start_anew(self, fault: _DamagedError) -> None:
        """Unless another process just did."""
        with self._locked():
            try:
                self._forget()
                self._refresh()
                self._check(list(self._known))
            except _DamagedError:
                self._discard(fault)

    def _discard(self, fault: _DamagedError) -> None:
        """For whoever holds the lock. Files are replaced, not emptied: others may still have the old ones mapped."""
        log.warning("the feature store %s is damaged (%s) and is begun anew", self._index.parent, fault)
        self._index.unlink(missing_ok=True)
        self._rows.unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        self._known, self._width, self._inode, self._read_bytes = {}, None, 0, 0

    def _cut_torn_line(self) -> None:
        """For whoever holds the lock: nobody is still writing that line."""
        if self._index.exists() and self._index.stat().st_size > self._read_bytes:
            os.truncate(self._index, self._read_bytes)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
