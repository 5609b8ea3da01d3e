"""Feature store: what an image tower once computed, kept by image digest and view.

A folder for each backbone and transform holds two files that only grow: `features.f32` (rows of d float32) and
`index.txt` (one `digest view` line a row). A row counts when its line is complete; whatever a kill left behind
beyond that is overwritten. So extraction can stop at any moment and never computes an image twice, whatever
split, seed or number of shots asks for it.
"""

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Key = tuple[str, str]
"""Image digest, and the view with what decides it: "0", or "seed:view"."""
_ONE_WRITE = 1 << 20
"""Bytes, more than the index lines of any batch."""


class FeatureStore:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._index, self._lock = folder / "features.f32", folder / "index.txt", folder / "lock"
        self._known: dict[Key, int] = {}
        self._read_bytes = 0  # of the index: its whole lines, never a torn one
        self._refresh()

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Positions of the keys without a row; the first of equal keys only."""
        self._refresh()
        seen: set[Key] = set()
        positions = []
        for position, key in enumerate(keys):
            if key not in self._known and key not in seen:
                positions.append(position)
                seen.add(key)
        return positions

    def add(self, keys: Sequence[Key], rows: np.ndarray) -> None:
        """Append rows (n, d), float32; keys that another process has added meanwhile stay as they are."""
        with self._locked():
            self._refresh()
            self._cut_torn_line()
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            new = sorted(i for key, i in first.items() if key not in self._known)
            with self._rows.open("r+b" if self._rows.exists() else "w+b") as file:
                file.seek(len(self._known) * rows.shape[1] * 4)
                file.write(np.ascontiguousarray(rows[new], dtype=np.float32).tobytes())
                file.truncate()
            # In one write: after a kill between two, the rest of a batch would be computed in another batch.
            with self._index.open("ab", buffering=_ONE_WRITE) as file:
                file.writelines(f"{keys[i][0]} {keys[i][1]}\n".encode() for i in new)
            self._refresh()

    def get(self, keys: Sequence[Key], *, width: int) -> np.ndarray:
        """The rows of known keys, (n, d); `width` is d, which the store itself does not know."""
        wanted = [self._known[key] for key in keys]
        if not wanted:
            return np.zeros((0, width), dtype=np.float32)
        rows = np.memmap(self._rows, dtype=np.float32, mode="r", shape=(len(self._known), width))
        return np.asarray(rows[wanted])

    def _refresh(self) -> None:
        """Read what the index has gained, from whichever process; a torn last line does not count yet."""
        if not self._index.exists():
            return
        with self._index.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                digest, view = line.decode().split()
                self._known[digest, sys.intern(view)] = len(self._known)
                self._read_bytes += len(line)

    def _cut_torn_line(self) -> None:
        """For whoever holds the lock: nobody is still writing that line."""
        if self._index.exists() and self._index.stat().st_size > self._read_bytes:
            os.truncate(self._index, self._read_bytes)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
