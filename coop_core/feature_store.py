"""Feature store: what an image tower once computed, kept by image digest and view.

A folder for each backbone and transform holds two files that only grow: `features.f32` (rows of d float32) and
`index.txt` (one `digest view` line a row). A row counts when its line is complete; whatever a kill left behind
beyond that is overwritten. So extraction can stop at any moment and never computes an image twice, whatever
split, seed or number of shots asks for it.
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Key = tuple[str, str]
"""Image digest, and the view with what decides it: "0", or "seed:view"."""


class FeatureStore:
    def __init__(self, folder: Path, *, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.width = width
        self._rows, self._index, self._lock = folder / "features.f32", folder / "index.txt", folder / "lock"
        self._known: dict[Key, int] = {}
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
        """Append rows (n, width), float32; keys that another process has added meanwhile stay as they are."""
        with self._locked():
            self._refresh(cut_torn_line=True)
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            new = sorted(i for key, i in first.items() if key not in self._known)
            with self._rows.open("r+b" if self._rows.exists() else "w+b") as file:
                file.seek(len(self._known) * self.width * 4)
                file.write(np.ascontiguousarray(rows[new], dtype=np.float32).tobytes())
                file.truncate()
            with self._index.open("a") as file:
                file.writelines(f"{keys[i][0]} {keys[i][1]}\n" for i in new)
            self._refresh()

    def get(self, keys: Sequence[Key]) -> np.ndarray:
        """The rows of known keys, (n, width)."""
        wanted = [self._known[key] for key in keys]
        if not wanted:
            return np.zeros((0, self.width), dtype=np.float32)
        rows = np.memmap(self._rows, dtype=np.float32, mode="r", shape=(len(self._known), self.width))
        return np.asarray(rows[wanted])

    def _refresh(self, *, cut_torn_line: bool = False) -> None:
        """Read the index again; a torn last line does not count, and whoever holds the lock cuts it off."""
        if not self._index.exists():
            return
        lines = self._index.read_text().split("\n")
        if lines[-1] and cut_torn_line:
            with self._index.open("r+") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        if len(lines) - 1 > len(self._known):
            self._known = {(line.split()[0], line.split()[1]): row for row, line in enumerate(lines[:-1])}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
