"""Answered: answers that were given -> rows of text files in a folder, the newest file last; and back.

A row is a line of JSON. A file is only ever added to, so a kill leaves one torn line at its end, which a reader skips
and counts, as it does any other line that is no whole row.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PATTERN = "answers-*.jsonl"
"""The names of files; in the order of their names they are in the order of time."""


@dataclass(frozen=True)
class Row:
    time: float
    """When it was answered, in seconds since 1970."""
    version: str
    run: str
    """MLflow's run that made the version: numbers are used by other models as well."""
    image: str
    """SHA-256 of the file."""
    label: str
    confidence: float
    answered: bool
    """Whether that was enough for an answer."""
    feature: np.ndarray
    """(d,) float16, L2-normalised."""


@dataclass(frozen=True)
class Recorded:
    """What a folder holds of one version."""

    rows: tuple[Row, ...]
    """The newest first, and one an image: what is sent twice is no two observations."""
    torn: int
    """Lines of any version that were skipped."""


def as_line(row: Row) -> bytes:
    feature = base64.b64encode(np.asarray(row.feature, "<f2").tobytes()).decode()
    values = {"time": round(row.time, 3), "version": row.version, "run": row.run, "image": row.image,
              "label": row.label, "confidence": row.confidence, "answered": row.answered,
              "feature": feature}  # fmt: skip
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def parsed(line: bytes) -> Row:
    """Raises ValueError for what is no whole row."""
    try:
        found = json.loads(line)
        feature = np.frombuffer(base64.b64decode(found["feature"], validate=True), "<f2")
        row = Row(**{**found, "feature": feature})
        well = len(feature) > 0 and bool(np.isfinite(feature).all()) and 0 <= row.confidence <= 1
        well &= len(bytes.fromhex(row.image)) == 32 and isinstance(row.label, str) and isinstance(row.answered, bool)
        well &= row.time > 0
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from None
    if not well:
        raise ValueError("a value out of its range")
    return row


def files_of(folder: Path) -> list[Path]:
    """The oldest first."""
    return sorted(folder.glob(PATTERN))


def read_recorded(folder: Path, *, run: str, at_most: int) -> Recorded:
    """The newest rows of a version, of at most so many different images."""
    rows: dict[str, Row] = {}
    torn = 0
    for file in reversed(files_of(folder)):
        for line in _lines(file):
            try:
                row = parsed(line)
            except ValueError:
                torn += 1
                continue
            if row.run == run:
                rows.setdefault(row.image, row)
            if len(rows) == at_most:
                return Recorded(tuple(rows.values()), torn)
    return Recorded(tuple(rows.values()), torn)


def _lines(file: Path) -> Iterator[bytes]:
    """The last first; none where the server has just removed the file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    yield from (line for line in reversed(content.split(b"\n")) if line)
